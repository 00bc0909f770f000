"""A WebSocket that is opened again where it broke off: consoles and commands outlive a restart of the daemon.

connecting ──► open ──► ended          the daemon closed it with 1000: all is said
    ▲            │└───► refused        closed with 4000 + an HTTP status: a problem
    └────────────┘ lost                anything else: again, for up to 30 s
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from websockets.exceptions import ConnectionClosed

from mica.client.transport import Params, Transport, lost
from mica.model.errors import Code, MicaError

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

RECONNECT_S = 30.0
_SEND_TIMEOUT_S = 60.0

# Close codes 4000 to 4999 are private (RFC 6455 section 7.4.2): the daemon sends 4000 + the HTTP status, and a reason
# that begins with the error's code.
_PRIVATE = 4000
_NORMAL = 1000


def _refusal(close_code: int, reason: str) -> MicaError:
    word, _, message = reason.partition(": ")
    try:
        return MicaError(Code(word), message or word)
    except ValueError:
        return MicaError(Code.INTERNAL, reason or f"the daemon closed the connection with {close_code}")


class Link:
    """``where`` gives the query for (re)opening: from which offset on."""

    def __init__(self, transport: Transport, path: str, where: Callable[[], Params]) -> None:
        self._transport = transport
        self._path = path
        self._where = where
        self._socket: ClientConnection | None = None
        self._open = asyncio.Event()
        self._ended = False
        self.reconnects = 0

    async def open(self) -> None:
        """Raises what the daemon refuses it with, ``daemon-unreachable`` and ``timeout``."""
        self._socket = await self._transport.websocket(self._path, self._where())
        self._open.set()

    async def close(self) -> None:
        self._ended = True
        self._open.set()
        if self._socket is not None:
            await self._socket.close()

    async def receive(self) -> str | bytes | None:
        """The next frame, from a new connection if the old one was lost; ``None`` at the end."""
        while not self._ended:
            assert self._socket is not None
            try:
                return await self._socket.recv()
            except ConnectionClosed as error:
                self._open.clear()
                if not self._lost(error):
                    self._ended = True
                    self._open.set()
                    return None
                await self._reopen()
        return None

    def _lost(self, error: ConnectionClosed) -> bool:
        """Whether it was lost, and not ended. Raises the problem that it was closed with."""
        if self._ended:
            return False
        close = error.rcvd
        if close is None:
            return True
        if close.code >= _PRIVATE:
            self._ended = True
            self._open.set()
            raise _refusal(close.code, close.reason) from error
        return close.code != _NORMAL

    async def _reopen(self) -> None:
        give_up, pause = time.monotonic() + RECONNECT_S, 0.1
        while not self._ended:
            try:
                await self._transport.start_if_absent()
                await self.open()
            except MicaError as error:
                if error.code not in (Code.DAEMON_UNREACHABLE, Code.TIMEOUT) or time.monotonic() > give_up:
                    self._ended = True
                    self._open.set()
                    raise
            else:
                self.reconnects += 1
                return
            # Nothing signals that a daemon is back.
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)

    async def send(self, data: bytes, *, again: bool) -> None:
        """Send a frame; if the connection breaks at it, ``again`` on the next one, else ``daemon-unreachable``.

        Waits up to a minute for the daemon to take it.
        """
        try:
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                while True:
                    await self._open.wait()
                    if self._ended or self._socket is None:
                        return
                    try:
                        await self._socket.send(data)
                    except ConnectionClosed as error:
                        # At its end nobody takes anything any more; whoever receives is told how it ended.
                        if error.rcvd is not None and (error.rcvd.code == _NORMAL or error.rcvd.code >= _PRIVATE):
                            return
                        if not again:
                            raise lost(f"WebSocket {self._path}") from error
                        self._open.clear()
                    else:
                        return
        except TimeoutError as error:
            raise MicaError(
                Code.TIMEOUT, f"the guest has taken no input for {_SEND_TIMEOUT_S:g} s", retryable=True
            ) from error
