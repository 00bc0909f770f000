"""What a snapshot does to a live machine: look at it, hold it still, take its state, and let it go on."""

from __future__ import annotations

import msgspec

from mica.engine.definition import Context, Env, from_plain
from mica.engine.operations import folding
from mica.engine.operations.starting import plan_launch, slice_limits
from mica.engine.promises import due
from mica.engine.records import Draft
from mica.engine.snapshots import part_id
from mica.model.errors import Code, MicaError
from mica.model.snapshot import PartKind, Snapshot, SnapshotKind, SnapshotState
from mica.model.transitions import LIVE
from mica.model.vm import NVRAM, AgentState, Vm, VmRuntime, VmSpec, VmStatus
from mica.ports.hypervisor import Captured, Origin, RunState, StatefulMachine
from mica.ports.volumes import Volume

replace = msgspec.structs.replace


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """How the VM is found. ``own``: its RAM is its own, so it has to go on as a child of it, in another process; what
    that cannot take over is ``lost``, in words. ``fold``: it is a child that goes on in another process too, over a
    new RAM image."""

    live: bool
    running: bool = False
    memory: bool = False
    own: bool = False
    fold: bool = False
    lost: tuple[str, ...] = ()

    @property
    def moves(self) -> bool:
        return self.own or self.fold


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What was captured while the machine stood still, since ``at`` (seconds of the monotonic clock)."""

    at: float
    captured: Captured | None = None


def warm(name: str) -> MicaError:
    return MicaError(
        Code.STATE_CONFLICT,
        f"VM {name} runs, and a clone is a copy of disks at rest",
        hint=f"`mica fork {name}` copies it as it runs; or stop it first; or clone one of its snapshots (--snapshot)",
    )


def snapshot_id(context: Context) -> str:
    return str(context.operation.params["snapshot_id"])


async def snapshot_of(context: Context) -> Snapshot:
    return (await context.env.records.snapshots.need(snapshot_id(context))).value


async def status_of(context: Context) -> VmStatus:
    return (await context.env.records.statuses.need(context.vm_id)).value


async def machine_of(context: Context) -> StatefulMachine:
    machine = await context.env.machines.attach(context.vm_id)
    if machine is None:
        name = context.operation.target_name
        raise MicaError(Code.STATE_CONFLICT, f"VM {name} has ended meanwhile", hint="try again", retryable=True)
    return machine


async def look(context: Context) -> Look:
    status = await status_of(context)
    if status.observed.state not in LIVE or status.runtime is None:
        return Look(live=False)
    if context.operation.params.get("cold"):
        raise warm(context.operation.target_name)
    machine = await machine_of(context)
    seen = await machine.observe()
    memory = bool(context.operation.params["memory"])
    own = memory and not status.runtime.ram
    if memory and seen.agent is AgentState.READY:
        # Copies become other machines sooner when what they need for that waits in their original.
        await context.env.identities.prepare(context.vm_id, status.runtime)
    inside = [nic.name for nic in status.runtime.nics if own and nic.inside]
    lost = tuple(f"the connections of {name}, whose network is a part of QEMU" for name in inside)
    kind = SnapshotKind(context.operation.params["kind"])
    fold = memory and await folding.worth(context.env, kind, status.runtime, machine)
    return Look(live=True, running=seen.run is RunState.RUNNING, memory=memory, own=own, fold=fold, lost=lost)


async def spare(context: Context) -> VmRuntime | None:
    """A second machine on the frozen RAM, or on a copy that will be, waiting for the state of the first."""
    found = context.output("look", Look)
    env, snapshot, status = context.env, await snapshot_of(context), await status_of(context)
    if found.own and status.runtime is not None and snapshot.memory is not None:
        await env.ram.hold(status.runtime, snapshot.memory.ram)
    if found.fold and status.runtime is not None and snapshot.memory is not None:
        # Nobody may begin at that before it is the memory of the machine.
        await env.ram.prepare(status.runtime, snapshot.memory.ram, lambda done: context.report(done, "copying its RAM"))
    else:
        await _frozen(context, status.runtime if found.memory else None)
    if not found.moves:
        return None
    vm = (await env.records.vms.need(context.vm_id)).value
    assert status.runtime is not None
    assert snapshot.memory is not None
    directory = await env.parts.scratch(snapshot.id)
    staged = {v.name: v for v in context.output("freeze", list[Volume])}
    waiting = Origin(
        ram=snapshot.memory.ram,
        ram_file=env.parts.path(snapshot.memory.ram),
        devices=directory / "devices",
        build=await env.hypervisor.build(status.runtime),
        inside=snapshot.memory.inside,
    )
    plan = await plan_launch(
        env,
        replace(vm, spec=status.runtime.spec),
        await _volumes(env, vm, status.runtime.spec, staged),
        status.runtime.nics,
        status.runtime.slice,
        origin=waiting,
        incarnation=status.runtime.incarnation + 1,
    )
    runtime = await env.hypervisor.launch(plan)
    return replace(runtime, started_at=status.runtime.started_at)


async def _frozen(context: Context, runtime: VmRuntime | None) -> None:
    """Copies that wait for this moment can be got ready."""
    build = await context.env.hypervisor.build(runtime) if runtime is not None else None

    def change(snapshot: Snapshot) -> Snapshot:
        if snapshot.memory is not None and build is not None:
            snapshot = replace(snapshot, memory=replace(snapshot.memory, build=build))
        return replace(snapshot, state=SnapshotState.FROZEN)

    await context.env.records.snapshots.update(snapshot_id(context), change, durable=False)


async def _volumes(env: Env, vm: Vm, spec: VmSpec, staged: dict[str, Volume]) -> tuple[Volume, ...]:
    """The machine's volumes in order, with the staged layers in the place of what they lie over."""
    fixed = tuple(d for d in spec.disks if d.name not in staged)
    there = {v.name: v for v in await env.volumes.prepare(vm.id, fixed, env.policy.owner(vm.slot))} | staged
    return tuple(there[name] for name in (*(d.name for d in spec.disks), NVRAM) if name in there)


async def undo_spare(context: Context) -> None:
    """End the waiting machine, unless it is the VM's by now."""
    runtime, second = (await status_of(context)).runtime, _second(context)
    if runtime is not None and context.output("look", Look).moves and not await went_on(context):
        waiting = second.incarnation if second is not None else runtime.incarnation + 1
        await context.env.hypervisor.retire(context.vm_id, waiting)
    context.env.ram.discard(part_id(snapshot_id(context), PartKind.RAM))


async def hold(context: Context) -> Held | None:
    """Stop the machine and take its state; a spare is brought to it."""
    env, found = context.env, context.output("look", Look)
    if not found.live:
        return None
    machine, at = await machine_of(context), env.clock.monotonic()
    await machine.pause()
    if not found.memory:
        return Held(at=at)
    second = _second(context)
    if found.fold and second is not None:
        # Also when this is repeated: the first machine stands still until the second one is the VM's.
        runtime = (await status_of(context)).runtime
        assert runtime is not None
        await env.ram.fill(runtime, second)
        await _frozen(context, runtime)
    captured = await machine.capture(await env.parts.scratch(snapshot_id(context)), folded=found.fold)
    if second is not None:
        await _bring(env, second, captured)
    return Held(at=at, captured=captured)


async def _bring(env: Env, second: VmRuntime, captured: Captured) -> None:
    waiting = await env.hypervisor.attach(second)
    if waiting is None:
        words = (await env.hypervisor.autopsy(second)).last_words
        raise MicaError(Code.QEMU_FAILED, f"the machine that was to go on has ended: {words}", retryable=True)
    if (await waiting.observe()).run is RunState.PRELAUNCH:  # else this is repeated, and it has its state
        origin = Origin(
            ram=second.ram,
            ram_file=captured.devices.parent / "ram",
            devices=captured.devices,
            changes=captured.changes,
            build=captured.build,
        )
        await waiting.load(origin)


async def undo_hold(context: Context) -> None:
    """It was not the guest's wish to stand still. A machine that has ended needs nothing taken back."""
    env, found = context.env, context.output("look", Look)
    if not found.running:
        return
    try:
        machine = await env.machines.attach(context.vm_id)
        if machine is not None:
            await machine.resume()
    except MicaError:
        if not await env.machines.ended(context.vm_id):
            raise


async def went_on(context: Context) -> bool:
    """Whether the machine may be over the new layers, or is another one by now."""
    if not any(entry.step == "go-on" for entry in context.operation.journal):
        return False
    runtime, second = (await status_of(context)).runtime, _second(context)
    return second is None or (runtime is not None and runtime.incarnation == second.incarnation)


async def undo_go_on(context: Context) -> None:
    """What has begun is brought to its end: the new layers lie over all that was written, whoever wrote it."""
    if not await went_on(context):
        return
    try:
        await go_on(context)
    except MicaError:
        if not await context.env.machines.ended(context.vm_id):
            raise
        await context.env.branches.take(context.vm_id)


async def go_on(context: Context) -> float | None:
    """Over the new layers, as the spare where there is one. Returns how long the machine stood still, in seconds.

    A machine that dies here was captured before, so the snapshot is good. What it wrote last is in the new layers.
    """
    env = context.env
    held = context.outputs.get("hold")
    try:
        await _let_go_on(context)
    except MicaError:
        if not await env.machines.ended(context.vm_id):
            raise
    paused = max(0.0, env.clock.monotonic() - float(held["at"])) if held is not None else None
    await env.branches.take(context.vm_id)
    return paused


async def _let_go_on(context: Context) -> None:
    env, found, second = context.env, context.output("look", Look), _second(context)
    if second is not None:
        await _swap(context, second)
    elif found.live:
        await (await machine_of(context)).switch(tuple(context.output("freeze", list[Volume])))
    machine = await env.machines.attach(context.vm_id) if found.live else None
    if machine is not None and found.running:
        await machine.resume()


async def _swap(context: Context, second: VmRuntime) -> None:
    """The second machine is the VM's, and the first one ends. Whoever is cut off there finds the second one then."""
    env, vm_id = context.env, context.vm_id
    runtime = (await status_of(context)).runtime
    if runtime is not None and runtime.incarnation != second.incarnation:
        if await env.hypervisor.attach(second) is None:
            words = (await env.hypervisor.autopsy(second)).last_words
            raise MicaError(Code.QEMU_FAILED, f"the machine that was to go on has ended: {words}", retryable=True)
        env.machines.detach(vm_id)
        if second.slice:
            await env.slices.update(second.slice, slice_limits(second.spec, second.overhead, frozen=True))
        await _hand_over(env, vm_id, second)
    await env.hypervisor.retire(vm_id, second.incarnation - 1)
    await env.guests.moved(vm_id, second)
    machine = await env.machines.attach(vm_id)
    if machine is not None:
        await machine.join(second.nics)


async def _hand_over(env: Env, vm_id: str, second: VmRuntime) -> None:
    """Its memory is not its own any more, and it is promised no more than what it may write of it."""

    async def write(draft: Draft) -> None:
        row = await env.records.statuses.need(vm_id)
        draft.put(env.records.statuses, vm_id, replace(row.value, runtime=second), row.generation)
        if not env.machines.wanted(vm_id):  # else that was admitted with what it is promised now
            await env.records.draft_promise(draft, vm_id, due(env, vm_id, second))

    await env.records.transact(write, durable=False)


def captured_in(context: Context) -> Captured | None:
    held = context.outputs.get("hold")
    return from_plain(held, Held).captured if held is not None else None


def _second(context: Context) -> VmRuntime | None:
    runtime = context.outputs.get("spare")
    return from_plain(runtime, VmRuntime) if runtime is not None else None
