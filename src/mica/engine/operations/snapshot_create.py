"""``snapshot.create``: the whole machine at one moment, while it runs, is paused or stopped.

    look ──► freeze ──► spare ──► quiesce ──► hold ──► go on ──► thaw ──► keep ──► save ──► finish
             disks get   (1)      guest's    paused    running            usable   on disk, with checksums
             new layers           file systems

A machine whose RAM is its own (1) goes on as a private child of it: a second QEMU is started beside it, waiting, and
takes over while the first one is paused. One that is such a child already stays where it is, and what it changed since
is written down; unless that has become much: then it goes on as a child of a new RAM image, which is copied while it
runs and gets what it changed while it is paused (:mod:`mica.engine.operations.folding`). Once it went on there is no
way back, and none is needed: the machine is over its frozen parts.
"""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from mica.engine.damage import closure, read_parts
from mica.engine.definition import Context, Definition, Env, Proposal, Step, from_plain
from mica.engine.operations import folding, forecasting, quiescing
from mica.engine.operations.placing import snapshot_name
from mica.engine.operations.quiescing import check_can_freeze
from mica.engine.operations.starting import plan_launch
from mica.engine.promises import due
from mica.engine.records import Claim, Draft
from mica.engine.snapshots import claim_of, draft_remove, part_id, put_parts
from mica.model.errors import Code, MicaError
from mica.model.image import Firmware
from mica.model.snapshot import (
    HISTORY,
    MachineBuild,
    MemoryState,
    Part,
    PartKind,
    Snapshot,
    SnapshotKind,
    SnapshotState,
)
from mica.model.transitions import LIVE, VmVerb
from mica.model.units import Bytes
from mica.model.vm import NVRAM, AgentState, DiskSpec, Vm, VmRuntime, VmSpec, VmStatus
from mica.ports.hypervisor import Captured, Origin, RunState, StatefulMachine
from mica.ports.store import ABSENT
from mica.ports.volumes import Volume

replace = msgspec.structs.replace


class Take(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters: as :class:`mica.model.views.SnapshotCreate`, and why it is made.

    ``cold``: only of a VM without a process.
    """

    name: str = ""
    memory: bool = True
    quiesce: bool = False
    description: str = ""
    kind: SnapshotKind = SnapshotKind.USER
    cold: bool = False
    schedule: str = ""


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


async def plan(proposal: Proposal) -> None:
    assert isinstance(proposal.params, Take)
    assert proposal.vm is not None
    if proposal.params.cold and proposal.expected in LIVE:
        raise _warm(proposal.vm.value.name)
    await note(proposal, proposal.params, proposal.vm.value)


def _warm(name: str) -> MicaError:
    return MicaError(
        Code.STATE_CONFLICT,
        f"VM {name} runs, and a clone is a copy of disks at rest",
        hint=f"`mica fork {name}` copies it as it runs; or stop it first; or clone one of its snapshots (--snapshot)",
    )


async def note(proposal: Proposal, body: Take, vm: Vm) -> None:
    """Write the row of a snapshot that is to be taken, and that of its VM, as ``vm``."""
    assert proposal.vm is not None
    env = proposal.env
    name = await snapshot_name(env, vm, body.kind, body.name)
    if body.quiesce:
        check_can_freeze(proposal, vm)
    # The row is written anew each time, so that no two snapshots of a VM can have the same id.
    id_ = str(uuid.uuid5(uuid.UUID(vm.id), f"snapshot/{proposal.vm.generation}"))
    proposal.draft.put(env.records.vms, vm.id, vm, proposal.vm.generation)
    snapshot = Snapshot(
        id=id_,
        vm_id=vm.id,
        vm_name=vm.name,
        name=name,
        spec=_spec_now(proposal),
        created_at=env.clock.now(),
        created_by=proposal.by.name,
        kind=body.kind,
        parent=vm.snapshot,
        description=body.description,
        schedule=body.schedule,
    )
    proposal.draft.put(env.records.snapshots, id_, snapshot, ABSENT)
    table, key = claim_of(env.records, snapshot)
    proposal.draft.put(table, key, Claim(id_, at=snapshot.created_at), ABSENT)
    proposal.stored_params = {"snapshot_id": id_}


def _spec_now(proposal: Proposal) -> VmSpec:
    """What the machine is made of now, whatever waits for its next start."""
    assert proposal.vm is not None
    runtime = proposal.status.value.runtime if proposal.status else None
    return runtime.spec if runtime is not None else proposal.vm.value.spec


def _id(context: Context) -> str:
    return str(context.operation.params["snapshot_id"])


async def _snapshot(context: Context) -> Snapshot:
    return (await context.env.records.snapshots.need(_id(context))).value


async def record(context: Context) -> None:
    """The rows were written when the request was accepted; this step is where taking them back is anchored."""


async def undo_record(context: Context) -> None:
    """Parts that nothing lies over are the reaper's."""
    env, id_ = context.env, _id(context)

    async def write(draft: Draft) -> None:
        row = await env.records.snapshots.get(id_)
        if row is not None:
            await draft_remove(env, draft, {id_: row})

    await env.records.transact(write)
    await env.parts.drop_scratch(id_)


async def _status(context: Context) -> VmStatus:
    return (await context.env.records.statuses.need(context.vm_id)).value


async def _machine(context: Context) -> StatefulMachine:
    machine = await context.env.machines.attach(context.vm_id)
    if machine is None:
        name = context.operation.target_name
        raise MicaError(Code.STATE_CONFLICT, f"VM {name} has ended meanwhile", hint="try again", retryable=True)
    return machine


async def look(context: Context) -> Look:
    status = await _status(context)
    if status.observed.state not in LIVE or status.runtime is None:
        return Look(live=False)
    if context.operation.params.get("cold"):
        raise _warm(context.operation.target_name)
    machine = await _machine(context)
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


def layered_disks(spec: VmSpec) -> list[DiskSpec]:
    """What gets layers: disks that are written, and the UEFI variables."""
    disks = [d for d in spec.disks if not d.read_only]
    if spec.firmware is Firmware.UEFI:
        disks.append(DiskSpec(name=NVRAM, size=Bytes(0)))
    return disks


async def freeze(context: Context) -> list[Volume]:
    """Parts and layers over them; nothing changes for the machine yet. Returns the layers."""
    env, snapshot, found = context.env, await _snapshot(context), context.output("look", Look)
    vm = (await env.records.vms.need(context.vm_id)).value
    runtime = (await _status(context)).runtime
    spec = runtime.spec if runtime is not None and found.live else vm.spec
    there = await env.branches.disks(vm.id)
    disks = [d for d in layered_disks(spec) if d.name in there]
    await write_rows(context, snapshot, spec, disks, found, runtime)
    layers, owner = [], env.policy.owner(vm.slot)
    for disk in disks:
        part = part_id(snapshot.id, PartKind.DISK, disk.name)
        await env.branches.freeze(vm.id, disk, part)
        layers.append(await env.branches.stage(vm.id, disk, env.parts.path(part), owner))
    return layers


async def write_rows(
    context: Context,
    snapshot: Snapshot,
    spec: VmSpec,
    disks: list[DiskSpec],
    found: Look,
    runtime: VmRuntime | None,
) -> None:
    """The VM lies over its new layers from here on, as far as the reaper knows: before any of them is written."""
    env, now = context.env, context.env.clock.now()
    layers = {d.name: part_id(snapshot.id, PartKind.DISK, d.name) for d in disks}
    memory: MemoryState | None = None

    async def write(draft: Draft) -> None:
        vm = await env.records.vms.need(context.vm_id)
        parts = [
            Part(
                id=layers[d.name],
                kind=PartKind.NVRAM if d.name == NVRAM else PartKind.DISK,
                name=d.name,
                base=vm.value.layers.get(d.name, ""),
                image=d.image or "",
                created_at=now,
            )
            for d in disks
        ]
        if memory is not None:
            parts += [
                Part(id=memory.ram, kind=PartKind.RAM, created_at=now),
                Part(id=memory.devices, kind=PartKind.DEVICES, created_at=now),
                Part(id=memory.changes, kind=PartKind.CHANGES, base=memory.ram, created_at=now),
            ]
        await put_parts(env, draft, parts)
        held = await env.records.snapshots.need(snapshot.id)
        new = replace(held.value, spec=spec, disks=layers, memory=memory)
        if new != held.value:
            draft.put(env.records.snapshots, snapshot.id, new, held.generation)
        if vm.value.layers != {**vm.value.layers, **layers}:
            changed = replace(vm.value, layers={**vm.value.layers, **layers})
            draft.put(env.records.vms, vm.value.id, changed, vm.generation)

    if found.memory:
        assert runtime is not None
        memory = MemoryState(
            ram=part_id(snapshot.id, PartKind.RAM) if found.moves else runtime.ram,
            devices=part_id(snapshot.id, PartKind.DEVICES),
            changes=part_id(snapshot.id, PartKind.CHANGES),
            build=MachineBuild(qemu="", machine="", cpu="", accelerator=""),
            inside=sum(nic.inside for nic in runtime.nics),
        )
    await env.records.transact(write)


async def undo_freeze(context: Context) -> None:
    """Take the layers back, unless the machine may be writing to them by now."""
    env = context.env
    if await _went_on(context):
        return
    await env.branches.unstage(context.vm_id)
    snapshot = await env.records.snapshots.get(_id(context))
    mine = snapshot.value.disks if snapshot else {}
    bases = {id_: row.value.base for id_, row in (await env.records.parts.scan()).items()}

    def back(vm: Vm) -> Vm:
        kept = {d: bases.get(p, "") if mine.get(d) == p else p for d, p in vm.layers.items()}
        return replace(vm, layers={d: p for d, p in kept.items() if p})

    await env.records.vms.update(context.vm_id, back)


async def spare(context: Context) -> VmRuntime | None:
    """A second machine on the frozen RAM, or on a copy that will be, waiting for the state of the first."""
    found = context.output("look", Look)
    env, snapshot, status = context.env, await _snapshot(context), await _status(context)
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

    await context.env.records.snapshots.update(_id(context), change, durable=False)


async def _volumes(env: Env, vm: Vm, spec: VmSpec, staged: dict[str, Volume]) -> tuple[Volume, ...]:
    """The machine's volumes in order, with the staged layers in the place of what they lie over."""
    fixed = tuple(d for d in spec.disks if d.name not in staged)
    there = {v.name: v for v in await env.volumes.prepare(vm.id, fixed, env.policy.owner(vm.slot))} | staged
    return tuple(there[name] for name in (*(d.name for d in spec.disks), NVRAM) if name in there)


async def undo_spare(context: Context) -> None:
    """End the waiting machine, unless it is the VM's by now."""
    runtime, second = (await _status(context)).runtime, _second(context)
    if runtime is not None and context.output("look", Look).moves and not await _went_on(context):
        waiting = second.incarnation if second is not None else runtime.incarnation + 1
        await context.env.hypervisor.retire(context.vm_id, waiting)
    context.env.ram.discard(part_id(_id(context), PartKind.RAM))


async def hold(context: Context) -> Held | None:
    """Stop the machine and take its state; a spare is brought to it."""
    env, found = context.env, context.output("look", Look)
    if not found.live:
        return None
    machine, at = await _machine(context), env.clock.monotonic()
    await machine.pause()
    if not found.memory:
        return Held(at=at)
    second = _second(context)
    if found.fold and second is not None:
        # Also when this is repeated: the first machine stands still until the second one is the VM's.
        runtime = (await _status(context)).runtime
        assert runtime is not None
        await env.ram.fill(runtime, second)
        await _frozen(context, runtime)
    captured = await machine.capture(await env.parts.scratch(_id(context)), folded=found.fold)
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


async def _went_on(context: Context) -> bool:
    """Whether the machine may be over the new layers, or is another one by now."""
    if not any(entry.step == "go-on" for entry in context.operation.journal):
        return False
    runtime, second = (await _status(context)).runtime, _second(context)
    return second is None or (runtime is not None and runtime.incarnation == second.incarnation)


async def undo_go_on(context: Context) -> None:
    """What has begun is brought to its end: the new layers lie over all that was written, whoever wrote it."""
    if not await _went_on(context):
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
        await (await _machine(context)).switch(tuple(context.output("freeze", list[Volume])))
    machine = await env.machines.attach(context.vm_id) if found.live else None
    if machine is not None and found.running:
        await machine.resume()


async def _swap(context: Context, second: VmRuntime) -> None:
    """The second machine is the VM's, and the first one ends. Whoever is cut off there finds the second one then."""
    env, vm_id = context.env, context.vm_id
    runtime = (await _status(context)).runtime
    if runtime is not None and runtime.incarnation != second.incarnation:
        if await env.hypervisor.attach(second) is None:
            words = (await env.hypervisor.autopsy(second)).last_words
            raise MicaError(Code.QEMU_FAILED, f"the machine that was to go on has ended: {words}", retryable=True)
        env.machines.detach(vm_id)
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


def _captured(context: Context) -> Captured | None:
    held = context.outputs.get("hold")
    return from_plain(held, Held).captured if held is not None else None


def _second(context: Context) -> VmRuntime | None:
    runtime = context.outputs.get("spare")
    return from_plain(runtime, VmRuntime) if runtime is not None else None


async def keep(context: Context) -> None:
    """What was captured becomes parts: from here others may begin at this state."""
    env, id_, captured = context.env, _id(context), _captured(context)
    memory = (await _snapshot(context)).memory
    if captured is not None and memory is not None:
        await env.parts.keep(memory.devices, captured.devices)
        if captured.changes is not None:
            await env.parts.keep(part_id(id_, PartKind.CHANGES), captured.changes)

    def usable(snapshot: Snapshot) -> Snapshot:
        if snapshot.memory is not None and captured is not None:
            changes = snapshot.memory.changes if captured.changes is not None else ""
            new = replace(snapshot.memory, build=captured.build, changes=changes)
            snapshot = replace(snapshot, memory=new)
        paused = context.outputs.get("go-on")
        quiesced = context.outputs.get("quiesce") is not None
        lost = context.output("look", Look).lost
        return replace(snapshot, state=SnapshotState.SAVING, pause_s=paused, lost=lost, quiesced=quiesced)

    await env.records.snapshots.update(id_, usable)


async def save(context: Context) -> None:
    """Every part to disk, with its checksum, and what it lies over: moments at which forks began left that undone.

    Such a moment itself is not saved: it goes with the forks.
    """
    env, snapshot = context.env, await _snapshot(context)
    if snapshot.kind is SnapshotKind.FORK:
        return
    rows = await read_parts(env)
    unsealed = [rows[id_] for id_ in closure(rows, snapshot.parts) if not rows[id_].digest]
    for number, part in enumerate(unsealed):

        def report(fraction: float, number: int = number, part: Part = part) -> None:
            context.report((number + fraction) / len(unsealed), f"saving {part.kind} {part.name}".strip())

        if part.kind is PartKind.RAM and part.id not in await env.parts.present():
            file = (await env.parts.scratch(snapshot.id)) / "ram"
            await env.ram.save(part.id, file, report)
            await env.parts.keep(part.id, file)
        seal = await env.parts.seal(part.id, report)
        now = env.clock.now()
        await env.records.parts.update(
            part.id,
            lambda p, seal=seal, now=now: replace(p, size=seal.size, digest=seal.digest, verified_at=now),  # type: ignore[misc]
        )


async def finish(context: Context) -> None:
    env, id_ = context.env, _id(context)
    await env.parts.drop_scratch(id_)

    async def write(draft: Draft) -> None:
        row = await env.records.snapshots.need(id_)
        draft.put(env.records.snapshots, id_, replace(row.value, state=SnapshotState.COMPLETE), row.generation)
        if row.value.kind in HISTORY:
            vm = await env.records.vms.need(context.vm_id)
            draft.put(env.records.vms, context.vm_id, replace(vm.value, snapshot=id_), vm.generation)

    await env.records.transact(write)


def result(context: Context) -> dict[str, Any]:
    captured = _captured(context)
    return {
        "id": _id(context),
        "pause_s": context.outputs.get("go-on"),
        "lost": list(context.output("look", Look).lost),
        "expected": context.outputs.get("forecast"),
        "changed": captured.changed if captured is not None else 0,
        "frozen": context.outputs.get("quiesce"),
        "thawed": context.outputs.get("thaw", True),
    }


STEPS = (
    Step("record", record, undo_record, words="noting it"),
    Step("look", look, words="looking at the machine"),
    Step("forecast", forecasting.forecast, words="seeing what it will take"),
    Step("freeze", freeze, undo_freeze, words="making new layers for its disks"),
    Step("spare", spare, undo_spare, timeout_s=3600.0, words="starting the machine that goes on"),
    Step("quiesce", quiescing.freeze, quiescing.undo_freeze, words="freezing the guest's file systems"),
    Step("hold", hold, undo_hold, cancellable=False, words="taking its state"),
    Step("go-on", go_on, undo_go_on, cancellable=False, words="letting it go on"),
    Step("thaw", quiescing.thaw, cancellable=False, follows=True, words="thawing the guest's file systems"),
    Step("keep", keep, cancellable=False, follows=True, words="keeping its state"),
    Step("save", save, timeout_s=7200.0, words="writing it to disk"),
    Step("finish", finish, cancellable=False, words="letting go of what it needed"),
)

DEFINITION = Definition(
    verb=VmVerb.SNAPSHOT,
    noun="vm",
    params=Take,
    plan=plan,
    steps=lambda _: STEPS,
    state_verb=VmVerb.SNAPSHOT,
    result=result,
    anchored=True,
)
