"""Snapshots that are due are taken, and those of earlier that no rule keeps any more are deleted.

A moment is seen to once for each VM, whatever becomes of it: it is written down after the request, and the request has
a key by which a daemon that died in between does not ask again.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from mica.engine.damage import read_parts, wrong
from mica.engine.definition import Env, NoParams
from mica.engine.operations.snapshot_create import Take
from mica.engine.records import Draft, Versioned
from mica.model.errors import Code, MicaError
from mica.model.operation import Actor
from mica.model.schedule import Schedule, Taken, expired
from mica.model.snapshot import Part, Snapshot, SnapshotKind, SnapshotState
from mica.model.vm import Vm, VmState, VmStatus

if TYPE_CHECKING:
    from mica.engine.engine import Engine

replace = msgspec.structs.replace

BY = Actor("mica", "reconciler:schedules")
# Snapshots that are written at the same time: they share one disk with the guests.
AT_ONCE = 2
# Deleted in one round for each VM.
BATCH = 20
# In these nothing of a VM changes.
_DOWN = (VmState.STOPPED, VmState.CRASHED)
_TAKEN = (*_DOWN, VmState.RUNNING, VmState.PAUSED)
# What may keep a snapshot for now; the next round looks again.
_KEEPS = (Code.PROTECTED, Code.IN_USE, Code.BUSY)


async def reconcile(env: Env, engine: Engine) -> str:
    schedules = await env.records.schedules.scan()
    if not schedules:
        return ""
    snapshots = [row.value for row in (await env.records.snapshots.scan()).values()]
    vms = await env.records.vms.scan()
    said: list[str] = []
    for id_, row in schedules.items():
        if row.value.vm_id and row.value.vm_id not in vms:
            await _forget(env, row)
            continue
        said += await _take(env, engine, row.value, vms, snapshots)
        mine = [s for s in snapshots if s.schedule == id_ and s.vm_id in vms]
        if mine:
            said += await _expire(env, engine, row.value, mine)
    return "; ".join(said)


async def _forget(env: Env, row: Versioned[Schedule]) -> None:
    """The VM that it was for is gone for good."""

    async def write(draft: Draft) -> None:
        if await env.records.schedules.get(row.value.id) is not None:
            draft.delete(env.records.schedules, row.value.id)

    await env.records.transact(write)


async def _take(
    env: Env, engine: Engine, schedule: Schedule, vms: Mapping[str, Versioned[Vm]], snapshots: list[Snapshot]
) -> list[str]:
    due, said = schedule.due(env.clock.now()), []
    if due < schedule.created_at:  # the host's clock went back
        return []
    for vm_id, vm in vms.items():
        seen_to = schedule.last.get(vm_id, 0.0) >= due
        if seen_to or vm.value.deleted_at is not None or not schedule.covers(vm_id, vm.value.labels):
            continue
        status = await env.records.statuses.get(vm_id)
        if status is None or engine.waiting(vm_id):
            continue  # its turn comes when nothing else is being done with it
        taken = [s for s in snapshots if s.schedule == schedule.id and s.vm_id == vm_id]
        if status.value.observed.state in _TAKEN and not _unchanged(vm.value, status.value, taken):
            if await _under_way(env) >= AT_ONCE:
                break
            try:
                await _ask(engine, schedule, vm_id, due)
            except MicaError as error:
                said.append(f"no snapshot of {vm.value.name}: {error.message}")
                if error.retryable:
                    continue
        await env.records.schedules.update(
            schedule.id,
            lambda s, vm_id=vm_id: replace(s, last={**s.last, vm_id: due}),  # type: ignore[misc]
        )
    return said


def _unchanged(vm: Vm, status: VmStatus, taken: list[Snapshot]) -> bool:
    """It has not run since the last one, so another would be the same."""
    last = max(taken, key=lambda s: s.created_at, default=None)
    seen = status.observed
    return last is not None and vm.snapshot == last.id and seen.state in _DOWN and seen.since <= last.created_at


async def _under_way(env: Env) -> int:
    rows = (await env.records.operations.scan()).values()
    return sum(1 for row in rows if row.value.by == BY and not row.value.state.ended)


async def _ask(engine: Engine, schedule: Schedule, vm_id: str, due: float) -> None:
    name = datetime.fromtimestamp(due, UTC).strftime("auto-%Y%m%d-%H%M%S")
    if await engine.env.records.snapshot_names.get(f"{vm_id}/{name}") is not None:
        name = f"{name}-{schedule.id[:8]}"  # another schedule's
    take = Take(name=name, memory=schedule.memory, kind=SnapshotKind.SCHEDULE, schedule=schedule.id)
    key = f"{schedule.id}:{vm_id}:{due:.0f}"
    await engine.submit("snapshot.create", vm_id, take, by=BY, idempotency_key=key)


async def _expire(env: Env, engine: Engine, schedule: Schedule, mine: list[Snapshot]) -> list[str]:
    parts, said = await read_parts(env), []
    for vm_id in sorted({s.vm_id for s in mine}):
        of_vm = {s.id: s for s in mine if s.vm_id == vm_id and s.state is SnapshotState.COMPLETE}
        gone = expired({id_: _taken(s, parts) for id_, s in of_vm.items()}, schedule.keep)
        for id_ in sorted(gone, key=lambda id_: of_vm[id_].created_at)[:BATCH]:
            try:
                await engine.submit("snapshot.delete", id_, NoParams(), by=BY)
            except MicaError as error:
                if error.code not in (*_KEEPS, Code.NOT_FOUND):
                    said.append(f"{of_vm[id_].name} of {of_vm[id_].vm_name} is not deleted: {error.message}")
    return said


def _taken(snapshot: Snapshot, parts: Mapping[str, Part]) -> Taken:
    return Taken(snapshot.created_at, good=not wrong(parts, snapshot.parts), protected=snapshot.protected)
