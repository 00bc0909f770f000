"""``vm start --last-valid``: a VM that cannot start because of damage goes back to its last valid snapshot.

    salvage ──► set aside ──► go back ──► start as ever

It is looked at whether that is needed, and what can be trusted. What is damaged becomes a snapshot of its own: nothing
is lost, and where a layer below is restored one day, it can be gone back to.

A snapshot counts as valid when every part of it and below it has just been read and is as it was written.
"""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from mica.engine.damage import DAMAGE, check, closure, last_valid, read_parts, sound
from mica.engine.definition import Context, Env, Proposal, Step
from mica.engine.operations.keeping import layered_disks
from mica.engine.operations.reserving import reserve
from mica.engine.operations.starting import prepared
from mica.engine.records import Claim, Draft
from mica.engine.snapshots import part_id
from mica.model.errors import Code, MicaError
from mica.model.snapshot import Part, PartKind, Snapshot, SnapshotKind, SnapshotState
from mica.model.units import Bytes
from mica.model.vm import NVRAM, Vm, VmSpec, as_of
from mica.ports.store import ABSENT

replace = msgspec.structs.replace

STEM = "damaged"


class Back(msgspec.Struct, frozen=True, kw_only=True):
    """Where the VM goes back to, and why. ``origin`` is empty when it boots there, without the memory of then.
    ``below``: what is damaged lies below its own files."""

    snapshot: str
    name: str
    why: str
    spec: VmSpec
    origin: str = ""
    below: bool = False


async def reserve_most(proposal: Proposal, vm: Vm, *, overcommit: bool) -> None:
    """Admit the VM as it is, or as it was at any snapshot that it may come to go back to."""
    then = [snapshot.spec for snapshot in await last_valid(proposal.env, vm)]
    most = replace(
        vm.spec,
        memory=Bytes(max(spec.memory for spec in (vm.spec, *then))),
        cpus=max(spec.cpus for spec in (vm.spec, *then)),
    )
    await reserve(proposal, replace(vm, spec=most), overcommit=overcommit)
    proposal.stored_params = {**proposal.stored_params, "spec": msgspec.to_builtins(vm.spec)}


async def salvage(context: Context) -> Back | None:
    """``None`` when the VM can start as it is. Raises ``corrupt`` when there is nothing to go back to."""
    env = context.env
    vm = (await env.records.vms.need(context.vm_id)).value
    now = replace(vm, spec=msgspec.convert(context.operation.params["spec"], VmSpec))
    try:
        await prepared(env, now)
    except MicaError as error:
        if error.code not in DAMAGE:
            raise
        return await _choose(context, now, error)
    # It has just been looked at, and is as after a clean end.
    await env.volumes.settled(vm.id)
    return None


async def _choose(context: Context, vm: Vm, why: MicaError) -> Back:
    env, tried = context.env, []
    for snapshot in await last_valid(env, vm):
        if not await _is_whole(context, snapshot):
            tried.append(snapshot.name)
            continue
        resumes = snapshot.memory is not None and not context.operation.params.get("paused", False)
        return Back(
            snapshot=snapshot.id,
            name=snapshot.name,
            why=why.message,
            spec=as_of(snapshot.spec, vm.spec),
            origin=snapshot.id if resumes else "",
            below=await _is_below(env, vm),
        )
    found = f"; found damaged just now: {', '.join(tried)}" if tried else ""
    raise MicaError(
        Code.CORRUPT,
        f"VM {vm.name} cannot start: {why.message}. It has no valid snapshot{found}",
        hint=why.hint,
        details=why.details,
    ) from why


async def _is_whole(context: Context, snapshot: Snapshot) -> bool:
    parts = await read_parts(context.env)
    for id_ in closure(parts, snapshot.parts):

        def report(fraction: float, part: Part = parts[id_]) -> None:
            context.report(fraction, f"reading {part.kind} {part.name} of snapshot {snapshot.name}")

        if await check(context.env, parts[id_], report):
            return False
    return True


async def _is_below(env: Env, vm: Vm) -> bool:
    try:
        await sound(env, vm)
    except MicaError as error:
        if error.code not in DAMAGE:
            raise
        return True
    return False


async def set_aside(context: Context) -> str:
    """What the disks are now becomes a snapshot; then they begin anew over those of the valid one. Returns its name,
    empty when there was nothing to do."""
    if context.outputs["salvage"] is None:
        return ""
    env, back = context.env, context.output("salvage", Back)
    kept = await _keep(context, back)
    for name, part in kept.disks.items():
        await env.branches.set_aside(context.vm_id, name, part)
    snapshot = (await env.records.snapshots.need(back.snapshot)).value
    owner = env.policy.owner((await env.records.vms.need(context.vm_id)).value.slot)
    for disk in layered_disks(snapshot.spec):
        if disk.name in snapshot.disks:
            context.report(None, f"making disk {disk.name}")
            await env.branches.stage(context.vm_id, disk, env.parts.path(snapshot.disks[disk.name]), owner)
    return kept.name


async def go_back(context: Context) -> None:
    """From here the VM is at the snapshot, whatever becomes of its start."""
    if context.outputs["salvage"] is None:
        return
    env, back = context.env, context.output("salvage", Back)
    disks = (await env.records.snapshots.need(back.snapshot)).value.disks
    await env.records.vms.update(
        context.vm_id, lambda vm: replace(vm, layers={**vm.layers, **disks}, spec=back.spec, snapshot=back.snapshot)
    )
    await env.branches.take(context.vm_id)
    await env.volumes.settled(context.vm_id)


def _kept_id(context: Context) -> str:
    return str(uuid.uuid5(uuid.UUID(context.operation.id), STEM))


async def _keep(context: Context, back: Back) -> Snapshot:
    """The rows of what is set aside, before any of its files. Repeated, they stay as they are."""
    env = context.env
    id_ = _kept_id(context)
    there = await env.branches.disks(context.vm_id)

    async def write(draft: Draft) -> None:
        if await env.records.snapshots.get(id_) is not None:
            return
        vm = (await env.records.vms.need(context.vm_id)).value
        disks = [disk for disk in layered_disks(vm.spec) if disk.name in there]
        parts = {disk.name: part_id(id_, PartKind.DISK, disk.name) for disk in disks}
        now = env.clock.now()
        for disk in disks:
            part = Part(
                id=parts[disk.name],
                kind=PartKind.NVRAM if disk.name == NVRAM else PartKind.DISK,
                name=disk.name,
                base=vm.layers.get(disk.name, ""),
                image=disk.image or "",
                created_at=now,
                damaged="" if back.below else back.why,
            )
            draft.put(env.records.parts, part.id, part, ABSENT)
        names = {row.value.name for row in (await env.records.snapshots.scan()).values() if row.value.vm_id == vm.id}
        name = next(name for n in range(1, len(names) + 2) if (name := f"{STEM}-{n}") not in names)
        kept = Snapshot(
            id=id_,
            vm_id=vm.id,
            vm_name=vm.name,
            name=name,
            spec=vm.spec,
            created_at=now,
            created_by=context.operation.by.name,
            kind=SnapshotKind.SAFETY,
            state=SnapshotState.COMPLETE,
            parent=vm.snapshot,
            disks=parts,
            description=f"kept aside: {back.why}"[:1000],
        )
        draft.put(env.records.snapshots, id_, kept, ABSENT)
        draft.put(env.records.snapshot_names, f"{vm.id}/{name}", Claim(id_, at=now), ABSENT)

    await env.records.transact(write)
    return (await env.records.snapshots.need(id_)).value


async def undo_set_aside(context: Context) -> None:
    """The VM is as it was, unless it has begun to go back. A file that could not even be named is in what was kept
    alone: then that stays."""
    env, id_ = context.env, _kept_id(context)
    if any(entry.step == "go-back" for entry in context.operation.journal):
        return
    await env.branches.unstage(context.vm_id)
    row = await env.records.snapshots.get(id_)
    if row is None or not row.value.disks.keys() <= await env.branches.disks(context.vm_id):
        return
    draft = Draft()
    draft.delete(env.records.snapshot_names, f"{row.value.vm_id}/{row.value.name}")
    draft.delete(env.records.snapshots, id_, row.generation)
    for part in row.value.disks.values():
        draft.delete(env.records.parts, part)
    await env.records.commit(draft)
    for part in row.value.disks.values():
        await env.parts.remove(part)


async def undo_go_back(context: Context) -> None:
    """There is no way back from half way."""
    await go_back(context)


def result(context: Context) -> dict[str, Any]:
    """What ``vm.start`` tells of it."""
    if context.outputs.get("salvage") is None:
        return {}
    back = context.output("salvage", Back)
    return {"went_back_to": back.name, "because": back.why, "kept_aside": context.outputs["set-aside"]}


SALVAGE = (
    Step("salvage", salvage, timeout_s=7200.0, words="looking for what can be trusted"),
    Step("set-aside", set_aside, undo_set_aside, words="keeping aside what is damaged"),
    Step("go-back", go_back, undo_go_back, cancellable=False, words="putting its disks back"),
)
