"""Server-sent events (WHATWG HTML, section 9.2): changes as they happen, resumable after a gap.

Each event's ``id`` is its revision, so a client that comes back with ``Last-Event-ID`` (or ``?since=``) misses nothing.
A revision that is no longer kept is answered 410: list again, and go on from the list's ``revision``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec

from mica.api.facade import Facade
from mica.model.errors import Code, MicaError, invalid
from mica.model.views import Event

MEDIA_TYPE = "text/event-stream"
PING_S = 15.0
_RECONNECT_MS = 1000
# How long the answer's first line waits for the engine's verdict on an old revision. Only an engine that has nothing
# to tell of the past makes it wait that long.
_VERDICT_S = 0.25


def start_of(since: int | None, last_event_id: str | None) -> int | None:
    """Where to begin: what the client saw last wins, because a reconnecting browser repeats its first URL."""
    if last_event_id is None or last_event_id == "":
        return since
    if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) <= 18):
        raise invalid(f"Last-Event-ID {last_event_id!r} is no revision", hint="send the id of the last event seen")
    return int(last_event_id)


def format_event(event: Event) -> bytes:
    """JSON has no raw line breaks, so one ``data`` line always suffices."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.revision, event.kind.encode(), msgspec.json.encode(event))


class EventStream:
    """Events of one client, with a ping when nothing happens, so that both sides notice a dead connection."""

    endless = True

    def __init__(self, source: AsyncIterator[Event], revision: int, *, ping_s: float = PING_S) -> None:
        self._source = source
        self._revision = revision
        self._ping_s = ping_s
        self._next: asyncio.Future[Event] | None = None

    async def open(self, *, verdict: bool) -> None:
        """Begin to listen; raises ``gone`` when the engine refuses the revision (waits for it if ``verdict``)."""
        self._next = asyncio.ensure_future(anext(self._source))
        if verdict:
            await asyncio.wait([self._next], timeout=_VERDICT_S)
        if self._next.done() and isinstance(self._next.exception(), MicaError):
            future, self._next = self._next, None
            await self.close()
            future.result()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body. Ends when closed, and when the reader was too slow: coming back, it is told so by 410."""
        try:
            yield b"retry: %d\nid: %d\n\n" % (_RECONNECT_MS, self._revision)
            while True:
                self._next = self._next or asyncio.ensure_future(anext(self._source))
                done, _ = await asyncio.wait([self._next], timeout=self._ping_s)
                if not done:
                    yield b": ping\n\n"
                    continue
                future, self._next = self._next, None
                yield format_event(future.result())
        except MicaError as error:
            if error.code is not Code.GONE:
                raise
        finally:
            await self.close()

    async def close(self) -> None:
        """Stop listening, and wait until the engine has let go."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
            self._next = None
        closer: Any = getattr(self._source, "aclose", None)
        if closer is not None:
            await closer()


async def follow(engine: Facade, since: int | None) -> EventStream:
    """Open a stream of events after ``since`` (``None``: from now). Raises ``gone``."""
    revision = await engine.revision()
    start = revision if since is None else since
    if start > revision:
        raise MicaError(
            Code.GONE,
            f"revision {start} has not happened here yet (this is {revision})",
            hint="the daemon's state is another one than before: list again, and go on from the list's revision",
            details={"revision": revision},
        )
    stream = EventStream(engine.events(start), start)
    await stream.open(verdict=start < revision)
    return stream
