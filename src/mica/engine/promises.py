"""What VMs are promised of the host's memory while they run: all of their RAM, or what they have of it for themselves.

The machine of a fork, of a VM that was forked or captured, that was resumed or has gone back, maps a RAM image which
others map too. It is promised what its process has for itself and a reserve, and the promise follows what it writes.
The images themselves are in memory once, and are counted once.
"""

from __future__ import annotations

from mica.engine.admission import NOTHING_SHARED, Room, Shared, followed, promise, room
from mica.engine.definition import Env
from mica.engine.records import Draft, Ledger, Reservation
from mica.model.snapshot import SnapshotState
from mica.model.vm import VmRuntime, VmState
from mica.ports.store import Conflict

# Its machine may be gone, or another one, before long in any other state.
_STEADY = (VmState.RUNNING, VmState.PAUSED)
# The memory that is to be an image is that of a machine which owns it still.
_OWNED = (SnapshotState.TAKING, SnapshotState.FROZEN)


def due(env: Env, vm_id: str, runtime: VmRuntime, held: Reservation | None = None) -> Reservation:
    """What a VM with this machine is to be promised; ``held``, what it is promised now, where that is near enough or
    nobody has looked at the machine yet."""
    ram, overhead = runtime.spec.memory, runtime.overhead
    own = env.sampler.own(vm_id, runtime.process)
    new = promise(ram, overhead, runtime.ram, own or 0)
    if not runtime.ram:
        return new
    if own is None and held is not None and (held.image, held.overhead) == (new.image, new.overhead):
        return held if new.ram <= held.ram <= ram else new
    return followed(held, new, ram)


async def shared(env: Env, ledger: Ledger, *images: str) -> Shared:
    """The RAM images below those who were promised memory, and ``images``."""
    resident = missing = 0
    for id_ in {r.image for r in ledger.reserved.values()}.union(images) - {""}:
        size, part = env.ram.size(id_), await env.records.parts.get(id_)
        if size and part is not None and not part.value.digest and await _is_owned(env, ledger, id_):
            continue  # all of it is promised to that machine
        resident += size
        missing += part.value.size if part is not None and not size else 0
    return Shared(resident, missing) if resident or missing else NOTHING_SHARED


async def _is_owned(env: Env, ledger: Ledger, id_: str) -> bool:
    for row in (await env.records.snapshots.scan()).values():
        if row.value.state in _OWNED and row.value.memory is not None and row.value.memory.ram == id_:
            owner = ledger.reserved.get(row.value.vm_id)
            return owner is not None and not owner.image
    return False


async def left(env: Env) -> Room:
    """What this host has left for VMs."""
    ledger = (await env.records.read_ledger()).value
    running = env.sampler.candidates(ledger)
    return room(env.host.capacity(), ledger, running, env.policy.reserve, await shared(env, ledger))


async def follow(env: Env) -> None:
    """Bring the promises of machines that share their memory to what they have for themselves by now."""
    ledger = await env.records.read_ledger()
    new = dict(ledger.value.reserved)
    for vm_id, held in ledger.value.reserved.items():
        status = await env.records.statuses.get(vm_id)
        runtime = status.value.runtime if status is not None else None
        if status is None or runtime is None or not runtime.ram or env.machines.wanted(vm_id):
            continue
        if status.value.observed.state in _STEADY:
            new[vm_id] = due(env, vm_id, runtime, held)
    if new == ledger.value.reserved:
        return
    draft = Draft()
    draft.put(env.records.ledger, "memory", Ledger(new), ledger.generation)
    try:
        await env.records.commit(draft, durable=False)
    except Conflict:
        return  # somebody was quicker; the next round looks again
