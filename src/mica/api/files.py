"""Files in and out of a guest, as tar streams of any length: nothing is held in memory but what is on its way."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from litestar import Request

from mica.model.errors import MicaError, invalid
from mica.model.units import MIB

MEDIA_TYPE = "application/x-tar"
# So much of an upload that was refused is still read, because a client that is cut off may miss the answer.
MAX_DRAIN = 8 * MIB


class Upload:
    """The body as it comes. Raises ``invalid`` when the client goes before its end: half an archive is none."""

    def __init__(self, request: Request[Any, Any, Any]) -> None:
        self._request = request
        self._ended = False

    async def _next(self) -> bytes:
        event: Any = await self._request.receive()
        if event["type"] == "http.disconnect":
            self._ended = True
            raise invalid("the upload broke off before its end", hint="send it again")
        self._ended = not event.get("more_body", False)
        data: bytes = event["body"]
        return data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while not self._ended:
            data = await self._next()
            if data:
                yield data

    async def drain(self) -> bool:
        """Read what is left of it and nobody wants, if it is not long: whether that was all."""
        left = MAX_DRAIN
        try:
            while not self._ended and left > 0:
                left -= len(await self._next())
        except MicaError:
            return True
        return self._ended


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
