"""One QMP monitor: commands with deadlines, errors of ours, events in a bounded queue.

Built on ``qemu.qmp``, QEMU's own library (QEMU docs, "QEMU Machine Protocol Specification").
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError, Message, QMPClient, QMPError
from qemu.qmp.events import EventListener

from mica.model.errors import Code, MicaError

COMMAND_TIMEOUT_S = 10.0
MAX_EVENTS = 256


class _Bounded(EventListener):
    """Keeps the newest events: each means "look again", so those that are dropped are not missed."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: asyncio.Queue[Message] = asyncio.Queue(MAX_EVENTS)

    async def put(self, event: Message) -> None:
        if self._queue.full():
            self._queue.get_nowait()
        self._queue.put_nowait(event)


class Monitor:
    """A connected monitor. Close it; closing does not touch the machine."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._client = QMPClient(name)
        # The library's own listener keeps every event for ever; this name matches none.
        self._client.events.names = {""}
        self._events = _Bounded()
        self._client.register_listener(self._events)
        self._closing = asyncio.Lock()
        self._closed = False

    @classmethod
    async def connect(cls, name: str, path: Path, timeout_s: float = COMMAND_TIMEOUT_S) -> Monitor:
        """Connect and negotiate. Raises ``timeout`` when another client holds the monitor, ``qemu-failed``.

        ``qemu-failed`` is retryable when nobody listens (yet).
        """
        monitor = cls(name)
        try:
            async with asyncio.timeout(timeout_s):
                await monitor._client.connect(str(path))
        except TimeoutError as error:
            raise MicaError(
                Code.TIMEOUT,
                f"QEMU of {name} did not greet within {timeout_s:.0f} s",
                hint="another program may hold its monitor; QMP takes one client",
                retryable=True,
            ) from error
        except (QMPError, OSError) as error:
            # The library wraps what the operating system said (qemu.qmp, ConnectError.exc).
            refused = isinstance(getattr(error, "exc", error), ConnectionRefusedError)
            message = f"QEMU of {name} cannot be reached: {error}"
            raise MicaError(Code.QEMU_FAILED, message, retryable=refused) from error
        return monitor

    async def execute(self, command: str, *, timeout_s: float = COMMAND_TIMEOUT_S, **arguments: Any) -> Any:
        """Run one command. Underscores in argument names stand for hyphens. Raises ``qemu-failed``, ``timeout``."""
        values = {key.replace("_", "-"): value for key, value in arguments.items()}
        return await self.run(command, values, timeout_s=timeout_s)

    async def run(
        self, command: str, arguments: dict[str, Any] | None = None, *, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> Any:
        """As :meth:`execute`, with the arguments as QMP spells them."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, arguments or None)
        except TimeoutError as error:
            raise MicaError(
                Code.TIMEOUT,
                f"QEMU of {self.name} did not answer {command} within {timeout_s:.0f} s",
                retryable=True,
            ) from error
        except ExecuteError as error:
            raise MicaError(Code.QEMU_FAILED, f"QEMU of {self.name} refused {command}: {error}") from error
        except QMPError as error:
            raise MicaError(Code.QEMU_FAILED, f"lost QEMU of {self.name} during {command}: {error}") from error

    async def send_descriptor(self, name: str, descriptor: int) -> None:
        """Hand an open file to QEMU under ``name`` (``getfd``); later commands refer to it by that name."""
        self._client.send_fd_scm(descriptor)
        await self.run("getfd", {"fdname": name})

    async def add_descriptor(self, descriptor: int, note: str) -> int:
        """Hand an open file to QEMU as a set of descriptors of its own (``add-fd``); returns the set's number.

        ``/dev/fdset/N`` opens it; ``query-fdsets`` tells ``note``.
        """
        self._client.send_fd_scm(descriptor)
        return int((await self.run("add-fd", {"opaque": note}))["fdset-id"])

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Events in order, ending when the connection ends. For one reader."""
        disconnected = asyncio.ensure_future(self._disconnected())
        following: asyncio.Future[Message] | None = None
        try:
            while True:
                following = asyncio.ensure_future(self._events.get())
                done, _ = await asyncio.wait({following, disconnected}, return_when=asyncio.FIRST_COMPLETED)
                if following not in done:
                    while not self._events.empty():
                        yield dict(await self._events.get())
                    return
                yield dict(following.result())
        finally:
            disconnected.cancel()
            if following is not None:
                following.cancel()

    async def _disconnected(self) -> None:
        while self._client.runstate.name == "RUNNING":
            await self._client.runstate_changed()

    async def close(self) -> None:
        """Idempotent; for one caller at a time at the library's side, so they queue here."""
        async with self._closing:
            if self._closed:
                return
            self._closed = True
            try:
                async with asyncio.timeout(5.0):
                    await self._client.disconnect()
            except (QMPError, OSError, EOFError, TimeoutError):
                return  # it was gone already: that is what closing wants
