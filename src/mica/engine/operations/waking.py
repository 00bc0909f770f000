"""The steps that bring a suspended VM up: as any start, but from the memory that is on disk.

    check ──► begin … launch ──► wake:   load ──► join ──► given back ──► vCPUs run

Once a vCPU runs the disks are not those of that moment any more. So before that, durably, the VM is not suspended any
more: whatever happens then, nobody goes back to memory that does not belong to its disks. Before that, whatever
happens, it is suspended as it was.
"""

from __future__ import annotations

import msgspec

from mica.engine.definition import Context, Env, Step
from mica.engine.operations.quiescing import let_go
from mica.engine.operations.starting import START, launched, resumed_as
from mica.engine.operations.vm_suspend import draft_forget
from mica.engine.records import Draft
from mica.engine.settle import moved, set_state
from mica.engine.snapshots import check_parts, need_whole, origin_of
from mica.model.errors import Code, MicaError
from mica.model.identity import Identity
from mica.model.snapshot import Snapshot
from mica.model.vm import VmRuntime, VmState
from mica.ports.hypervisor import RunState, StatefulMachine

replace = msgspec.structs.replace


async def _saved(context: Context) -> Snapshot | None:
    """Where its memory is; ``None`` once that is given back."""
    status = (await context.env.records.statuses.need(context.vm_id)).value
    if status.suspended is None:
        return None
    return (await context.env.records.snapshots.need(status.suspended.snapshot)).value


async def check(context: Context) -> None:
    """What the guest runs on at once is as it was written. Raises ``corrupt`` with the way out."""
    snapshot = await _saved(context)
    if snapshot is None:
        return  # the next step says what became of it
    try:
        await need_whole(context.env, snapshot)
        await check_parts(context.env, snapshot)
    except MicaError as error:
        if error.code in (Code.CORRUPT, Code.NOT_FOUND):
            name = context.operation.target_name
            error.hint = f"its disks are as they were: `mica vm stop --discard {name}`, then start it"
        raise


async def wake(context: Context) -> None:
    env, vm_id, machine = context.env, context.vm_id, await launched(context)
    snapshot = await _saved(context)
    runtime = (await env.records.statuses.need(vm_id)).value.runtime
    assert runtime is not None
    if snapshot is not None:
        origin = origin_of(env, snapshot)
        assert origin is not None
        if (await machine.observe()).run is RunState.PRELAUNCH:  # else this is repeated, and it has its state
            await machine.load(origin)
        await machine.join(runtime.nics)
        await _give_back(env, vm_id, snapshot)
    paused = bool(context.operation.params.get("paused", False))
    if not paused:
        await _go_on(env, vm_id, machine, runtime)
    seen = await machine.observe()
    state = VmState.PAUSED if paused else VmState.RUNNING
    await set_state(env, vm_id, lambda o: replace(moved(env, o, state), agent=seen.agent))
    if not paused:
        await let_go(env, vm_id)


async def _give_back(env: Env, vm_id: str, snapshot: Snapshot) -> None:
    """From here the memory is the machine's; the image that it maps is read in full while it runs."""
    assert snapshot.memory is not None
    ram = snapshot.memory.ram

    async def write(draft: Draft) -> None:
        status = await env.records.statuses.need(vm_id)
        if status.value.suspended is not None:
            draft.put(
                env.records.statuses, vm_id, replace(status.value, suspended=None, checking=ram), status.generation
            )
        await draft_forget(env, draft, snapshot.id)

    await env.records.transact(write)


async def _go_on(env: Env, vm_id: str, machine: StatefulMachine, runtime: VmRuntime) -> None:
    """It is who it was; its clock stood still, and its random numbers lie on a disk."""
    await resumed_as(env, vm_id, machine, runtime, Identity(id=vm_id, parent_id=vm_id))


WAKE: tuple[Step, ...] = (
    START[0],
    Step("check", check, timeout_s=3600.0, words="looking for damage"),
    *START[1:-1],
    Step("wake", wake, cancellable=False, words="bringing its memory back"),
)
