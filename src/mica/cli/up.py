"""``mica up``."""

from __future__ import annotations

import asyncio
from typing import Annotated

from mica.cli.context import Context
from mica.cli.daemon_verbs import run
from mica.cli.options import DEFAULTS, Hidden, Options
from mica.client.daemon import answers


def up(
    *arguments: str,
    listen: str | None = None,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Run the daemon in the foreground and print its addresses. Ctrl-C stops it; VMs live on.

    Parameters
    ----------
    arguments
        After --: further settings of the daemon; see mica daemon run -- --help.
    listen
        Serve the API on this loopback ADDRESS:PORT too, with the token in MICA_HOME/token.
    """
    place = ctx.place()
    if not asyncio.run(answers(place)):  # else the daemon that is there is what this one will have to say
        ctx.say(f"running the daemon of {place.home}; Ctrl-C stops it, VMs live on")
        ctx.say(f"its API is at unix://{place.socket}" + (f" and http://{listen}" if listen else ""))
    return run(*arguments, listen=listen, options=options, ctx=ctx)
