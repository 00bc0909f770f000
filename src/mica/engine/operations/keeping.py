"""What a snapshot leaves behind: layers below the disks of its VM, and parts on disk with their checksums."""

from __future__ import annotations

import msgspec

from mica.engine.damage import closure, read_parts
from mica.engine.definition import Context
from mica.engine.operations.capturing import Look, captured_in, snapshot_id, snapshot_of, status_of, went_on
from mica.engine.records import Draft
from mica.engine.snapshots import part_id, put_parts
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
from mica.model.units import Bytes
from mica.model.vm import NVRAM, DiskSpec, Vm, VmRuntime, VmSpec
from mica.ports.volumes import Volume

replace = msgspec.structs.replace


def layered_disks(spec: VmSpec) -> list[DiskSpec]:
    """What gets layers: disks that are written, and the UEFI variables."""
    disks = [d for d in spec.disks if not d.read_only]
    if spec.firmware is Firmware.UEFI:
        disks.append(DiskSpec(name=NVRAM, size=Bytes(0)))
    return disks


async def freeze(context: Context) -> list[Volume]:
    """Parts and layers over them; nothing changes for the machine yet. Returns the layers."""
    env, snapshot, found = context.env, await snapshot_of(context), context.output("look", Look)
    vm = (await env.records.vms.need(context.vm_id)).value
    runtime = (await status_of(context)).runtime
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
    if await went_on(context):
        return
    await env.branches.unstage(context.vm_id)
    snapshot = await env.records.snapshots.get(snapshot_id(context))
    mine = snapshot.value.disks if snapshot else {}
    bases = {id_: row.value.base for id_, row in (await env.records.parts.scan()).items()}

    def back(vm: Vm) -> Vm:
        kept = {d: bases.get(p, "") if mine.get(d) == p else p for d, p in vm.layers.items()}
        return replace(vm, layers={d: p for d, p in kept.items() if p})

    await env.records.vms.update(context.vm_id, back)


async def keep(context: Context) -> None:
    """What was captured becomes parts: from here others may begin at this state."""
    env, id_, captured = context.env, snapshot_id(context), captured_in(context)
    memory = (await snapshot_of(context)).memory
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
    env, snapshot = context.env, await snapshot_of(context)
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
    env, id_ = context.env, snapshot_id(context)
    await env.parts.drop_scratch(id_)

    async def write(draft: Draft) -> None:
        row = await env.records.snapshots.need(id_)
        draft.put(env.records.snapshots, id_, replace(row.value, state=SnapshotState.COMPLETE), row.generation)
        if row.value.kind in HISTORY:
            vm = await env.records.vms.need(context.vm_id)
            draft.put(env.records.vms, context.vm_id, replace(vm.value, snapshot=id_), vm.generation)

    await env.records.transact(write)
