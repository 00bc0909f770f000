"""Requests that come to several operations: forks, clones, and going back to a snapshot with the present state kept."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from mica.engine.operations.snapshot_create import Take
from mica.engine.operations.snapshot_restore import Revert
from mica.model.errors import Code, MicaError
from mica.model.operation import Actor, Operation
from mica.model.snapshot import SnapshotKind
from mica.model.views import ForkAccepted, SnapshotRestore, VmClone, VmCreate, VmFork

if TYPE_CHECKING:
    from mica.engine.engine import Engine

# Copies that one request may ask for.
MAX_FORKS = 100


async def fork(engine: Engine, ref: str, body: VmFork, *, by: Actor, idempotency_key: str = "") -> ForkAccepted:
    """Running copies of a VM: as it is now, or as it was at a snapshot. All or none are accepted.

    The same ``idempotency_key`` gives the same operations again. Raises every code that refuses a snapshot or a VM.
    """
    if not 1 <= body.count <= MAX_FORKS:
        raise MicaError(Code.INVALID, f"{body.count} copies; one request makes 1 to {MAX_FORKS}")
    vm_id = await engine.env.records.resolve_vm(ref)
    freeze = None
    if body.snapshot:
        snapshot_id = await engine.env.records.resolve_snapshot(vm_id, body.snapshot)
    else:
        take = Take(kind=SnapshotKind.FORK)
        freeze = await engine.submit(
            "snapshot.create", vm_id, take, by=by, idempotency_key=_part(idempotency_key, "freeze")
        )
        snapshot_id = str(freeze.params["snapshot_id"])
    accepted: list[Operation] = []
    try:
        for number in range(1, body.count + 1):
            name = f"{body.name}-{number}" if body.name and body.count > 1 else body.name
            wanted = VmCreate(name=name, snapshot=snapshot_id, start=True, overcommit=body.overcommit)
            key = _part(idempotency_key, str(number))
            accepted.append(await engine.submit("vm.create", "", wanted, by=by, idempotency_key=key))
    except MicaError:
        for operation in (*accepted, *([freeze] if freeze else ())):
            with contextlib.suppress(MicaError):  # it has ended already: the reaper clears a moment that nobody needs
                await engine.cancel(operation.id, by=by)
        raise
    return ForkAccepted(operations=tuple(accepted), freeze=freeze)


async def clone(engine: Engine, ref: str, body: VmClone, *, by: Actor, idempotency_key: str = "") -> ForkAccepted:
    """A stopped copy of a stopped VM, or of a VM as it was at a snapshot. Raises as :func:`fork`."""
    vm_id = await engine.env.records.resolve_vm(ref)
    freeze = None
    if body.snapshot:
        snapshot_id = await engine.env.records.resolve_snapshot(vm_id, body.snapshot)
    else:
        take = Take(kind=SnapshotKind.FORK, memory=False, cold=True)
        key = _part(idempotency_key, "freeze")
        freeze = await engine.submit("snapshot.create", vm_id, take, by=by, idempotency_key=key)
        snapshot_id = str(freeze.params["snapshot_id"])
    wanted = VmCreate(name=body.name, snapshot=snapshot_id, full=body.full)
    try:
        made = await engine.submit("vm.create", "", wanted, by=by, idempotency_key=_part(idempotency_key, "1"))
    except MicaError:
        if freeze is not None:
            with contextlib.suppress(MicaError):  # it has ended already: the reaper clears a moment that nobody needs
                await engine.cancel(freeze.id, by=by)
        raise
    return ForkAccepted(operations=(made,), freeze=freeze)


async def restore(
    engine: Engine, ref: str, snapshot_ref: str, body: SnapshotRestore, *, by: Actor, idempotency_key: str = ""
) -> Operation:
    """A VM back to one of its snapshots; the present state becomes one first, if that is wanted."""
    vm_id = await engine.env.records.resolve_vm(ref)
    snapshot_id = await engine.env.records.resolve_snapshot(vm_id, snapshot_ref)
    needs = ""
    if body.keep:
        take = Take(kind=SnapshotKind.SAFETY)
        kept = await engine.submit(
            "snapshot.create", vm_id, take, by=by, idempotency_key=_part(idempotency_key, "keep")
        )
        needs = str(kept.params["snapshot_id"])
    back = Revert(snapshot=snapshot_id, needs=needs, memory=body.memory, overcommit=body.overcommit)
    return await engine.submit("snapshot.restore", vm_id, back, by=by, idempotency_key=idempotency_key)


def _part(key: str, name: str) -> str:
    """A key of one operation among those that a request comes to."""
    return f"{key}/{name}" if key else ""
