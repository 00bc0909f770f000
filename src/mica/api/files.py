"""Files in and out of a guest, as tar streams of any length: nothing is held in memory but what is on its way."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from litestar import Request

from mica.model.errors import invalid

MEDIA_TYPE = "application/x-tar"


async def upload(request: Request[Any, Any, Any]) -> AsyncIterator[bytes]:
    """The body as it comes. Raises ``invalid`` when the client goes before its end: half an archive is none."""
    while True:
        event: Any = await request.receive()
        if event["type"] == "http.disconnect":
            raise invalid("the upload broke off before its end", hint="send it again")
        if event["body"]:
            yield event["body"]
        if not event.get("more_body", False):
            return


class Download:
    """A tar stream on its way out. The first chunk is awaited before anything is said, so that refusals are answers."""

    endless = False

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source: Any = source
        self._first = b""

    async def open(self) -> None:
        """Raises what the engine refuses it with."""
        try:
            self._first = await anext(self._source, b"")
        except BaseException:
            await self.close()
            raise

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body; an error in the middle cuts the connection."""
        if self._first:
            yield self._first
        async for chunk in self._source:
            yield chunk

    async def close(self) -> None:
        """Stop reading in the guest."""
        await self._source.aclose()
