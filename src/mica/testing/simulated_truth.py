"""What must hold whenever nothing is under way: the store tells the truth about the world, and nothing is left over."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from mica.engine.admission import promise
from mica.engine.records import Claim, Records, Reservation, Versioned
from mica.engine.settle import NOT_DELETED
from mica.model.operation import OperationState
from mica.model.snapshot import Part, SnapshotState
from mica.model.vm import AgentState, Vm, VmState, VmStatus
from mica.ports.hypervisor import RunState
from mica.testing.simulated_files import PARTS
from mica.testing.simulated_world import SimulatedHost, SimulatedProcess
from mica.testing.snapshot_truth import snapshot_lies

replace = msgspec.structs.replace

UP = frozenset({VmState.RUNNING, VmState.PAUSED})
SETTLED = UP | {VmState.STOPPED, VmState.SUSPENDED, VmState.CRASHED, VmState.TRASHED}


async def lies(world: SimulatedHost, records: Records, *, stuck: bool = False, leftovers: bool = False) -> list[str]:
    """Every difference between what the store says and what is, in words; empty when all is well.

    ``stuck`` allows operations that wait for an operator, ``leftovers`` what such a one has accepted.
    """
    vms = {id_: row.value for id_, row in (await records.vms.scan()).items()}
    statuses = {id_: row.value for id_, row in (await records.statuses.scan()).items()}
    found = await _operations(records, stuck=stuck)
    if any(o.value.state is OperationState.STUCK for o in (await records.operations.scan()).values()):
        return found  # who is to decide has not decided yet, and sees what there is
    found += (
        [f"rows of {sorted(vms.keys() ^ statuses.keys())} are not complete"] if vms.keys() != statuses.keys() else []
    )
    for vm_id, status in statuses.items():
        if vm_id in vms:
            found += _vm(world, vms[vm_id], status)
    live = {vm_id for vm_id, status in statuses.items() if status.observed.state in UP}
    found += _promises((await records.read_ledger()).value.reserved, statuses, live)
    names = {name: row.value.holder for name, row in (await records.names.scan()).items()}
    if leftovers:
        names = {name: holder for name, holder in names.items() if vms[holder].deleted_at is None}
    found += [f"VM {id_} stands by and is not there" for id_ in (await records.standbys.scan()).keys() - vms.keys()]
    found += _claims(vms, names, await records.slots.scan())
    found += [f"a process of {vm_id} has no live VM" for vm_id in world.processes.keys() - live]
    if not leftovers:
        found += _left_over(world, vms, statuses, live)
    found += await _snapshots(world, records, vms, leftovers=leftovers)
    found += await snapshot_lies(world, records, leftovers=leftovers)
    rows = await records.images.scan()
    whole = {digest for digest, row in rows.items() if not row.value.damaged}
    found += [f"image {digest[:20]} has a row and no files" for digest in whole - world.images.keys()]
    if not leftovers:
        found += [f"image {digest[:20]} has files and no row" for digest in world.images.keys() - rows.keys()]
    return found


def parts(world: SimulatedHost, known: Collection[str]) -> list[str]:
    """Parts that are there and nobody knows of, that are known and not there, and layers below others that are gone.

    ``known`` are the ids of all parts that have a row and are to have a file.
    """
    there = world.storage.parts
    found = [f"part {part_id} is of nobody" for part_id in sorted(there.keys() - set(known))]
    found += [f"part {part_id} has no file" for part_id in sorted(set(known) - there.keys())]
    for path, file in world.storage.there.items():
        missing = [p.name for p in file.below if p.parent == PARTS and p.name not in there]
        found += [f"{path} lies over parts {missing}, which are gone"] if missing else []
    return found


async def _snapshots(world: SimulatedHost, records: Records, vms: Mapping[str, Vm], *, leftovers: bool) -> list[str]:
    rows = {id_: row.value for id_, row in (await records.parts.scan()).items()}
    found = []
    for snapshot in (await records.snapshots.scan()).values():
        missing = set(snapshot.value.parts) - rows.keys()
        found += [f"snapshot {snapshot.value.name} has parts {sorted(missing)}, which have no row"] if missing else []
    whole = {id_ for id_, row in (await records.snapshots.scan()).items() if row.value.state is SnapshotState.COMPLETE}
    for id_, status in (await records.statuses.scan()).items():
        if status.value.suspended is not None and status.value.suspended.snapshot not in whole:
            found.append(f"VM {id_} is suspended, and its memory is nowhere")
    for vm in vms.values():
        disks = world.volumes.get(vm.id, {}).items()
        lies_over = {name: v.backing[0].name for name, v in disks if v.backing and v.backing[0].parent == PARTS}
        # What an operator has accepted as not fully made may keep more than it needs, never less.
        kept = all(_lies_below(rows, vm.layers.get(name, ""), part) for name, part in lies_over.items())
        if lies_over != vm.layers and not (leftovers and kept):
            found.append(f"the disks of VM {vm.name} lie over {lies_over}, not over {vm.layers}")
    return found


def _lies_below(rows: Mapping[str, Part], id_: str, wanted: str) -> bool:
    """Whether ``wanted`` is that part, or a part below it."""
    while id_ != wanted and id_ in rows:
        id_ = rows[id_].base
    return id_ == wanted


async def _operations(records: Records, *, stuck: bool) -> list[str]:
    found = []
    for id_, row in (await records.operations.scan()).items():
        state = row.value.state
        if not state.ended and not (stuck and state is OperationState.STUCK):
            found.append(f"operation {row.value.verb} {id_[:8]} is {state}")
        if state.ended and row.value.ended_at is None:
            found.append(f"operation {row.value.verb} {id_[:8]} is {state} and has not ended")
    return found


def _vm(world: SimulatedHost, vm: Vm, status: VmStatus) -> list[str]:
    seen, process = status.observed, world.processes.get(vm.id)
    found = []
    half = seen.state is VmState.DELETING and seen.reason == NOT_DELETED and seen.problem is not None
    if seen.state not in SETTLED and not half:
        found.append(f"VM {vm.name} is {seen.state} with nothing under way")
    waits = process is not None and process.waits  # an operator may have accepted that it waits for that memory
    if (seen.state is VmState.SUSPENDED) != (status.suspended is not None) and not waits:
        found.append(f"VM {vm.name} is {seen.state}, its memory is in {status.suspended}")
    if (seen.state is VmState.TRASHED) != (vm.deleted_at is not None) and not half:
        found.append(f"VM {vm.name} is {seen.state}, deleted_at {vm.deleted_at}")
    if seen.state in UP:
        found += _up(vm, status, process)
    else:
        if process is not None:
            found.append(f"VM {vm.name} is {seen.state} and has process {process.ref.pid}")
        if status.runtime is not None:
            found.append(f"VM {vm.name} is {seen.state} and has a runtime")
        if seen.agent is not AgentState.ABSENT or seen.addresses or seen.started_at is not None:
            found.append(f"VM {vm.name} is {seen.state} and still shows {seen}")
    missing = {d.name for d in vm.spec.disks} - world.volumes.get(vm.id, {}).keys()
    if missing and not seen.reason.startswith("not fully"):
        found.append(f"VM {vm.name} lacks its disks {sorted(missing)}")
    return found


def _up(vm: Vm, status: VmStatus, process: SimulatedProcess | None) -> list[str]:
    if process is None or status.runtime is None:
        return [f"VM {vm.name} is {status.observed.state} without a process or a runtime"]
    found = []
    if status.runtime.process != process.ref:
        found.append(f"VM {vm.name} knows process {status.runtime.process} and has {process.ref}")
    is_running = process.run is RunState.RUNNING
    if is_running != (status.observed.state is VmState.RUNNING):
        found.append(f"VM {vm.name} is {status.observed.state} and QEMU says {process.run}")
    if process.frozen and not status.frozen:
        found.append(f"the file systems of VM {vm.name} are frozen, and nobody would thaw them")
    if process.agent is not status.observed.agent:
        found.append(f"the agent of VM {vm.name} is {process.agent} and shown as {status.observed.agent}")
    return found


def _promises(reserved: Mapping[str, Reservation], statuses: Mapping[str, VmStatus], live: set[str]) -> list[str]:
    found = [f"memory is promised to {vm_id}, which does not run" for vm_id in reserved.keys() - live]
    found += [f"no memory is promised to {vm_id}, which runs" for vm_id in live - reserved.keys()]
    for vm_id in live & reserved.keys():
        runtime = statuses[vm_id].runtime
        if runtime is None:
            continue
        # What it has for itself by now was perhaps not looked at yet.
        least = promise(runtime.spec.memory, runtime.overhead, runtime.ram)
        most = replace(least, ram=runtime.spec.memory)
        held = reserved[vm_id]
        if not least.ram <= held.ram <= most.ram or replace(held, ram=most.ram) != most:
            found.append(f"{held} is promised to {vm_id}, which is to have {least} to {most}")
    return found


def _claims(vms: Mapping[str, Vm], names: Mapping[str, str], slots: Mapping[str, Versioned[Claim]]) -> list[str]:
    wanted = {vm.name: vm.id for vm in vms.values() if vm.deleted_at is None and not vm.hidden}
    found = [f"names are claimed as {dict(names)}, not as {wanted}"] if names != wanted else []
    taken = {slot: claim.value.holder for slot, claim in slots.items()}
    used = {str(vm.slot): vm.id for vm in vms.values()}
    return [*found, f"slots are claimed as {taken}, not as {used}"] if taken != used else found


def _left_over(
    world: SimulatedHost, vms: Mapping[str, Vm], statuses: Mapping[str, VmStatus], live: set[str]
) -> list[str]:
    nics = {(vm_id, nic.name) for vm_id in live if (r := statuses[vm_id].runtime) for nic in r.nics}
    found = [f"NIC {key} of nobody" for key in world.networks.keys() - nics]
    found += [f"NIC {key} is gone" for key in nics - world.networks.keys()]
    found += [f"slice {vm_id} of nobody" for vm_id in world.slices.keys() - live]
    found += [f"slice {vm_id} is gone" for vm_id in live - world.slices.keys()]
    found += [f"volumes of {vm_id}, which does not exist" for vm_id in world.volumes.keys() - vms.keys()]
    found += [f"files of {name} that were on their way to be parts" for name in world.storage.scratch]
    found += [f"disks staged for {vm_id}, which are nobody's" for vm_id in world.storage.staged]
    found += [f"logs of {vm_id}, which does not exist" for vm_id in world.logs - vms.keys()]
    found += [f"remains of {vm_id}" for vm_id in world.remains.keys() - live]
    found += [f"a connection to {vm_id}, which does not run" for vm_id in world.connections - live]
    return found
