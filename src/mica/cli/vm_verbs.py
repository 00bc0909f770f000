"""The verbs that take VMs and little else: start, stop, restart, pause, suspend, resume, delete, restore."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated

from mica.cli.context import Context, for_each
from mica.cli.options import DEFAULTS, Duration, Flag, Hidden, Options, VmArg
from mica.client import Client
from mica.client.vms import vm_id
from mica.model.errors import Code, MicaError
from mica.model.operation import Operation

Submit = Callable[[Client, str], Awaitable[Operation]]


async def start(
    vm: VmArg,
    /,
    *vms: VmArg,
    paused: Flag = False,
    overcommit: Flag = False,
    last_valid: Flag = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Start VMs. One that is suspended goes on where it was.

    Parameters
    ----------
    vm
        Name or id of the VM.
    vms
        Further VMs.
    paused
        Start with the vCPUs held: mica vm resume lets them go.
    overcommit
        Insist where the host's memory does not suffice.
    last_valid
        Where damage keeps it from starting, go back to its last valid snapshot; what is damaged is kept aside.
    """

    def submit(client: Client, ref: str) -> Awaitable[Operation]:
        return client.vms.start(ref, paused=paused, overcommit=overcommit, last_valid=last_valid, wait=False)

    return await _verb(ctx, (vm, *vms), submit, cancel=True)


async def stop(
    vm: VmArg,
    /,
    *vms: VmArg,
    force: Flag = False,
    timeout: Duration | None = None,
    discard: Flag = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Ask guests to shut down, and force those that do not.

    Parameters
    ----------
    vm
        Name or id of the VM.
    vms
        Further VMs.
    force
        Do not ask: like pulling the plug.
    timeout
        How long the guest may take before it is forced, for example 90s; the VM's own setting by default.
    discard
        Suspended VMs: give up what they had in memory, as in a power cut.
    """
    if discard:
        return await _verb(ctx, (vm, *vms), lambda c, ref: c.vms.discard(ref, wait=False))
    return await _verb(ctx, (vm, *vms), lambda c, ref: c.vms.stop(ref, force=force, timeout_s=timeout, wait=False))


async def restart(
    vm: VmArg,
    /,
    *vms: VmArg,
    force: Flag = False,
    timeout: Duration | None = None,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Stop VMs and start them again. Changes that were pending take effect.

    Parameters
    ----------
    vm
        Name or id of the VM.
    vms
        Further VMs.
    force
        Do not ask the guest: like pulling the plug.
    timeout
        How long the guest may take before it is forced, for example 90s; the VM's own setting by default.
    """
    return await _verb(ctx, (vm, *vms), lambda c, ref: c.vms.restart(ref, force=force, timeout_s=timeout, wait=False))


async def pause(vm: VmArg, /, *vms: VmArg, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> int:
    """Hold VMs where they are. Their memory stays; their clocks stop.

    Parameters
    ----------
    vm
        Name or id of the VM.
    vms
        Further VMs.
    """
    return await _verb(ctx, (vm, *vms), lambda c, ref: c.vms.pause(ref, wait=False))


async def suspend(vm: VmArg, /, *vms: VmArg, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> int:
    """Put the memory of VMs on disk and end them. They go on exactly there, also after the host has been off.

    mica vm resume and mica vm start let them go on; mica vm stop --discard gives their memory up.

    Parameters
    ----------
    vm
        Name or id of the VM.
    vms
        Further VMs.
    """
    return await _verb(ctx, (vm, *vms), lambda c, ref: c.vms.suspend(ref, wait=False), cancel=True)


async def resume(vm: VmArg, /, *vms: VmArg, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> int:
    """Let paused and suspended VMs run on.

    Parameters
    ----------
    vm
        Name or id of the VM.
    vms
        Further VMs.
    """
    return await _verb(ctx, (vm, *vms), lambda c, ref: c.vms.resume(ref, wait=False))


async def delete(
    vm: VmArg,
    /,
    *vms: VmArg,
    purge: Flag = False,
    force: Flag = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Put VMs into the trash, or delete them at once.

    From the trash mica vm restore brings them back until they expire.

    Parameters
    ----------
    vm
        Name or id of the VM.
    vms
        Further VMs.
    purge
        Delete for good, at once.
    force
        Stop it first if it runs.
    """
    return await _verb(ctx, (vm, *vms), lambda c, ref: c.vms.delete(ref, purge=purge, force=force, wait=False))


async def restore(
    vm: VmArg,
    /,
    *,
    name: str = "",
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Bring a VM back from the trash.

    Parameters
    ----------
    vm
        Name or id of the VM: see mica vm list --trashed.
    name
        Its new name, where the old one has been taken meanwhile.
    """
    return await _verb(ctx, (vm,), lambda c, ref: c.vms.restore(ref, name=name, wait=False))


async def _verb(ctx: Context, refs: Sequence[str], submit: Submit, *, cancel: bool = False) -> int:
    async with ctx.client() as client:
        return await for_each(
            ctx,
            refs,
            lambda ref: ctx.perform(client, submit(client, ref), cancel=cancel),
            lambda operation: _outcome(client, operation),
        )


async def _outcome(client: Client, operation: Operation) -> str:
    """What became of it: the state that is seen now, with its reason."""
    name = operation.target_name
    try:
        view = await client.vms.view(vm_id(operation))
    except MicaError as error:
        if error.code in (Code.NOT_FOUND, Code.GONE):
            return f"{name} is deleted for good"
        raise
    observed = view.observed
    if operation.result.get("already"):  # its reason is about what was done earlier
        return f"{view.name} is {observed.state} already"
    text = f"{view.name} is {observed.state}" + (f": {observed.reason}" if observed.reason else "")
    if back := operation.result.get("went_back_to"):
        text += f"\nit went back to snapshot {back}; its damaged state is kept as {operation.result['kept_aside']}"
    return text
