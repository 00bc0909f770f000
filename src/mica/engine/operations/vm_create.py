"""``vm.create``: the rows within the accepting transaction, then the volumes; with ``start``, up as ``vm.start`` does.

When anything fails, nothing of the VM is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from mica.engine.admission import Ways
from mica.engine.boots import Hidden
from mica.engine.definition import Context, Definition, Env, Proposal, Step
from mica.engine.operations.booting import begin_booted, hidden_vm
from mica.engine.operations.copying import ORIGIN, UNTIE, copy_of, yet_to_become
from mica.engine.operations.placing import free_name, free_slot
from mica.engine.operations.reserving import image_of, reserve
from mica.engine.operations.standing import held_vm, take
from mica.engine.operations.starting import HOLD, START
from mica.engine.records import Claim, Draft, ImageRow
from mica.engine.settle import moved, set_state, take_down
from mica.engine.snapshots import draft_remove
from mica.engine.standbys import Held
from mica.model.errors import Code, MicaError, invalid
from mica.model.image import Firmware, Image
from mica.model.mac import mac_address
from mica.model.operation import Operation
from mica.model.snapshot import LASTING
from mica.model.transitions import VmVerb
from mica.model.units import MIB, Bytes, format_size
from mica.model.views import VmCreate
from mica.model.vm import (
    NVRAM,
    DiskSpec,
    Machine,
    NicSpec,
    Power,
    Vm,
    VmObserved,
    VmSpec,
    VmState,
    VmStatus,
    check_labels,
    check_name,
    check_spec,
)
from mica.ports.store import ABSENT
from mica.ports.volumes import Volume

replace = msgspec.structs.replace

DEFAULT_MEMORY = Bytes(256 * MIB)


def with_macs(vm_id: str, nics: Sequence[NicSpec]) -> tuple[NicSpec, ...]:
    return tuple(n if n.mac else replace(n, mac=mac_address(vm_id, n.name)) for n in nics)


async def template_meant(env: Env, ref: str) -> str:
    """The id of the template that is called ``ref``, unless an image is; empty when there is none."""
    claim = await env.records.template_names.get(ref) if ref else None
    if claim is None or any(row.value.image.name == ref for row in (await env.records.images.scan()).values()):
        return ""
    return claim.value.holder


async def find_image(env: Env, ref: str) -> ImageRow | None:
    """The image meant by a name or the beginning of a digest; ``None`` for an empty ``ref``. Raises ``not-found``."""
    if not ref:
        return None
    rows = [row.value for row in (await env.records.images.scan()).values()]
    named = sorted((r for r in rows if r.image.name == ref), key=lambda r: r.image.created_at)
    if named:
        return named[-1]
    digest = ref.removeprefix("blake3:")
    hits = [r for r in rows if len(digest) >= 8 and r.image.digest.removeprefix("blake3:").startswith(digest)]
    if len(hits) == 1:
        return hits[0]
    have = ", ".join(sorted({r.image.name for r in rows})) or "none yet"
    raise MicaError(
        Code.NOT_FOUND,
        f"there is no image {ref!r} on this host",
        hint=f"there are: {have}; `mica image build micro` and `mica image build debian` make two",
        details={"noun": "image", "key": ref},
    )


def make_spec(vm_id: str, body: VmCreate, image: Image | None) -> VmSpec:
    """The spec that ``body`` asks for, with the image's needs. Raises ``invalid`` naming field and limit."""
    disks = list(body.disks)
    if image is not None and image.disk is not None:
        size = body.disk if body.disk is not None else image.disk_size
        if size < image.disk_size:
            raise invalid(
                f"a disk of {format_size(size)} is below the {format_size(image.disk_size)} of image {image.name}",
                hint=f"leave --disk out, or give at least {format_size(image.disk_size)}",
            )
        disks.insert(0, DiskSpec(name="root", size=Bytes(size), image=image.digest))
    elif body.disk is not None:
        disks.insert(0, DiskSpec(name="root", size=body.disk))
    floor = image.min_memory if image else Bytes(0)
    memory = body.memory if body.memory is not None else Bytes(max(DEFAULT_MEMORY, floor))
    if image is not None and memory < floor:
        raise invalid(
            f"memory of {format_size(memory)} is below the {format_size(floor)} that image {image.name} needs",
            hint=f"give at least --memory {floor // MIB}M",
        )
    nics = body.nics if body.nics is not None else (NicSpec(publish=body.publish),)
    if body.nics is not None and body.publish:
        raise invalid("ports are published either on the NICs or on the VM, not both")
    firmware = body.firmware or (image.firmware if image else Firmware.UEFI)
    return check_spec(
        VmSpec(
            cpus=1 if body.cpus is None else body.cpus,
            memory=memory,
            machine=body.machine,
            firmware=firmware,
            cpu_model=body.cpu_model,
            cpu_limit=body.cpu_limit,
            image=image.digest if image else None,
            disks=tuple(disks),
            nics=with_macs(vm_id, nics),
            boot=body.boot,
            display=body.display and body.machine is Machine.Q35,
            agent=True,
            autostart=body.autostart,
            protected=body.protected,
            ephemeral=body.ephemeral,
            hostname=body.hostname,
            stop_timeout_s=body.stop_timeout_s,
        )
    )


async def claim_name(
    env: Env, draft: Draft, name: str, vm_id: str, hint: str = "choose another name, or delete that one first"
) -> None:
    """Take a VM name within ``draft``. Raises ``exists`` naming the holder."""
    taken = await env.records.names.get(name)
    if taken is not None and taken.value.holder != vm_id:
        raise MicaError(
            Code.EXISTS,
            f"there is a VM {name} already ({taken.value.holder[:8]})",
            hint=hint,
            details={"name": name, "id": taken.value.holder},
        )
    draft.put(env.records.names, name, Claim(vm_id, at=env.clock.now()), taken.generation if taken else ABSENT)


async def plan(proposal: Proposal) -> None:
    assert isinstance(proposal.params, VmCreate)
    env, body, vm_id = proposal.env, proposal.params, proposal.target_id
    if isinstance(body, Held):
        await admit_new(proposal, await held_vm(proposal, body))
        return
    template = "" if body.snapshot else await template_meant(env, body.image)
    if body.snapshot or template:
        wanted = replace(body, image="", snapshot=template) if template else body
        if await take(proposal, wanted):
            await claim_name(env, proposal.draft, proposal.target_name, proposal.target_id)
        else:
            await admit_new(proposal, await copy_of(proposal, wanted))
        return
    if body.full:
        raise invalid("a full copy is one of a snapshot", hint="clone the VM: `mica clone VM --full`")
    if isinstance(body, Hidden):
        await admit_new(proposal, await hidden_vm(proposal, body))
        return
    row = await find_image(env, body.image)
    if row is not None and row.damaged:
        raise MicaError(
            Code.CORRUPT,
            f"image {row.image.name} is damaged: {row.damaged}",
            hint=f"delete it and build it again: `mica image delete {row.image.name}`",
        )
    image = row.image if row else None
    spec = make_spec(vm_id, body, image)
    name = check_name(body.name, "VM name") if body.name else await free_name(env, image.name if image else "vm")
    vm = Vm(
        id=vm_id,
        name=name,
        spec=replace(spec, hostname=spec.hostname or name),
        slot=await free_slot(env),
        created_at=env.clock.now(),
        created_by=proposal.by.name,
        intent=Power.RUNNING if body.start else Power.STOPPED,
        labels=check_labels(body.labels),
        description=body.description,
        image_name=image.name if image else "",
    )
    await begin_booted(proposal, body, vm, image)
    await admit_new(proposal, vm)


async def admit_new(proposal: Proposal, vm: Vm) -> None:
    """Write the rows of a VM that is to be, and promise its memory when it is to start."""
    assert isinstance(proposal.params, VmCreate)
    env, draft = proposal.env, proposal.draft
    proposal.target_name = vm.name
    if not vm.hidden:
        await claim_name(env, draft, vm.name, vm.id)
    if vm.spec.image is not None:
        # Written anew so that deleting the image, which expects the row as it saw it, cannot cross this.
        held = await env.records.images.need(vm.spec.image)
        draft.put(env.records.images, vm.spec.image, held.value, held.generation)
    draft.put(env.records.slots, str(vm.slot), Claim(vm.id, at=vm.created_at), ABSENT)
    draft.put(env.records.vms, vm.id, vm, ABSENT)
    becoming = await yet_to_become(proposal, vm)
    status = VmStatus(observed=VmObserved(state=VmState.CREATING, since=vm.created_at), becoming=becoming)
    draft.put(env.records.statuses, vm.id, status, ABSENT)
    await env.hypervisor.check(vm.spec)
    if proposal.params.start:
        row = await env.records.snapshots.get(proposal.stored_params.get("origin") or "")
        begins = await image_of(env, row.value) if row is not None else ""
        ways = Ways(change=None if begins else "")  # it has as much memory as what it begins at
        await reserve(proposal, vm, overcommit=proposal.params.overcommit, image=begins, ways=ways)


async def erase(env: Env, vm_id: str) -> None:
    """Remove a VM's rows in one transaction. Idempotent."""

    async def write(draft: Draft) -> None:
        vm = await env.records.vms.get(vm_id)
        if vm is None:
            return
        claim = await env.records.names.get(vm.value.name)
        if claim is not None and claim.value.holder == vm_id:
            draft.delete(env.records.names, vm.value.name, claim.generation)
        # Its snapshots go with it; parts that copies lie over stay.
        of_it = [r for r in (await env.records.snapshots.scan()).values() if r.value.vm_id == vm_id]
        await draft_remove(env, draft, {r.value.id: r for r in of_it if r.value.kind not in LASTING})
        draft.delete(env.records.slots, str(vm.value.slot))
        draft.delete(env.records.standbys, vm_id)
        draft.delete(env.records.vms, vm_id, vm.generation)
        draft.delete(env.records.statuses, vm_id)

    await env.records.transact(write)


async def undo_record(context: Context) -> None:
    await context.env.hypervisor.erase(context.vm_id)
    await context.env.records.release(context.vm_id)
    await erase(context.env, context.vm_id)


async def undo_take(context: Context) -> None:
    """It goes with all that it had while it stood by: another one will."""
    await take_down(context.env, context.vm_id, clean=False)
    await context.env.volumes.remove(context.vm_id)
    await undo_record(context)


async def record(context: Context) -> None:
    """The rows were written when the request was accepted; this step is where taking them back is anchored."""


async def make_volumes(context: Context) -> list[Volume]:
    env = context.env
    vm = (await env.records.vms.need(context.vm_id)).value
    volumes: list[Volume] = []
    disks = [*vm.spec.disks, *([DiskSpec(name=NVRAM, size=Bytes(0))] if NVRAM in vm.layers else [])]
    for disk in disks:
        base = None
        if disk.name in vm.layers:
            base = env.parts.path(vm.layers[disk.name])
        elif disk.image is not None:
            image = (await env.records.images.need(disk.image)).value.image
            assert image.disk is not None
            base = env.images.path(image, image.disk)
        context.report(None, f"making disk {disk.name}")
        if context.operation.params.get("full") and disk.name in vm.layers and base is not None:

            def report(fraction: float, name: str = disk.name, before: int = len(volumes)) -> None:
                context.report((before + fraction) / len(disks), f"copying disk {name}")

            volumes.append(await env.volumes.copy(vm.id, disk, base, report))
        else:
            volumes.append(await env.volumes.create(vm.id, disk, base))
    return volumes


async def undo_volumes(context: Context) -> None:
    await context.env.volumes.remove(context.vm_id)


async def finish(context: Context) -> None:
    await set_state(context.env, context.vm_id, lambda o: moved(context.env, o, VmState.STOPPED, "created"))


CREATE = (
    Step("record", record, undo_record, words="writing it down"),
    Step("volumes", make_volumes, undo_volumes, timeout_s=7200.0, words="making its disks"),
    Step("finish", finish, cancellable=False, words="handing it over"),
)


TAKE = (Step("record", record, undo_take, words="writing it down"), START[-1])


def steps(operation: Operation) -> Sequence[Step]:
    if operation.params.get("taken"):
        return TAKE
    create = (CREATE[0], ORIGIN, *CREATE[1:]) if operation.params.get("snapshot") else CREATE
    if operation.params.get("full"):
        create = (*create[:-1], UNTIE, create[-1])
    if operation.params.get("held"):
        return (*create, *HOLD)
    return (*create, *START) if operation.params.get("start") else create


def result(context: Context) -> dict[str, Any]:
    return {"id": context.vm_id, "name": context.operation.target_name}


DEFINITION = Definition(
    verb=VmVerb.CREATE,
    noun="vm",
    params=VmCreate,
    plan=plan,
    steps=steps,
    result=result,
    creates=True,
    anchored=True,
)
