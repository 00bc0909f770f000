"""``mica events``."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Annotated, Any

import msgspec

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Hidden, Options
from mica.cli.text import clean, moment
from mica.model.views import Event


async def events(
    *,
    since: int | None = None,
    limit: int | None = None,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Follow what changes, one line each, until Ctrl-C. With --json each line is one JSON document.

    Parameters
    ----------
    since
        Begin after this revision; from now on by default.
    limit
        End after so many.
    """
    left = limit
    async with ctx.client() as client, aclosing(client.events(since)) as stream:
        async for event in stream:
            line = msgspec.json.encode(event).decode() if ctx.json else describe(event)
            ctx.world.stdout.write(line + "\n")
            ctx.world.stdout.flush()
            left = None if left is None else left - 1
            if left is not None and left <= 0:
                return


def describe(event: Event) -> str:
    """One event on one line."""
    thing: dict[str, Any] = event.object if isinstance(event.object, dict) else {}
    if event.object is None:
        what = f"{event.id} is gone"
    elif event.kind == "vm":
        observed = thing.get("observed", {})
        what = f"{thing.get('name', event.id)} {observed.get('state', '')} {observed.get('reason', '')}"
    elif event.kind == "operation":
        what = (
            f"{thing.get('verb', '')} {thing.get('target_name', '')} {thing.get('state', '')} {thing.get('step', '')}"
        )
    elif event.kind == "snapshot":
        snapshot = thing.get("snapshot", {})
        what = f"{snapshot.get('name', event.id)} of {snapshot.get('vm_name', '')} {snapshot.get('state', '')}"
    elif event.kind == "image":
        what = str(thing.get("image", {}).get("name", event.id))
    else:
        what = event.id
    return clean(f"{event.revision}  {moment(time.time())}  {event.kind}  {what}".rstrip())
