"""``mica snapshot create|restore|delete|rename|describe|protect|verify``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated

from mica.cli.context import Context, for_each
from mica.cli.options import DEFAULTS, Flag, Hidden, Options, SnapshotArg, VmArg
from mica.cli.text import age, size
from mica.client.snapshots import verdict
from mica.client.vms import vm_id
from mica.model.operation import Operation
from mica.model.snapshot import SnapshotKind
from mica.model.views import SnapshotCreate, SnapshotRestore, SnapshotSet, SnapshotView


async def create(
    vm: VmArg,
    name: str = "",
    /,
    *,
    no_memory: Flag = False,
    quiesce: Flag = False,
    description: str = "",
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Take a snapshot of a VM, while it runs or not: all its disks, its settings, and its memory where it has one.

    A VM that runs goes on after a moment. The snapshot is complete, and the command ends, when all of it is on disk.

    Parameters
    ----------
    vm
        Name or id of the VM.
    name
        Name of the snapshot; one is made up by default.
    no_memory
        Disks and settings only: restored, the VM is stopped.
    quiesce
        Have the guest's agent freeze the file systems for the moment.
    description
        What it is for.
    """
    body = SnapshotCreate(name=name, memory=not no_memory, quiesce=quiesce, description=description)
    async with ctx.client() as client:
        operation = await ctx.perform(client, client.snapshots.create(vm, body, wait=False), cancel=True)
        view = await client.snapshots.get(vm_id(operation), operation.result["id"])
    ctx.emit(view, lambda: _taken(view))


def _taken(view: SnapshotView) -> str:
    snapshot = view.snapshot
    text = f"{snapshot.name} of {snapshot.vm_name} is {'complete' if view.complete else snapshot.state}"
    parts = [size(view.size), "with memory" if view.memory else "without memory"]
    return ", ".join((text, *parts, *pause(snapshot.vm_name, snapshot.pause_s, snapshot.lost)))


def pause(name: str, pause_s: float | None, lost: Sequence[str] = ()) -> list[str]:
    """How long a VM did not run, and what it lost, in words; nothing where it did not run anyway."""
    stood = [] if pause_s is None else [f"{name} stood still for {pause_s * 1000:.0f} ms"]
    return stood + ([f"it lost {' and '.join(lost)}"] if lost else [])


async def restore(
    vm: VmArg,
    snapshot: SnapshotArg,
    /,
    *,
    no_keep: Flag = False,
    no_memory: Flag = False,
    overcommit: Flag = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Bring a VM back to a snapshot, in place. Its present state becomes a snapshot first.

    With memory it runs on where it was; without, it is stopped.

    Parameters
    ----------
    vm
        Name or id of the VM.
    snapshot
        Name or id of the snapshot.
    no_keep
        Give the present state up instead of making it a snapshot.
    no_memory
        Bring back the disks and settings only, and leave it stopped.
    overcommit
        Insist where the host's memory does not suffice.
    """
    body = SnapshotRestore(keep=not no_keep, memory=not no_memory, overcommit=overcommit)
    async with ctx.client() as client:
        before = {view.snapshot.id for view in await client.snapshots.list(vm)}
        target = await client.snapshots.get(vm, snapshot)
        await ctx.perform(client, client.snapshots.restore(vm, snapshot, body, wait=False))
        view = await client.vms.view(target.snapshot.vm_id)
        kept = [
            made.snapshot.name
            for made in await client.snapshots.list(view.id)
            if made.snapshot.id not in before and made.snapshot.kind is SnapshotKind.SAFETY
        ]
    when = age(target.snapshot.created_at, ctx.now)
    lines = [f"{view.name} is {view.observed.state}, as it was {when} ago at {target.snapshot.name}"]
    lines += [f"what it was before is {name}: mica snapshot restore {view.name} {name}" for name in kept]
    ctx.emit(view, lambda: "\n".join(lines))


async def delete(
    vm: VmArg,
    snapshot: SnapshotArg,
    /,
    *snapshots: SnapshotArg,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Delete snapshots. What other snapshots and VMs need of them stays.

    Parameters
    ----------
    vm
        Name or id of the VM.
    snapshot
        Name or id of the snapshot.
    snapshots
        Further snapshots of the same VM.
    """
    async with ctx.client() as client:
        return await for_each(
            ctx,
            (snapshot, *snapshots),
            lambda ref: ctx.perform(client, client.snapshots.delete(vm, ref, wait=False)),
            said("is deleted"),
        )


async def rename(
    vm: VmArg,
    snapshot: SnapshotArg,
    name: str,
    /,
    *,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Give a snapshot another name.

    Parameters
    ----------
    vm
        Name or id of the VM.
    snapshot
        Name or id of the snapshot.
    name
        Its new name, a DNS label.
    """
    await _set(ctx, vm, snapshot, SnapshotSet(name=name), lambda view: f"{snapshot} is {view.snapshot.name} now")


async def describe(
    vm: VmArg,
    snapshot: SnapshotArg,
    text: str,
    /,
    *,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Say what a snapshot is for.

    Parameters
    ----------
    vm
        Name or id of the VM.
    snapshot
        Name or id of the snapshot.
    text
        What it is for; empty to say nothing.
    """
    await _set(ctx, vm, snapshot, SnapshotSet(description=text), lambda view: f"{view.snapshot.name} is described")


async def protect(
    vm: VmArg,
    snapshot: SnapshotArg,
    /,
    *,
    off: Flag = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Protect a snapshot from being deleted, by hand or by itself.

    Parameters
    ----------
    vm
        Name or id of the VM.
    snapshot
        Name or id of the snapshot.
    off
        Take the protection away.
    """
    word = "not protected any more" if off else "protected"
    await _set(ctx, vm, snapshot, SnapshotSet(protected=not off), lambda view: f"{view.snapshot.name} is {word}")


async def verify(
    vm: VmArg,
    snapshot: SnapshotArg,
    /,
    *snapshots: SnapshotArg,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Read every byte of snapshots and compare with the checksums written when they were taken.

    Parameters
    ----------
    vm
        Name or id of the VM.
    snapshot
        Name or id of the snapshot.
    snapshots
        Further snapshots of the same VM.
    """
    async with ctx.client() as client:

        async def work(ref: str) -> Operation:
            return verdict(await ctx.perform(client, client.snapshots.verify(vm, ref, wait=False), cancel=True))

        return await for_each(ctx, (snapshot, *snapshots), work, said("is whole"))


async def _set(ctx: Context, vm: str, snapshot: str, body: SnapshotSet, outcome: Callable[[SnapshotView], str]) -> None:
    async with ctx.client() as client:
        found = (await client.snapshots.get(vm, snapshot)).snapshot
        await ctx.perform(client, client.snapshots.set(found.vm_id, found.id, body, wait=False))
        view = await client.snapshots.get(found.vm_id, found.id)
    ctx.emit(view, lambda: outcome(view))


def said(what: str) -> Callable[[Operation], Awaitable[str]]:
    """What to tell of an operation that has ended well."""

    async def outcome(operation: Operation) -> str:
        return f"{operation.target_name} {what}"

    return outcome
