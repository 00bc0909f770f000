"""The agent's socket: one connection, one request at a time, every answer bounded in size and time.

Protocol facts are from QEMU's "QEMU Guest Agent Protocol Reference" (qemu-ga-ref). Requests carry no id, so they are
answered strictly in order; after connecting, and after any request whose answer was not awaited, the stream is in an
unknown state and ``guest-sync-delimited`` brings it back: the client sends the byte 0xFF and an integer, the agent
answers with 0xFF and the same integer, and everything before that is discarded.

What is sent before the guest has opened its side of the port may be dropped, so synchronising repeats its question.

States of the connection::

    closed ──connect──▶ unsynced ──sync──▶ ready ──timeout, cancel, stray bytes──▶ unsynced
       ▲                    │                │
       └──── violation, end of stream, failed sync
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mica.model.errors import Code, MicaError
from mica.model.units import MIB, Bytes, format_duration, format_size

SENTINEL = b"\xff"
DEFAULT_REPLY_LIMIT = Bytes(MIB)
MAX_STRAY = 64 * MIB
MAX_QUEUED = 256
SYNC_TIMEOUT_S = 5.0
_RESEND_S = (0.1, 0.2, 0.4, 0.8, 1.0)


class _SyncReply(msgspec.Struct):
    value: int = msgspec.field(name="return")


_SYNC_REPLY = msgspec.json.Decoder(_SyncReply)


class _Wire(asyncio.Protocol):
    """Bytes to lines. At most one waiter, of which ``_want`` lines are still due."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.synced = False
        self.heard_older_sync = False
        self._buffer = bytearray()
        self._lines: list[bytes] = []
        self._want = 0
        self._limit = 0
        self._stray = 0
        self._sync_ids: list[int] = []
        self._waiter: asyncio.Future[list[bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.fail(MicaError(Code.AGENT_UNAVAILABLE, "the connection to the guest agent ended", retryable=True))

    def fail(self, error: MicaError) -> None:
        """End the waiter, if there is one, with an error."""
        self.synced = False
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)

    def abort(self, error: MicaError) -> None:
        """End the waiter and the connection."""
        self.fail(error)
        if self.transport is not None:
            self.transport.abort()
            self.transport = None

    def abandon(self) -> None:
        """Nobody awaits the answers any more; what still arrives is dropped by the next sync."""
        self._waiter = None
        self.synced = False
        self._buffer.clear()
        self._lines = []
        self._want = 0

    def ask(self, payload: bytes, replies: int, limit: int) -> asyncio.Future[list[bytes]]:
        """Send requests; the future has one line for each of ``replies``, together at most ``limit`` bytes."""
        assert self.transport is not None
        assert self._waiter is None
        self._want, self._limit, self._lines = replies, limit, []
        self._buffer.clear()
        self._waiter = asyncio.get_running_loop().create_future()
        self.transport.write(payload)
        return self._waiter

    def begin_sync(self) -> asyncio.Future[list[bytes]]:
        self._sync_ids, self._stray, self.heard_older_sync = [], 0, False
        self._buffer.clear()
        self._waiter = asyncio.get_running_loop().create_future()
        self.send_sync()
        return self._waiter

    def send_sync(self) -> None:
        """Ask again, with a new number: only the answer to the newest leaves nothing behind it on the wire."""
        assert self.transport is not None
        self._sync_ids.append(secrets.randbits(48))
        request = {"execute": "guest-sync-delimited", "arguments": {"id": self._sync_ids[-1]}}
        self.transport.write(SENTINEL + msgspec.json.encode(request) + b"\n")

    @property
    def syncing(self) -> bool:
        return self._waiter is not None and not self.synced

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._waiter.done():
            self._drop(len(data))
        elif not self.synced:
            self._receive_sync(data)
        else:
            self._receive_reply(data)

    def _drop(self, count: int) -> None:
        self.synced = False
        self._stray += count
        if self._stray > MAX_STRAY:
            self.abort(_flood(MAX_STRAY))

    def _receive_reply(self, data: bytes) -> None:
        self._limit -= len(data)
        if self._limit < 0:
            self.abort(MicaError(Code.AGENT_FAILED, "the guest agent's reply is larger than this request can have"))
            return
        start = 0
        while self._want and (end := data.find(b"\n", start)) >= 0:
            self._buffer += data[start:end]
            start = end + 1
            line = bytes(self._buffer).lstrip(SENTINEL)
            self._buffer.clear()
            if line.strip():
                self._lines.append(line)
                self._want -= 1
        if self._want:
            self._buffer += data[start:]
            return
        waiter, self._waiter = self._waiter, None
        assert waiter is not None
        waiter.set_result(self._lines)
        if start < len(data):
            self._drop(len(data) - start)

    def _receive_sync(self, data: bytes) -> None:
        self._stray += len(data)
        if self._stray > MAX_STRAY:
            self.abort(_flood(MAX_STRAY))
            return
        self._buffer += data
        while True:
            mark = self._buffer.rfind(SENTINEL)
            if mark < 0:
                self._buffer.clear()
                return
            end = self._buffer.find(b"\n", mark)
            if end < 0:
                # A complete answer may precede an incomplete one, but the newest answer is always the last.
                del self._buffer[:mark]
                if len(self._buffer) > DEFAULT_REPLY_LIMIT:
                    self._buffer.clear()
                return
            line, rest = bytes(self._buffer[mark + 1 : end]), len(self._buffer) - end - 1
            self._buffer.clear()
            self._check_sync(line, rest)
            return

    def _check_sync(self, line: bytes, rest: int) -> None:
        try:
            value = _SYNC_REPLY.decode(line).value
        except msgspec.MsgspecError:
            return  # not an answer to a sync: the next one follows its own sentinel
        if value in self._sync_ids[:-1]:
            self.heard_older_sync = True
        if not self._sync_ids or value != self._sync_ids[-1] or rest:
            return
        waiter, self._waiter = self._waiter, None
        assert waiter is not None
        self.synced, self._stray = True, 0
        waiter.set_result([line])


def _flood(limit: int) -> MicaError:
    return MicaError(Code.AGENT_FAILED, f"the guest agent sent {format_size(limit)} that nobody had asked for")


class AgentChannel:
    """Requests and answers with the agent behind one UNIX socket (QEMU chardev ``socket,server=on``).

    Connects at first use and again after a failure. Safe for use by many tasks of one event loop: requests queue.
    ``guest`` names the guest in messages.
    """

    def __init__(self, path: Path, *, guest: str = "the guest", sync_timeout_s: float = SYNC_TIMEOUT_S) -> None:
        self.guest = guest
        self._path = path
        self._sync_timeout_s = sync_timeout_s
        self._wire: _Wire | None = None
        self._lock = asyncio.Lock()
        self._queued = 0
        self._port_open: bool | None = None
        self._port_changed = asyncio.Event()
        self._closed = False

    @property
    def ready(self) -> bool:
        """Synchronised, so that a request is answered in the agent's own time."""
        return self._wire is not None and self._wire.transport is not None and self._wire.synced

    def port_opened(self) -> None:
        """QMP said ``VSERPORT_CHANGE`` with ``open`` true: whoever waits tries at once."""
        self._port_open = True
        self._port_changed.set()
        if self._wire is not None and self._wire.transport is not None and self._wire.syncing:
            self._wire.send_sync()

    def port_closed(self) -> None:
        """QMP said ``VSERPORT_CHANGE`` with ``open`` false: the agent is gone, requests under way fail."""
        self._port_open = False
        self._port_changed.set()
        if self._wire is not None:
            self._wire.fail(self._not_running())

    def moved(self, path: Path) -> None:
        """The guest goes on in another process: connect there from now on."""
        self._path = path
        if self._wire is not None:
            self._wire.abort(self._silent())
            self._wire = None

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when the agent answers. Raises ``agent-unavailable`` after ``timeout_s``."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        pause = 0.05
        while True:
            self._port_changed.clear()
            try:
                await self.request([], limit=0, deadline=deadline, command="guest-sync-delimited")
            except MicaError as error:
                left = deadline - loop.time()
                if left <= 0 or self._closed:
                    raise MicaError(
                        Code.AGENT_UNAVAILABLE,
                        f"the agent of {self.guest} did not answer within {format_duration(timeout_s)}",
                        hint="is qemu-guest-agent installed and running in the guest?",
                        retryable=True,
                    ) from error
                try:
                    async with asyncio.timeout(left if self._port_open is False else min(pause, left)):
                        await self._port_changed.wait()
                except TimeoutError:
                    pause = min(pause * 2, 2.0)
            else:
                return

    async def request(self, payloads: Sequence[bytes], *, limit: int, deadline: float, command: str) -> list[bytes]:
        """Send requests together and return their answers in order, as undecoded JSON lines.

        ``deadline`` is in the loop's time; ``limit`` bounds the answers in bytes. Raises ``agent-unavailable`` (no
        connection, no sync), ``agent-failed`` (an answer out of bounds), ``timeout``, ``busy``.
        """
        if self._closed:
            raise MicaError(Code.AGENT_UNAVAILABLE, f"the agent channel of {self.guest} is closed")
        if self._queued >= MAX_QUEUED:
            raise MicaError(
                Code.BUSY, f"{MAX_QUEUED} requests wait for the agent of {self.guest} already", retryable=True
            )
        self._queued += 1
        wire: _Wire | None = None
        try:
            async with asyncio.timeout_at(deadline):
                async with self._lock:
                    wire = await self._ready_wire(deadline)
                    return await self._exchange(wire, payloads, limit) if payloads else []
        except TimeoutError:
            if wire is None:
                raise self._silent() from None
            raise MicaError(
                Code.TIMEOUT,
                f"the agent of {self.guest} did not answer {command} in time",
                hint="the guest may be overloaded or hung; look at its console",
                retryable=True,
                details={"command": command},
            ) from None
        finally:
            self._queued -= 1

    async def _exchange(self, wire: _Wire, payloads: Sequence[bytes], limit: int) -> list[bytes]:
        waiter = wire.ask(b"".join(payloads), len(payloads), limit)
        try:
            return await waiter
        except asyncio.CancelledError:
            wire.abandon()  # the answer is still to come: the next request synchronises first
            raise

    async def _ready_wire(self, deadline: float) -> _Wire:
        if self._port_open is False:
            raise self._not_running()
        wire = self._wire
        if wire is None or wire.transport is None:
            wire = self._wire = await self._connect()
        if not wire.synced:
            await self._sync(wire, deadline)
        return wire

    async def _connect(self) -> _Wire:
        loop = asyncio.get_running_loop()
        try:
            _, wire = await loop.create_unix_connection(_Wire, str(self._path))
        except OSError as error:
            raise MicaError(
                Code.AGENT_UNAVAILABLE,
                f"there is no agent port of {self.guest} to connect to",
                hint="is the VM running?",
                retryable=True,
            ) from error
        return wire

    async def _sync(self, wire: _Wire, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        end = min(deadline, loop.time() + self._sync_timeout_s)
        waiter = wire.begin_sync()
        step = 0
        try:
            while not waiter.done():
                await asyncio.wait([waiter], timeout=max(0.0, min(end - loop.time(), _RESEND_S[step])))
                if waiter.done():
                    break
                if loop.time() >= end:
                    wire.abort(self._silent())
                elif not wire.heard_older_sync:
                    wire.send_sync()
                    step = min(step + 1, len(_RESEND_S) - 1)
            waiter.result()
        except asyncio.CancelledError:
            wire.abandon()
            if loop.time() >= end:
                wire.abort(self._silent())
            raise

    def _silent(self) -> MicaError:
        return MicaError(
            Code.AGENT_UNAVAILABLE,
            f"the agent of {self.guest} does not answer",
            hint="is qemu-guest-agent installed and running in the guest?",
            retryable=True,
        )

    def _not_running(self) -> MicaError:
        return MicaError(
            Code.AGENT_UNAVAILABLE,
            f"no agent is running in {self.guest}",
            hint="install and start qemu-guest-agent in the guest, or wait until it has booted",
            retryable=True,
        )

    def reject(self, message: str, **details: Any) -> MicaError:
        """The agent broke the protocol: close the connection, and return the error to raise."""
        error = MicaError(
            Code.AGENT_FAILED,
            f"the agent of {self.guest} {message}",
            hint="the agent in the guest is broken or not to be trusted",
            details=details,
        )
        if self._wire is not None:
            self._wire.abort(error)
            self._wire = None
        return error

    async def close(self) -> None:
        """End the connection and whoever waits; the channel cannot be used again."""
        self._closed = True
        self._port_changed.set()
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abort(MicaError(Code.AGENT_UNAVAILABLE, f"the agent channel of {self.guest} was closed"))
