"""Simulated storage over a :class:`SimulatedHost`: volumes, their branches, and parts. Each file takes 1 MiB."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from mica.model.errors import Code, MicaError, not_found
from mica.model.image import DiskFormat, Firmware
from mica.model.units import MIB, Bytes, format_size
from mica.model.vm import NVRAM, DiskSpec
from mica.ports.parts import Seal
from mica.ports.volumes import Volume
from mica.storage.chain import MAX_CHAIN
from mica.testing.simulated_files import PARTS, POOL, SCRATCH, SimulatedFile
from mica.testing.simulated_world import SimulatedHost

_ALLOCATED = MIB


class SimulatedVolumes:
    """:class:`mica.ports.volumes.Volumes`."""

    def __init__(self, world: SimulatedHost) -> None:
        self._world = world
        self._files = world.storage
        self._faults = world.faults

    async def create(self, vm_id: str, disk: DiskSpec, base: Path | None) -> Volume:
        async with self._faults.around("volumes.create"):
            below = _below(self._world, disk.name, base)
            there = self._world.volumes.get(vm_id, {}).get(disk.name)
            if there is not None:
                if there.backing != below:
                    raise MicaError(Code.CORRUPT, f"{there.path} exists and is another volume")
                return there
            _take_space(self._world, f"disk {disk.name}")
            if disk.name == NVRAM and base is not None:
                size = self._files.there[base].size
                disk = msgspec.structs.replace(disk, size=size, format=DiskFormat.QCOW2)
            return self._keep(vm_id, disk, below)

    async def copy(self, vm_id: str, disk: DiskSpec, source: Path, report: Callable[[float], None]) -> Volume:
        async with self._faults.around("volumes.copy"):
            there = self._world.volumes.get(vm_id, {}).get(disk.name)
            if there is not None:
                return there
            _check_parts(self._world, (source,))
            report(0.5)
            _take_space(self._world, f"disk {disk.name}")
            size = Bytes(max(disk.size, self._files.there[source].size))
            disk = msgspec.structs.replace(disk, size=size, format=DiskFormat.QCOW2)
            volume = self._keep(vm_id, disk, ())
            self._files.there[volume.path].tokens += self._files.read(source)
            return volume

    def _keep(self, vm_id: str, disk: DiskSpec, below: tuple[Path, ...]) -> Volume:
        volume = _volume(vm_id, disk, f"{disk.name}.{disk.format}", below)
        self._files.there[volume.path] = _file(volume)
        self._world.volumes.setdefault(vm_id, {})[disk.name] = volume
        return volume

    async def prepare(
        self, vm_id: str, disks: tuple[DiskSpec, ...], owner: tuple[int, int] | None
    ) -> tuple[Volume, ...]:
        del owner
        async with self._faults.around("volumes.prepare"):
            # What nobody writes may be had twice: a machine that takes over from another is given it beside that one.
            if vm_id in self._world.processes and any(not disk.read_only for disk in disks):
                raise MicaError(Code.IN_USE, f"the volumes of {vm_id[:8]} are held by a process")
            there = self._world.volumes.get(vm_id, {})
            for disk in disks:
                if disk.name not in there:
                    raise not_found("volume", f"{vm_id}/{disk.name}")
                if damage := self._files.there[there[disk.name].path].damage:
                    raise MicaError(Code.CORRUPT, f"{there[disk.name].path}: {damage}")
                _check_parts(self._world, there[disk.name].backing)
                if there[disk.name].size < disk.size:
                    there[disk.name] = msgspec.structs.replace(there[disk.name], size=disk.size)
                    self._files.there[there[disk.name].path].size = disk.size
            if vm_id in self._world.unclean:
                self._world.checked.append(vm_id)
            if disks:
                self._world.unclean.add(vm_id)
            return tuple(there[disk.name] for disk in disks)

    async def settled(self, vm_id: str) -> None:
        async with self._faults.around("volumes.settled"):
            self._world.unclean.discard(vm_id)

    async def nvram(self, vm_id: str, firmware: Firmware, owner: tuple[int, int] | None) -> Volume | None:
        del owner
        async with self._faults.around("volumes.nvram"):
            if firmware is not Firmware.UEFI:
                return None
            there = self._world.volumes.get(vm_id, {})
            if NVRAM not in there:
                _take_space(self._world, NVRAM)
                return self._keep(vm_id, DiskSpec(name=NVRAM, size=Bytes(MIB)), ())
            _check_parts(self._world, there[NVRAM].backing)
            return there[NVRAM]

    async def remove(self, vm_id: str) -> None:
        async with self._faults.around("volumes.remove"):
            if vm_id in self._world.processes:
                raise MicaError(Code.IN_USE, f"the volumes of {vm_id[:8]} are held by a process")
            gone = [*self._world.volumes.pop(vm_id, {}).values(), *self._files.staged.pop(vm_id, {}).values()]
            self._world.disk_free += sum(self._files.remove(volume.path) for volume in gone)
            self._world.unclean.discard(vm_id)

    async def usage(self, vm_id: str) -> Bytes:
        async with self._faults.around("volumes.usage"):
            return Bytes(
                (len(self._world.volumes.get(vm_id, {})) + len(self._files.staged.get(vm_id, {}))) * _ALLOCATED
            )

    async def owners(self) -> set[str]:
        async with self._faults.around("volumes.owners"):
            return {*self._world.volumes, *self._files.staged}


class SimulatedBranches:
    """:class:`mica.ports.parts.Branches`."""

    def __init__(self, world: SimulatedHost) -> None:
        self._world = world
        self._files = world.storage
        self._faults = world.faults

    async def disks(self, vm_id: str) -> set[str]:
        async with self._faults.around("branches.disks"):
            return set(self._world.volumes.get(vm_id, {}))

    async def freeze(self, vm_id: str, disk: DiskSpec, part_id: str) -> None:
        async with self._faults.around("branches.freeze"):
            volume = self._world.volumes.get(vm_id, {}).get(disk.name)
            if volume is None:
                raise not_found("volume", f"{vm_id}/{disk.name}")
            file = self._files.there[volume.path]
            if self._files.there.setdefault(PARTS / part_id, file) is not file:
                raise MicaError(Code.EXISTS, f"part {part_id} is another file than {volume.path}")

    async def set_aside(self, vm_id: str, disk: str, part_id: str) -> None:
        async with self._faults.around("branches.set_aside"):
            volume = self._world.volumes.get(vm_id, {}).get(disk)
            if volume is not None and PARTS / part_id not in self._files.there:
                self._files.there[PARTS / part_id] = self._files.there[volume.path]

    async def merge(self, part_id: str, below: int) -> Seal:
        async with self._faults.around("branches.merge"):
            path = PARTS / part_id
            file = self._files.there[path]
            if not 1 <= below <= len(file.below):
                raise MicaError(Code.INVALID, f"{path} lies over {len(file.below)} files, not over {below}")
            _take_space(self._world, f"part {part_id}")
            gone = [self._files.there[p] for p in reversed(file.below[:below])]
            tokens = [token for one in (*gone, file) for token in one.tokens]
            merged = SimulatedFile(tokens, file.below[below:], file.size, DiskFormat.QCOW2, read_only=True)
            merged.allocated = _ALLOCATED
            self._files.there[_merging(part_id)] = merged
            return Seal(Bytes(_ALLOCATED), _digest(merged))

    async def put_merged(self, part_id: str) -> None:
        async with self._faults.around("branches.put_merged"):
            merged = self._files.there.pop(_merging(part_id), None)
            if merged is None:
                return
            path = PARTS / part_id
            gone = self._files.there[path].below
            gone = gone[: len(gone) - len(merged.below)]
            self._world.disk_free += self._files.remove(path)
            self._files.there[path] = merged
            self._forget_below(path, set(gone))

    def _forget_below(self, path: Path, gone: set[Path]) -> None:
        """What lies over the merged layer finds other files below it now."""

        def without(below: tuple[Path, ...]) -> tuple[Path, ...]:
            return tuple(p for p in below if p not in gone) if path in below else below

        for file in self._files.there.values():
            file.below = without(file.below)
        for disks in (*self._world.volumes.values(), *self._files.staged.values()):
            for name, volume in disks.items():
                disks[name] = msgspec.structs.replace(volume, backing=without(volume.backing))

    async def drop_merged(self, part_id: str) -> None:
        async with self._faults.around("branches.drop_merged"):
            self._world.disk_free += self._files.remove(_merging(part_id))

    async def stage(self, vm_id: str, disk: DiskSpec, base: Path, owner: tuple[int, int] | None) -> Volume:
        del owner
        async with self._faults.around("branches.stage"):
            below = _below(self._world, disk.name, base)
            if base not in self._files.there:
                raise not_found("image file", str(base))
            staged = self._files.staged.get(vm_id, {})
            if disk.name in staged and staged[disk.name].backing == below:
                return staged[disk.name]
            _take_space(self._world, f"disk {disk.name}")
            if disk.name in staged:
                self._drop(vm_id, disk.name)
            size = self._files.there[base].size
            wanted = msgspec.structs.replace(disk, size=size, format=DiskFormat.QCOW2)
            generation = self._files.generations.get((vm_id, disk.name), 0) + 1
            volume = _volume(vm_id, wanted, f"{disk.name}.{generation}.qcow2", below)
            self._files.there[volume.path] = _file(volume)
            self._files.staged.setdefault(vm_id, {})[disk.name] = volume
            return volume

    async def take(self, vm_id: str) -> None:
        async with self._faults.around("branches.take"):
            for name, volume in self._files.staged.pop(vm_id, {}).items():
                present = self._world.volumes.setdefault(vm_id, {}).get(name)
                if present is not None:
                    file = self._files.there[present.path]
                    self._world.disk_free += self._files.remove(present.path)
                    file.read_only = True
                self._world.volumes[vm_id][name] = volume
                key = (vm_id, name)
                self._files.generations[key] = self._files.generations.get(key, 0) + 1

    async def unstage(self, vm_id: str) -> None:
        async with self._faults.around("branches.unstage"):
            for name in list(self._files.staged.get(vm_id, {})):
                self._drop(vm_id, name)

    def _drop(self, vm_id: str, name: str) -> None:
        staged = self._files.staged[vm_id]
        self._world.disk_free += self._files.remove(staged.pop(name).path)
        if not staged:
            del self._files.staged[vm_id]


class SimulatedParts:
    """:class:`mica.ports.parts.Parts`. What is to be kept is put into ``world.storage`` by who makes it."""

    def __init__(self, world: SimulatedHost) -> None:
        self._world = world
        self._files = world.storage
        self._faults = world.faults

    def path(self, part_id: str) -> Path:
        return PARTS / part_id

    async def scratch(self, name: str) -> Path:
        async with self._faults.around("parts.scratch"):
            return SCRATCH / name

    async def drop_scratch(self, name: str) -> None:
        async with self._faults.around("parts.drop_scratch"):
            for path in [path for path in self._files.there if path.parent == SCRATCH / name]:
                self._world.disk_free += self._files.remove(path)

    async def keep(self, part_id: str, source: Path) -> None:
        async with self._faults.around("parts.keep"):
            path = self.path(part_id)
            if source not in self._files.there:
                if path in self._files.there:
                    return
                raise not_found("file", str(source))
            _take_space(self._world, f"part {part_id}")
            self._world.disk_free += self._files.remove(path)
            file = self._files.there.pop(source)
            file.read_only, file.allocated = True, _ALLOCATED
            self._files.there[path] = file

    async def need_space(self, size: Bytes) -> None:
        async with self._faults.around("parts.need_space"):
            if self._world.disk_free < size:
                free, needed = format_size(self._world.disk_free), format_size(size)
                raise MicaError(Code.INSUFFICIENT_DISK, f"{free} are free, {needed} are needed")

    async def seal(self, part_id: str, report: Callable[[float], None]) -> Seal:
        async with self._faults.around("parts.seal"):
            file = self._file(part_id)
            file.read_only = True
            report(1.0)
            return Seal(Bytes(_ALLOCATED), _digest(file))

    async def verify(
        self, part_id: str, digest: str, report: Callable[[float], None], *, rate: Bytes | None = None
    ) -> None:
        async with self._faults.around("parts.verify"):
            if rate:
                await self._world.clock.sleep(_ALLOCATED / rate)
            found = _digest(self._file(part_id))
            report(1.0)
            if found != digest:
                raise MicaError(Code.CORRUPT, f"{self.path(part_id)} is damaged: its checksum is {found}, not {digest}")

    def _file(self, part_id: str) -> SimulatedFile:
        path = self.path(part_id)
        if path not in self._files.there:
            raise not_found("part", str(path))
        return self._files.there[path]

    async def remove(self, part_id: str) -> None:
        async with self._faults.around("parts.remove"):
            self._world.disk_free += self._files.remove(self.path(part_id))

    async def present(self) -> set[str]:
        async with self._faults.around("parts.present"):
            return set(self._files.parts)


def _merging(part_id: str) -> Path:
    return SCRATCH / f"merge-{part_id}" / part_id


def _volume(vm_id: str, disk: DiskSpec, name: str, below: tuple[Path, ...]) -> Volume:
    return Volume(
        name=disk.name,
        path=POOL / vm_id / name,
        format=disk.format,
        size=disk.size,
        backing=below,
        read_only=disk.read_only,
    )


def _file(volume: Volume) -> SimulatedFile:
    return SimulatedFile(below=volume.backing, size=volume.size, format=volume.format, allocated=_ALLOCATED)


def _below(world: SimulatedHost, disk: str, base: Path | None) -> tuple[Path, ...]:
    """What a layer over ``base`` lies over. Raises ``not-found``, ``state-conflict``."""
    if base is None:
        return ()
    _check_parts(world, (base,))
    file = world.storage.there.get(base)
    below = (base, *(file.below if file is not None else ()))
    _check_parts(world, below)
    if len(below) >= MAX_CHAIN:
        raise MicaError(
            Code.STATE_CONFLICT,
            f"disk {disk} would lie over {len(below)} other files; a disk lies over at most {MAX_CHAIN - 1}",
        )
    return below


def _check_parts(world: SimulatedHost, paths: tuple[Path, ...]) -> None:
    for path in paths:
        if path.parent == PARTS and path not in world.storage.there:
            raise not_found("image file", str(path))


def _take_space(world: SimulatedHost, what: str) -> None:
    if world.disk_free < _ALLOCATED:
        free = format_size(world.disk_free)
        raise MicaError(Code.INSUFFICIENT_DISK, f"{what} does not fit: {free} is free on the host")
    world.disk_free -= _ALLOCATED


def _digest(file: SimulatedFile) -> str:
    # A layer names what it lies over, and not what is below that.
    told = repr((file.tokens, file.below[:1], file.size, file.damage))
    return "simulated:" + hashlib.sha256(told.encode()).hexdigest()
