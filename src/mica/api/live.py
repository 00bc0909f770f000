"""A response whose body has no known end: sent as it comes, ended when the client goes or the server closes.

Litestar's own streaming works through cancel scopes that cancel clean-up as well; this one does not, so that whatever
feeds a stream is always closed properly. A slow reader holds up only itself: each chunk waits for room in the
connection's buffer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Protocol

from litestar import Request, Response
from litestar.response.base import ASGIResponse

from mica.api.waiting import CutShort, first

if TYPE_CHECKING:
    from litestar import Litestar
    from litestar.types import Receive, Scope, Send


class Source(Protocol):
    """What feeds a stream. An ``endless`` one has no end of its own: cut short, it is still whole."""

    endless: bool

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body. An exception cuts the connection, so that the client notices."""

    async def close(self) -> None:
        """Let go of everything; called in every case, perhaps before the first chunk."""


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Body(ASGIResponse):
    _should_set_content_length = False

    def __init__(self, source: Source, closing: asyncio.Event, **options: Any) -> None:
        super().__init__(**options)
        self._source = source
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.close()

    async def send_body(self, send: Send, receive: Receive) -> None:
        # Cut short, a body has no end: the server drops the connection, and the client knows.
        with suppress(CutShort):
            await first(self._pump(send), _gone(receive), self._closing.wait())
            return
        if self._source.endless:
            with suppress(CutShort):
                await first(self._end(send), _gone(receive), timeout_s=0.2)

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._source.chunks()) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._end(send)

    @staticmethod
    async def _end(send: Send) -> None:
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Live(Response[bytes]):
    """Streams ``source`` until it ends, the client goes, or ``closing`` is set."""

    def __init__(
        self, source: Source, closing: asyncio.Event, *, media_type: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(b"", media_type=media_type)
        self._source = source
        self._closing = closing
        self._headers = headers or {}

    def to_asgi_response(self, app: Litestar | None, request: Request[Any, Any, Any], **_options: Any) -> ASGIResponse:
        return _Body(self._source, self._closing, headers=self._headers, media_type=self.media_type, status_code=200)
