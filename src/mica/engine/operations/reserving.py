"""Admission: memory is promised when a start is accepted, and made exact when it begins."""

from __future__ import annotations

import msgspec

from mica.engine import standbys
from mica.engine.admission import Candidate, Ways, admit, promise, with_room
from mica.engine.definition import Context, Env, Proposal, Step
from mica.engine.promises import due, shared
from mica.engine.records import Draft, Ledger, Reservation
from mica.engine.snapshots import cool, part_id
from mica.model.errors import Code, MicaError
from mica.model.snapshot import PartKind, Snapshot, SnapshotState
from mica.model.transitions import LIVE
from mica.model.units import Bytes
from mica.model.vm import Vm


async def image_of(env: Env, snapshot: Snapshot) -> str:
    """The RAM image that a machine begins at which goes on from there; empty when it boots."""
    if snapshot.memory is not None:
        return snapshot.memory.ram
    if snapshot.state is not SnapshotState.TAKING:
        return ""
    # Nobody has looked at its machine yet. If that turns out to have no memory to begin at, the start is judged anew.
    status = await env.records.statuses.get(snapshot.vm_id)
    if status is None or status.value.observed.state not in LIVE or status.value.runtime is None:
        return ""
    return status.value.runtime.ram or part_id(snapshot.id, PartKind.RAM)


async def reserve(proposal: Proposal, vm: Vm, *, overcommit: bool, image: str = "", ways: Ways | None = None) -> None:
    """Admission: promise the memory within the accepting transaction, or raise with numbers and ways out.

    ``image`` is the RAM image that it begins at, empty when it boots. The spec is kept with the operation: what is
    admitted is what starts, whatever is set in the meantime. ``ways`` are those out of a refusal, by default those of
    whoever starts a VM that is there.
    """
    env = proposal.env
    await env.hypervisor.check(vm.spec)
    ledger = await env.records.read_ledger()
    need = promise(vm.spec.memory, env.hypervisor.overhead(vm.spec), image)
    held = ledger.value.reserved.get(vm.id, Reservation(Bytes(0), Bytes(0)))
    if need.ram > held.ram or need.overhead > held.overhead:
        usual = Ways(f"mica vm set {vm.name} ")
        await _judge(env, vm, need, ledger.value, overcommit=overcommit, ways=ways or usual)
    # Until it is down, what runs now needs its memory.
    most = Reservation(
        Bytes(max(need.ram, held.ram)), Bytes(max(need.overhead, held.overhead)), need.image or held.image
    )
    new = Ledger({**ledger.value.reserved, vm.id: most})
    proposal.draft.put(env.records.ledger, "memory", new, ledger.generation)
    proposal.stored_params = {**proposal.stored_params, "spec": msgspec.to_builtins(vm.spec)}


async def _judge(env: Env, vm: Vm, need: Reservation, ledger: Ledger, *, overcommit: bool, ways: Ways) -> None:
    """Raises ``insufficient-memory`` when the VM has no room beside all others, nor would have it beside fewer of those
    that nobody asked for."""
    running = [await _named(env, c) for c in env.sampler.candidates(ledger)]

    async def offer(away: set[str]) -> None:
        """Admit it as if these VMs were not there."""
        others = Ledger({k: v for k, v in ledger.reserved.items() if k not in away})
        now, then = await shared(env, ledger, need.image), await shared(env, others, need.image)
        freed = sum(c.used for c in running if c.vm_id in away) + now.resident - then.resident
        admit(
            vm.name,
            vm.spec,
            need,
            with_room(env.host.capacity(), freed),
            others,
            [c for c in running if c.vm_id not in away],
            reserve=env.policy.reserve,
            shared=then,
            overcommit=overcommit,
            ways=ways,
        )

    try:
        # What the VM itself holds now is free by the time it starts (again).
        await offer({vm.id})
    except MicaError as error:
        if error.code is not Code.INSUFFICIENT_MEMORY or vm.hidden:
            raise
        # Whatever nobody asked for makes room (mica.engine.reconcilers.boots and .standby end them).
        await cool(env, 0)
        await offer({vm.id, *await standbys.giving_way(env)})


async def _named(env: Env, candidate: Candidate) -> Candidate:
    """One that was not looked at yet is known by its id only."""
    row = await env.records.vms.get(candidate.vm_id) if not candidate.name else None
    return candidate if row is None else msgspec.structs.replace(candidate, name=row.value.name)


async def settle_promise(context: Context, vm: Vm, image: str) -> None:
    """From here the promise is exactly what will run, over ``image``; one that was larger, or was lost to a stop, ends.

    What turns out to need more than was admitted, because it has to boot, is judged anew. Raises
    ``insufficient-memory``.
    """
    env = context.env
    need = promise(vm.spec.memory, env.hypervisor.overhead(vm.spec), image)

    async def write(draft: Draft) -> None:
        ledger = (await env.records.read_ledger()).value
        held = ledger.reserved.get(vm.id)
        if held is not None and need.total > held.total:
            overcommit = bool(context.operation.params.get("overcommit", False))
            await _judge(env, vm, need, ledger, overcommit=overcommit, ways=Ways(change=None))
        await env.records.draft_promise(draft, vm.id, need)

    await env.records.transact(write)


async def accepted(context: Context) -> None:
    """The memory was promised when the request was accepted; this step is where taking that back is anchored."""


async def undo_promise(context: Context) -> None:
    env, vm_id = context.env, context.vm_id
    status = await env.records.statuses.get(vm_id)
    runtime = status.value.runtime if status else None
    if runtime is not None:
        await env.records.promise(vm_id, due(env, vm_id, runtime))
    elif not env.machines.wanted(vm_id, but=context.operation.id):
        await env.records.release(vm_id)


PROMISE = Step("promise", accepted, undo_promise, words="reserving memory")
