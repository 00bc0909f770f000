"""What a VM went back to is read in full while its guest runs on it already: RAM images and the layers of disks.

What the guest needed at once was compared before it ran. A VM that turns out to run on damage is paused and says why:
whoever looks decides whether to go back further, or to let it go on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mica.engine.damage import check, closure, last_valid, read_parts
from mica.engine.definition import Env, NoParams
from mica.model.errors import Code, MicaError, Problem
from mica.model.operation import Actor
from mica.model.snapshot import Part, PartKind
from mica.model.units import MIB, Bytes
from mica.model.vm import VmObserved, VmState, VmStatus

if TYPE_CHECKING:
    from mica.engine.engine import Engine

replace = msgspec.structs.replace

BY = Actor("mica", "reconciler:recheck")
# A guest waits for the same disk.
RATE = Bytes(128 * MIB)
# How long pausing may take. Seconds.
PAUSE_S = 60.0


async def reconcile(env: Env, engine: Engine) -> str:
    said = []
    for vm_id, row in (await env.records.statuses.scan()).items():
        if row.value.checking and not engine.waiting(vm_id):
            said.append(await _check(env, engine, vm_id, row.value.checking))
    return "; ".join(s for s in said if s)


async def _check(env: Env, engine: Engine, vm_id: str, snapshot_id: str) -> str:
    found = ""
    snapshot = await env.records.snapshots.get(snapshot_id)
    for part in await _large(env, snapshot.value.parts if snapshot is not None else (snapshot_id,)):
        found = found or await check(env, part, rate=RATE)
    vm = await env.records.vms.get(vm_id)
    if found and vm is not None:
        await _hold(env, engine, vm_id, snapshot_id, found)
    await env.records.statuses.update(vm_id, lambda s: replace(s, checking="") if s.checking == snapshot_id else s)
    return f"{vm.value.name} runs on damage: {found}" if found and vm is not None else ""


async def _large(env: Env, roots: tuple[str, ...]) -> list[Part]:
    """What was not read before the guest ran, memory first."""
    parts = await read_parts(env)
    chosen = [parts[id_] for id_ in closure(parts, roots) if id_ in parts]
    large = [part for part in chosen if part.kind in (PartKind.RAM, PartKind.DISK)]
    return sorted(large, key=lambda part: part.kind is PartKind.DISK)


async def _hold(env: Env, engine: Engine, vm_id: str, snapshot_id: str, found: str) -> None:
    """Pause the VM, if it runs on that still, and have it say why."""
    status = await env.records.statuses.get(vm_id)
    if status is None or status.value.checking != snapshot_id or status.value.observed.state is not VmState.RUNNING:
        return
    vm = (await env.records.vms.need(vm_id)).value
    pausing = await engine.submit("vm.pause", vm_id, NoParams(), by=BY)
    await engine.views.wait_operation(pausing.id, PAUSE_S)
    back = await last_valid(env, vm)
    way = f"`mica snapshot restore {vm.name} {back[0].name} --no-keep` goes back to one that is whole; " if back else ""
    problem = Problem(
        Code.CORRUPT,
        f"what it went back to is damaged: {found}",
        hint=f"{way}`mica vm resume {vm.name}` goes on with it",
    )

    def say(status: VmStatus) -> VmStatus:
        seen: VmObserved = status.observed
        if seen.state is not VmState.PAUSED:
            return status
        return replace(
            status, observed=replace(seen, reason="paused: damage was found in what it runs on", problem=problem)
        )

    try:
        await env.records.statuses.update(vm_id, say)
    except MicaError as error:
        if error.code is not Code.NOT_FOUND:  # it is deleted meanwhile
            raise
