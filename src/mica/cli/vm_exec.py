"""``mica vm exec``."""

from __future__ import annotations

from typing import Annotated

from mica.cli.context import Context
from mica.cli.guest import NO_GUEST_OPTIONS, GuestOptions, run_in_guest
from mica.cli.options import DEFAULTS, Hidden, Options, VmArg


async def exec_(
    vm: VmArg,
    command: str,
    /,
    *arguments: str,
    how: GuestOptions = NO_GUEST_OPTIONS,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Run a command in a guest: mica vm exec VM -- COMMAND…

    Its output comes live, its exit status becomes ours. Ctrl-C is passed on to it; a second one kills it.

    Parameters
    ----------
    vm
        Name or id of the VM.
    command
        The program. No shell is involved: for one, write sh -c '…'.
    arguments
        Its arguments.
    """
    async with ctx.client() as client:
        handle = await client.vms.get(vm)
        return await run_in_guest(ctx, handle, (command, *arguments), how)
