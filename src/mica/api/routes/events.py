"""Changes as they happen."""

from __future__ import annotations

from typing import Annotated, Any

from litestar import get
from litestar.params import HeaderParameter, QueryParameter

from mica.api import events
from mica.api.lifetime import LifetimeDep
from mica.api.live import Live
from mica.api.params import EngineDep


@get(
    "/v1/events",
    summary="Follow changes (server-sent events)",
    operation_id="event_follow",
    media_type="text/event-stream",
)
async def follow(
    engine: EngineDep,
    lifetime: LifetimeDep,
    since: Annotated[int | None, QueryParameter(ge=0, le=2**53, description="A revision; left out: from now")] = None,
    last_event_id: Annotated[str | None, HeaderParameter(name="Last-Event-ID", description="Wins over `since`")] = None,
) -> Live:
    stream = await events.follow(engine, events.start_of(since, last_event_id))
    headers = {"Cache-Control": "no-store"}
    return Live(stream, lifetime.closing, media_type=events.MEDIA_TYPE, headers=headers)


HANDLERS: list[Any] = [follow]
