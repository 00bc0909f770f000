"""What must hold of snapshots and their parts whenever nothing is under way, and what the reaper must have taken."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import msgspec

from mica.engine.records import Records
from mica.engine.snapshots import claim_of
from mica.model.errors import MicaError
from mica.model.snapshot import LASTING, Part, PartKind, Snapshot, SnapshotKind, SnapshotState
from mica.model.vm import Vm, VmStatus
from mica.testing.simulated_files import PARTS
from mica.testing.simulated_storage import SimulatedParts
from mica.testing.simulated_world import SimulatedHost


class Rows(msgspec.Struct, frozen=True):
    """Everything in the store that has to do with snapshots."""

    vms: Mapping[str, Vm]
    statuses: Mapping[str, VmStatus]
    snapshots: Mapping[str, Snapshot]
    names: Mapping[str, str]
    parts: Mapping[str, Part]

    def needed(self) -> set[str]:
        """Ids of the parts that something consists of, with all below them."""
        found: set[str] = set()
        roots = {part for snapshot in self.snapshots.values() for part in snapshot.parts}
        roots |= {part for vm in self.vms.values() for part in vm.layers.values()}
        roots |= {s.runtime.ram for s in self.statuses.values() if s.runtime is not None and s.runtime.ram}
        while roots:
            id_ = roots.pop()
            if id_ not in found:
                found.add(id_)
                part = self.parts.get(id_)
                roots |= {part.base} if part is not None and part.base else set()
        return found


async def _rows(records: Records) -> Rows:
    return Rows(
        vms={id_: row.value for id_, row in (await records.vms.scan()).items()},
        statuses={id_: row.value for id_, row in (await records.statuses.scan()).items()},
        snapshots={id_: row.value for id_, row in (await records.snapshots.scan()).items()},
        names={
            f"{table.kind}/{key}": row.value.holder
            for table in (records.snapshot_names, records.template_names)
            for key, row in (await table.scan()).items()
        },
        parts={id_: row.value for id_, row in (await records.parts.scan()).items()},
    )


async def snapshot_lies(world: SimulatedHost, records: Records, *, leftovers: bool = False) -> list[str]:
    """What is said of snapshots and is not so, in words; what is only not cleared away yet does not count.

    ``leftovers`` allows second machines, which an operator has accepted.
    """
    rows = await _rows(records)
    found = list(world.violations)
    found += [f"a second machine of {vm_id} is nobody's" for vm_id in world.spares if not leftovers]
    claims = [(claim_of(records, s), s.id) for s in rows.snapshots.values()]
    names = {f"{table.kind}/{key}": id_ for (table, key), id_ in claims}
    found += [f"snapshots are named {dict(rows.names)}, not {names}"] if names != rows.names else []
    for snapshot in rows.snapshots.values():
        found += await _snapshot(world, rows, snapshot)
    for id_ in sorted(rows.needed() - rows.parts.keys()):
        found.append(f"part {id_} is needed and has no row")
    for vm_id, vm in rows.vms.items():
        found += _layers(world, rows, vm)
        if vm.snapshot and vm.snapshot not in rows.snapshots:
            found.append(f"VM {vm.name} descends from a snapshot that is not there")
        ram = rows.statuses[vm_id].runtime
        if ram is not None and ram.ram and ram.ram not in world.ram_images:
            found.append(f"VM {vm.name} has memory over an image that nobody has")
    return found


async def _snapshot(world: SimulatedHost, rows: Rows, snapshot: Snapshot) -> list[str]:
    what = f"snapshot {snapshot.vm_name}/{snapshot.name}"
    lost = snapshot.vm_id not in rows.vms and snapshot.kind not in LASTING
    found = [f"{what} is of a VM that is not there"] if lost else []
    if snapshot.parent and snapshot.parent not in rows.snapshots:
        found.append(f"{what} descends from one that is not there")
    if snapshot.state is not SnapshotState.COMPLETE:
        found.append(f"{what} is {snapshot.state} with nothing under way")
        return found
    parts = [rows.parts[id_] for id_ in snapshot.parts if id_ in rows.parts]
    whole = snapshot.kind is not SnapshotKind.FORK
    # What was set aside in a hurry gets its checksums when it is scrubbed.
    sealed = whole and not snapshot.description.startswith("kept aside")
    for part in parts:
        there = part.id in world.storage.parts
        if not there and not (part.kind is PartKind.RAM and part.id in world.ram_images and not whole):
            found += [] if part.damaged else [f"{part.kind} {part.name} of {what} has no file"]
        elif sealed and not part.digest and not part.damaged:
            found.append(f"{part.kind} {part.name} of {what} has no checksum")
        elif part.digest and not part.damaged and not world.storage.parts[part.id].damage:
            found += await _changed(world, part, what)
    return found


async def _changed(world: SimulatedHost, part: Part, what: str) -> list[str]:
    try:
        await SimulatedParts(world).verify(part.id, part.digest, lambda _: None)
    except MicaError as error:
        return [f"{part.kind} {part.name} of {what}: {error.message}"]
    return []


def _layers(world: SimulatedHost, rows: Rows, vm: Vm) -> list[str]:
    """All that the VM's disks lie over is there, and in the order that the rows tell."""
    found = []
    volumes = world.volumes.get(vm.id, {})
    for name, volume in volumes.items():
        below = [path.name for path in volume.backing if path.parent == PARTS]
        gone = [part for part in below if part not in world.storage.parts]
        found += [f"disk {name} of VM {vm.name} lies over parts {gone}, which are gone"] if gone else []
        for upper, lower in itertools.pairwise(below):
            if upper in rows.parts and rows.parts[upper].base != lower:
                found.append(f"part {upper} lies over {lower}, and its row says {rows.parts[upper].base!r}")
    return found


async def litter(world: SimulatedHost, records: Records) -> list[str]:
    """What nobody needs any more: it may be there for a while, until the reaper has come round."""
    rows = await _rows(records)
    needed, there = rows.needed(), world.storage.parts
    found = [f"part {id_} has a row, and nobody needs it" for id_ in sorted(rows.parts.keys() - needed)]
    found += [f"part {id_} has a file and no row" for id_ in sorted(there.keys() - rows.parts.keys())]
    found += [f"RAM image {id_} is held, and nobody needs it" for id_ in sorted(world.ram_images.keys() - needed)]
    found += [
        f"the moment {s.name} of {s.vm_name} is past" for s in rows.snapshots.values() if s.kind is SnapshotKind.FORK
    ]
    found += [f"{p} is on its way to nobody" for p in world.storage.there if p.parent.parent.name == "scratch"]
    return found
