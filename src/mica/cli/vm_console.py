"""``mica vm console``."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Annotated

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Flag, Hidden, Options, VmArg
from mica.cli.streams import EscapeKeys, chunks, raw_terminal
from mica.client.console import Console
from mica.client.together import alongside
from mica.model.errors import invalid

HELP = "Ctrl-] q leaves, Ctrl-] Ctrl-] sends Ctrl-], Ctrl-] ? shows this"


async def console(
    vm: VmArg,
    /,
    *,
    read_only: Flag = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Sit at a VM's serial console: first what it said last, then live. Several may watch and type at once.

    Ctrl-] q leaves, Ctrl-] ? helps.

    Parameters
    ----------
    vm
        Name or id of the VM.
    read_only
        Watch, and type nothing. Ctrl-C leaves.
    """
    if ctx.json:
        raise invalid("a console is no JSON document", hint="see: mica vm log --json")
    fd = None if read_only else ctx.world.stdin_fd()
    terminal = fd is not None and ctx.world.is_terminal(ctx.world.stdin)
    async with ctx.client() as client:
        handle = await client.vms.get(vm)
        async with handle.console() as serial:
            ctx.say(f"the console of {handle.name}; " + (HELP if terminal else "Ctrl-C leaves"))
            with ExitStack() as stack:
                if terminal and fd is not None:
                    stack.callback(ctx.world.write_bytes, b"\x1b[0m\n")
                    stack.enter_context(raw_terminal(fd))
                await _talk(ctx, serial, fd, terminal=terminal)
    if serial.missed:
        ctx.say(f"{serial.missed} bytes were gone before they could be shown: see mica vm log {handle.name}")


async def _talk(ctx: Context, serial: Console, fd: int | None, *, terminal: bool) -> None:
    """Until the daemon ends the console or the user leaves."""

    async def show() -> None:
        async for data in serial:
            ctx.world.write_bytes(data)

    if fd is None:
        await show()
    elif terminal:
        # Whoever leaves first, the user or the daemon, ends both.
        typing = asyncio.ensure_future(_type_keys(ctx, serial, fd))
        showing = asyncio.ensure_future(show())
        try:
            await asyncio.wait([typing, showing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (typing, showing):
                task.cancel()
            outcomes = await asyncio.gather(typing, showing, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
    else:
        await alongside(show(), _type_all(serial, fd))


async def _type_all(serial: Console, fd: int) -> None:
    async for data in chunks(fd):
        await serial.write(data)


async def _type_keys(ctx: Context, serial: Console, fd: int) -> None:
    keys = EscapeKeys()
    async for data in chunks(fd):
        typed, commands = keys.feed(data)
        if typed:
            await serial.write(typed)
        for command in commands:
            if command == "q":
                return
            ctx.world.write_bytes(f"\r\nmica: {HELP}\r\n".encode(), error=True)
