"""``vm.suspend``: memory and devices to disk, and the machine ends; ``vm.discard``: that memory is given up.

    note ──► look ──► hold ──► keep ──► save ──► finish ──► down
                     paused            on disk, with checksums    suspended

Until ``down`` the machine is there and goes on when anything fails. Its disks stay as they are: nobody writes to them
while their VM is suspended, so there is nothing to copy and nothing to lie over.
"""

from __future__ import annotations

import msgspec

from mica.engine.definition import Context, Definition, Env, NoParams, Proposal, Step
from mica.engine.operations import keeping
from mica.engine.operations import snapshot_create as taking
from mica.engine.operations.capturing import Held, Look, snapshot_id, snapshot_of, status_of
from mica.engine.operations.snapshot_create import Take
from mica.engine.records import Draft
from mica.engine.settle import moved, set_state, stopped, take_down
from mica.engine.snapshots import part_id, sweep
from mica.model.errors import Code, MicaError
from mica.model.snapshot import PartKind, SnapshotKind
from mica.model.transitions import LIVE, VmVerb
from mica.model.vm import Power, Suspended, VmRuntime, VmState
from mica.ports.hypervisor import RunState, StatefulMachine

replace = msgspec.structs.replace

REASON = "its memory is on disk"


async def plan(proposal: Proposal) -> None:
    assert proposal.vm is not None
    await taking.note(proposal, Take(kind=SnapshotKind.SUSPEND), replace(proposal.vm.value, intent=Power.SUSPENDED))


async def _running(context: Context) -> tuple[StatefulMachine, VmRuntime]:
    machine, runtime = await context.env.machines.attach(context.vm_id), (await status_of(context)).runtime
    if machine is None or runtime is None:
        name = context.operation.target_name
        raise MicaError(Code.STATE_CONFLICT, f"VM {name} has ended meanwhile", hint="there is nothing to suspend")
    return machine, runtime


async def undo_record(context: Context) -> None:
    """Nobody begins at the memory of a suspended VM but itself: what was kept of it goes at once."""
    env, id_ = context.env, snapshot_id(context)
    row = await env.records.statuses.get(context.vm_id)
    if row is not None and row.value.suspended is not None and row.value.suspended.snapshot == id_:
        return
    made = [part_id(id_, kind) for kind in (PartKind.RAM, PartKind.DEVICES, PartKind.CHANGES)]

    async def write(draft: Draft) -> None:
        await draft_forget(env, draft, id_)
        for part in made:
            if await env.records.parts.get(part) is not None:
                draft.delete(env.records.parts, part)

    await env.records.transact(write)
    for part in made:
        await env.parts.remove(part)
        env.ram.release(part)
    await env.parts.drop_scratch(id_)


async def draft_forget(env: Env, draft: Draft, snapshot_id: str) -> None:
    """Delete a snapshot's row, as a part of ``draft``."""
    row = await env.records.snapshots.get(snapshot_id)
    if row is not None:
        draft.delete(env.records.snapshot_names, f"{row.value.vm_id}/{row.value.name}")
        draft.delete(env.records.snapshots, snapshot_id, row.generation)


async def look(context: Context) -> Look:
    machine, runtime = await _running(context)
    running = (await machine.observe()).run is RunState.RUNNING
    return Look(live=True, running=running, memory=True, own=not runtime.ram)


async def hold(context: Context) -> Held:
    """Stop the machine and take its state."""
    env, found = context.env, context.output("look", Look)
    machine, runtime = await _running(context)
    await machine.pause()
    await set_state(env, context.vm_id, lambda o: moved(env, o, VmState.PAUSED, "it is being suspended"))
    await keeping.write_rows(context, await snapshot_of(context), runtime.spec, [], found, runtime)
    await _hold_ram(context)
    captured = await machine.capture(await env.parts.scratch(snapshot_id(context)))
    return Held(at=env.clock.monotonic(), captured=captured)


async def _hold_ram(context: Context) -> None:
    """Where the RAM is the machine's own it is an image from here on, also after the daemon has died."""
    runtime, memory = (await status_of(context)).runtime, (await snapshot_of(context)).memory
    if context.output("look", Look).own and runtime is not None and memory is not None:
        await context.env.ram.hold(runtime, memory.ram)


async def undo_hold(context: Context) -> None:
    """Let it run on, unless it is down: that is then said by the step that brought it down, or by its actor."""
    env, vm_id = context.env, context.vm_id
    status = await env.records.statuses.get(vm_id)
    if status is None or status.value.runtime is None or not context.output("look", Look).running:
        return
    try:
        machine = await env.machines.attach(vm_id)
        if machine is not None:
            await machine.resume()
            await set_state(env, vm_id, lambda o: moved(env, o, VmState.RUNNING))
    except MicaError:
        if not await env.machines.ended(vm_id):
            raise


async def save(context: Context) -> None:
    memory = (await snapshot_of(context)).memory
    assert memory is not None
    if memory.ram not in await context.env.parts.present():
        await _hold_ram(context)
    await keeping.save(context)


async def down(context: Context) -> None:
    """The memory is on disk: the machine ends, and with it what it held of the host's memory."""
    env, vm_id = context.env, context.vm_id
    status, snapshot = await status_of(context), await snapshot_of(context)
    if status.observed.state in LIVE:
        # While it stood still its disks were written out.
        await take_down(env, vm_id, clean=True)
        saved = Suspended(snapshot=snapshot.id, spec=snapshot.spec)
        await stopped(env, vm_id, VmState.SUSPENDED, REASON, but=context.operation.id, suspended=saved)
    assert snapshot.memory is not None
    runtimes = [row.value.runtime for row in (await env.records.statuses.scan()).values()]
    if not any(runtime is not None and runtime.ram == snapshot.memory.ram for runtime in runtimes):
        env.ram.release(snapshot.memory.ram)


async def undo_down(context: Context) -> None:
    """What is down stays down: it is suspended. What still lives goes on."""
    if await context.env.machines.ended(context.vm_id):
        await down(context)


async def plan_discard(proposal: Proposal) -> None:
    assert proposal.vm is not None
    wanted = replace(proposal.vm.value, intent=Power.STOPPED)
    proposal.draft.put(proposal.env.records.vms, wanted.id, wanted, proposal.vm.generation)


async def give_up(context: Context) -> None:
    """The VM is stopped, as by a power cut. Nothing happens to one that is not suspended."""
    env, vm_id = context.env, context.vm_id

    async def write(draft: Draft) -> None:
        status = await env.records.statuses.get(vm_id)
        if status is None or status.value.suspended is None:
            return
        observed = moved(env, status.value.observed, VmState.STOPPED, "what it had in memory was given up")
        new = replace(status.value, suspended=None, observed=observed, identity=(), becoming=None, frozen="")
        draft.put(env.records.statuses, vm_id, new, status.generation)
        await draft_forget(env, draft, status.value.suspended.snapshot)

    await env.records.transact(write)


async def clear(context: Context) -> str:
    return await sweep(context.env)


STEPS = (
    Step("record", taking.record, undo_record, words="noting it"),
    Step("look", look, words="looking at the machine"),
    Step("hold", hold, undo_hold, cancellable=False, words="taking its state"),
    Step("keep", keeping.keep, cancellable=False, words="keeping its state"),
    Step("save", save, timeout_s=7200.0, words="writing its memory to disk"),
    Step("finish", keeping.finish, cancellable=False, words="marking it complete"),
    Step("down", down, undo_down, cancellable=False, words="ending the machine"),
)
GIVE_UP = Step("give-up", give_up, cancellable=False, words="giving up its memory")

SUSPEND_DEFINITION = Definition(
    verb=VmVerb.SUSPEND,
    noun="vm",
    params=NoParams,
    plan=plan,
    steps=lambda _: STEPS,
    state_verb=VmVerb.SUSPEND,
    anchored=True,
)
DISCARD_DEFINITION = Definition(
    verb=VmVerb.DISCARD,
    noun="vm",
    params=NoParams,
    plan=plan_discard,
    steps=lambda _: (GIVE_UP, Step("clear", clear, cancellable=False, follows=True, words="freeing what it took")),
    state_verb=VmVerb.DISCARD,
)
