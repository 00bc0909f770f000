"""WebSockets: what every route of that kind needs. Frames are binary, and nothing is queued without bound.

Backwards, each frame waits for room in its own connection's buffer, so a slow watcher holds up only itself. Forwards,
one frame is read at a time, and the next when it has been dealt with.

Before it is accepted, a refusal is an ordinary answer with problem details. Afterwards it is a close frame: its code is
4000 + the HTTP status, its reason begins with the error's code. 1012 says that the daemon is closing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from litestar import WebSocket
from litestar.exceptions import WebSocketDisconnect

from mica.api.gate import refuse
from mica.api.problems import internal, note
from mica.api.waiting import CutShort, first
from mica.model.errors import MicaError, invalid

Socket = WebSocket[Any, Any, Any]

NORMAL, RESTARTING = 1000, 1012
# RFC 6455 section 5.5: a control frame carries 125 bytes, two of them the code.
_REASON_BYTES = 123


class Disconnected(ConnectionError):  # noqa: N818 - nobody's error
    """The client has gone."""


def offset_of(socket: Socket, name: str) -> int | None:
    """A byte offset from the query. Raises ``invalid``."""
    raw = socket.query_params.get(name)
    if raw is None:
        return None
    if not (raw.isascii() and raw.isdigit() and len(raw) <= 18):
        raise invalid(f"query parameter {name!r}: {raw!r} is no offset", hint="offsets count bytes from 0")
    return int(raw)


def check_query(socket: Socket, *allowed: str) -> None:
    """Refuse query parameters that the route does not have. Raises ``invalid``."""
    for name in socket.query_params:
        if name not in allowed:
            raise invalid(f"unknown query parameter {name!r}", hint=f"here are: {', '.join(allowed)}")


class Wire:
    """One connection, with everything that says "the client has gone" turned into :class:`Disconnected`."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        self.accepted = False

    async def accept(self) -> None:
        await self._socket.accept()
        self.accepted = True

    async def receive(self) -> bytes:
        """The next binary frame. Raises ``invalid`` for a text frame."""
        try:
            message: Any = await self._socket.receive()
        except WebSocketDisconnect as error:
            raise Disconnected from error
        if message["type"] != "websocket.receive":
            raise Disconnected
        data: bytes | None = message.get("bytes")
        if data is None:
            raise invalid("a text frame came", hint="send binary frames")
        return data

    async def send(self, data: bytes) -> None:
        """Send a binary frame, as soon as there is room for it."""
        await self._send({"type": "websocket.send", "bytes": data, "text": None})

    async def send_text(self, data: str) -> None:
        await self._send({"type": "websocket.send", "bytes": None, "text": data})

    async def close(self, code: int, reason: str = "") -> None:
        await self._send({"type": "websocket.close", "code": code, "reason": reason})

    async def fail(self, error: MicaError) -> None:
        """Refuse what was not accepted yet; close what was."""
        note(self._socket.scope, code=str(error.code))
        if self.accepted:
            text = f"{error.code}: {error.message}".encode()[:_REASON_BYTES]
            await self.close(4000 + error.info.http_status, text.decode(errors="ignore"))
        else:
            await refuse(self._socket.scope, self._socket.send, error)

    async def _send(self, message: Any) -> None:
        try:
            await self._socket.send(message)
        except (WebSocketDisconnect, OSError) as error:
            raise Disconnected from error


@asynccontextmanager
async def answering(socket: Socket) -> AsyncIterator[Wire]:
    """Turn what is raised inside into an answer or a close frame."""
    wire = Wire(socket)
    try:
        yield wire
    except Disconnected:
        note(socket.scope, aborted=True)
    except Exception as error:  # noqa: BLE001 - told to the client as a problem, and to the log
        if not isinstance(error, MicaError):
            note(socket.scope, exc_info=error)
            error = internal(socket.scope["state"].get("request_id", ""))
        with suppress(Disconnected):
            await wire.fail(error)


async def converse(
    wire: Wire, closing: asyncio.Event, outwards: Coroutine[Any, Any, None], inwards: Coroutine[Any, Any, None]
) -> None:
    """Accept, and run both directions until ``outwards`` ends, the client goes, or the server closes.

    What either raises is raised here.
    """
    try:
        await wire.accept()
        await first(outwards, inwards, closing.wait())
        await wire.close(NORMAL)
    except CutShort:
        await wire.close(RESTARTING, "the daemon is closing")
    finally:
        outwards.close()
        inwards.close()
