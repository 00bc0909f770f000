"""``mica clone``."""

from __future__ import annotations

from typing import Annotated

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Flag, Hidden, Options, SnapshotArg, VmArg
from mica.client.vms import vm_id
from mica.model.errors import MicaError, invalid
from mica.model.views import VmClone


async def clone(
    vm: VmArg,
    /,
    *,
    name: str = "",
    snapshot: SnapshotArg = "",
    linked: Flag = False,
    full: Flag = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Make a stopped copy of a VM: of one that is stopped, or as it was at a snapshot. mica fork copies one that runs.

    Its MAC addresses are its own; hostname, machine id and keys become so when it first runs.

    Parameters
    ----------
    vm
        Name or id of the VM.
    name
        Name of the copy; one is made from the VM's by default.
    snapshot
        Copy the VM as it was at this snapshot, instead of as it is now.
    linked
        Its disks are layers over the VM's (the default): made at once, and they take what is changed.
    full
        Copy its disks: they need nothing of the VM's then.
    """
    if linked and full:
        raise invalid("a clone is linked or full, not both", hint="leave one of --linked and --full out")
    async with ctx.client() as client:
        accepted = await client.snapshots.clone(vm, VmClone(name=name, snapshot=snapshot, full=full))
        try:
            done = await ctx.wait(client, accepted.operations[0], cancel=True)
        except MicaError:
            if accepted.freeze is not None:  # where the VM could not be frozen, that is the reason
                await client.operations.wait(accepted.freeze.id)
            raise
        view = await client.vms.view(vm_id(done))
    kind = "a full copy" if full else "a linked copy"
    ctx.emit(view, lambda: f"{view.name} is {view.observed.state}, {kind} of {view.forked_from}")
