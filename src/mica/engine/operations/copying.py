"""A new VM that begins as another one was: what ``vm.create`` does with a snapshot."""

from __future__ import annotations

import msgspec
import structlog

from mica.engine.definition import Context, Proposal, Step
from mica.engine.operations.placing import free_name, free_slot
from mica.engine.snapshots import COLD, check_parts, need_whole, until, word
from mica.model.errors import Code, MicaError, invalid, not_found
from mica.model.identity import Identity
from mica.model.mac import mac_address
from mica.model.snapshot import Snapshot, SnapshotKind, SnapshotState
from mica.model.views import VmCreate
from mica.model.vm import Machine, NicSpec, Power, Vm, VmSpec, check_labels, check_name, check_spec

log = structlog.get_logger()
replace = msgspec.structs.replace


async def copy_of(proposal: Proposal, body: VmCreate) -> Vm:
    """The VM that begins at ``body.snapshot``. Raises ``not-found``, ``corrupt``, ``invalid`` naming what it cannot
    have otherwise than its original."""
    env, vm_id = proposal.env, proposal.target_id
    row = await env.records.snapshots.get(body.snapshot)
    if row is None:
        raise not_found("snapshot", body.snapshot, hint="`mica snapshot list` lists them all")
    snapshot = row.value
    if snapshot.kind is SnapshotKind.SUSPEND:
        raise MicaError(
            Code.STATE_CONFLICT,
            f"VM {snapshot.vm_name} is suspended: its memory is for it alone",
            hint=f"resume it and fork it then: `mica vm resume {snapshot.vm_name}`",
        )
    await need_whole(env, snapshot)
    _check_same(body, snapshot)
    # Written anew, so that deleting the snapshot, which expects the row as it saw it, cannot cross this.
    proposal.draft.put(env.records.snapshots, snapshot.id, snapshot, row.generation)
    proposal.stored_params = {"snapshot": snapshot.id, "origin": snapshot.id if body.start else ""}
    is_template = snapshot.kind is SnapshotKind.TEMPLATE
    parent = None if is_template else await env.records.vms.get(snapshot.vm_id)
    image = await env.records.images.get(snapshot.spec.image) if snapshot.spec.image else None
    stem = snapshot.name if is_template else f"{snapshot.vm_name}-{'fork' if body.start else 'clone'}"
    name = check_name(body.name, "VM name") if body.name else await free_name(env, stem)
    return Vm(
        id=vm_id,
        name=name,
        spec=_spec(vm_id, name, body, snapshot.spec),
        slot=await free_slot(env),
        created_at=env.clock.now(),
        created_by=proposal.by.name,
        intent=Power.RUNNING if body.start else Power.STOPPED,
        labels=check_labels(body.labels) or (parent.value.labels if parent else {}),
        description=body.description,
        image_name=image.value.image.name if image else "",
        snapshot=snapshot.id if snapshot.kind is not SnapshotKind.FORK else "",
        forked_from=snapshot.name if is_template else snapshot.vm_name,
    )


def _check_same(body: VmCreate, snapshot: Snapshot) -> None:
    """What a machine is made of is in the state that it begins at. Raises ``invalid``."""
    spec = snapshot.spec
    wanted: dict[str, tuple[object, object]] = {
        "--image": (body.image or None, None),
        "--disk": (body.disk or body.disks or None, None),
        "--network": (body.nics, None),
        "--machine": (body.machine if body.machine is not Machine.Q35 else None, spec.machine),
        "--firmware": (body.firmware, spec.firmware),
        "--no-display": (None if body.display else False, spec.display),
    }
    if snapshot.memory is not None:
        wanted |= {
            "--cpus": (body.cpus, spec.cpus),
            "--memory": (body.memory, spec.memory),
            "--cpu-model": (body.cpu_model or None, spec.cpu_model),
        }
    for option, (new, old) in wanted.items():
        if new is not None and new != old:
            raise invalid(
                f"{option} cannot differ from what {word(snapshot)} has",
                hint="leave it out, and set it afterwards (`mica vm set`), for the next start",
            )


def _spec(vm_id: str, name: str, body: VmCreate, old: VmSpec) -> VmSpec:
    """The same machine with a name, addresses and ports of its own."""
    nics = tuple(_nic(vm_id, nic) for nic in old.nics)
    if body.publish and nics:
        nics = (replace(nics[0], publish=body.publish), *nics[1:])
    new = replace(
        old,
        cpus=old.cpus if body.cpus is None else body.cpus,
        memory=old.memory if body.memory is None else body.memory,
        cpu_model=body.cpu_model or old.cpu_model,
        nics=nics,
        hostname=body.hostname or name,
        cpu_limit=body.cpu_limit if body.cpu_limit is not None else old.cpu_limit,
        autostart=body.autostart,
        protected=body.protected,
        ephemeral=body.ephemeral,
    )
    return check_spec(new)


def _nic(vm_id: str, nic: NicSpec) -> NicSpec:
    publish = tuple(replace(p, host_port=0) for p in nic.publish)
    return replace(nic, mac=mac_address(vm_id, nic.name), publish=publish)


async def origin(context: Context) -> str:
    """Wait until the disks are frozen, which may be just being done; the new VM lies over those layers from then on.

    One that starts waits for the rest when it runs; for any other nobody may write to those layers any more. Returns
    what the VM does instead, ``cold``, where its image was to have booted and that state is damaged.
    """
    state = SnapshotState.FROZEN if context.operation.params.get("start") else SnapshotState.SAVING
    snapshot = await until(context.env, context.operation.params["snapshot"], state)
    if snapshot.kind is SnapshotKind.BOOT:
        try:
            await check_parts(context.env, snapshot)
        except MicaError as error:
            log.warning("boots instead", vm=context.vm_id, error=error.message)
            return COLD
    await context.env.records.vms.update(context.vm_id, lambda vm: replace(vm, layers=snapshot.disks))
    return ""


ORIGIN = Step("origin", origin, words="waiting for the state that it begins at")


async def untie(context: Context) -> None:
    """Its disks are its own: neither the original's layers nor the images below them are needed any more."""

    def alone(vm: Vm) -> Vm:
        disks = tuple(replace(disk, image=None) if disk.name in vm.layers else disk for disk in vm.spec.disks)
        return replace(vm, spec=replace(vm.spec, disks=disks), layers={})

    await context.env.records.vms.update(context.vm_id, alone)


async def yet_to_become(proposal: Proposal, vm: Vm) -> Identity | None:
    """Who a copy is that boots: told to its guest once that answers. One that runs on is told before it does."""
    assert isinstance(proposal.params, VmCreate)
    id_ = str(proposal.stored_params.get("snapshot", ""))
    snapshot = (await proposal.env.records.snapshots.need(id_)).value if id_ else None
    if snapshot is None or (proposal.params.start and snapshot.memory is not None):
        return None
    return Identity(id=vm.id, parent_id=snapshot.vm_id, hostname=vm.spec.hostname)


UNTIE = Step("untie", untie, cancellable=False, words="letting go of the original")
