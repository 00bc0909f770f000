"""Volumes as files in a directory (:mod:`mica.storage.layout` says how they are named).

                     create                    prepare               settled
    (nothing) ──► .<disk>.tmp ──► volume ──► volume + running ──► volume
                                     ▲              │ no settled: the next prepare checks the metadata first
                                     └──────────────┘

``running`` is a file beside the volumes: a run has begun and has not ended in order.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from mica.model.errors import Code, MicaError, invalid
from mica.model.image import DiskFormat, Firmware
from mica.model.units import Bytes, format_size
from mica.model.vm import NVRAM, DiskSpec, check_name
from mica.ports.volumes import Volume
from mica.storage.chain import Record, compare, damaged, read_layer, require_unused, written
from mica.storage.files import (
    DEFAULT_RESERVE,
    file_system_size,
    fresh,
    give_up,
    hand_over,
    in_thread,
    naming,
    put_in_place,
    reflink,
    together,
    write_whole,
)
from mica.storage.layout import EMPTY_QCOW2, VM_ID, Layout, check_depth, no_volume, unknown
from mica.storage.qcow2 import is_qcow2
from mica.storage.qemu_img import QemuImg


class DirectoryVolumes:
    """:class:`mica.ports.volumes.Volumes` below ``root``.

    ``qemu_img`` is the program's path (empty where the host has none). ``ovmf_vars_template`` is the variable store
    that new UEFI machines begin with. ``bases`` are the directories in which base images may lie; an image that names
    a file elsewhere is refused. ``parts`` is where layers of snapshots lie, which may be bases too. ``reserve`` is what
    is left free for the host, but at most a twentieth of it all.
    """

    def __init__(
        self,
        root: Path,
        qemu_img: str,
        ovmf_vars_template: Path | None,
        *,
        bases: Sequence[Path] = (),
        parts: Path | None = None,
        reserve: Bytes = DEFAULT_RESERVE,
    ) -> None:
        self._layout = Layout(root, parts, bases, reserve)
        self._root = self._layout.root
        self._qemu_img = QemuImg(qemu_img)
        self._template = ovmf_vars_template

    async def create(self, vm_id: str, disk: DiskSpec, base: Path | None) -> Volume:
        """See the protocol. ``disk`` may be the UEFI variables, which are as large as their ``base``.

        Raises ``invalid`` too: a disk smaller than its base; ``state-conflict``: a base with too many layers.
        """
        disk, record = self._describe(disk, base)

        async def fill(temporary: Path) -> None:
            await self._fill(temporary, disk, record)

        return await self._make(vm_id, disk, record, await self._needed(disk, record), fill)

    async def copy(self, vm_id: str, disk: DiskSpec, source: Path, report: Callable[[float], None]) -> Volume:
        """See the protocol. The copy is as large as ``source``; preparing it grows it."""
        ground = self._layout.ground(source)
        disk = msgspec.structs.replace(disk, size=Bytes(max(ground.size, disk.size)), format=DiskFormat.QCOW2)

        async def fill(temporary: Path) -> None:
            await self._qemu_img.convert(ground.path, ground.format, temporary, disk.format, ground.size, report)

        needed = await self._qemu_img.required(ground.path, ground.format, disk.format)
        return await self._make(vm_id, disk, Record(disk.format), needed, fill)

    async def _make(
        self, vm_id: str, disk: DiskSpec, record: Record, needed: int, fill: Callable[[Path], Awaitable[None]]
    ) -> Volume:
        """The volume that ``record`` describes, made by ``fill`` unless it is there; ``needed`` bytes for that."""
        check_name(disk.name, "disk name")
        directory = self._layout.directory(vm_id)
        if (present := self._find(directory, disk)) is not None:
            if not present.same_as(record):
                path = self._layout.file(directory, disk.name, present)
                raise damaged(path, f"it is not a {disk.format} disk made from {record.base or 'nothing'}")
            return self._look(directory, disk)
        path = self._layout.file(directory, disk.name, record)
        temporary = path.with_name(f".{path.name}.tmp")
        with naming(path):
            self._root.mkdir(mode=0o711, parents=True, exist_ok=True)
            self._need_space(needed, disk)
            self._layout.make_directory(directory)
            try:
                fresh(temporary)
                await fill(temporary)
                # First what is known of it: a volume without its record would be nobody's.
                about = self._layout.record_file(directory, disk.name)
                await in_thread(write_whole, about, msgspec.json.encode(record))
                await in_thread(put_in_place, temporary, path)
            except BaseException:
                give_up(temporary)
                raise
        return self._look(directory, disk)

    async def prepare(
        self, vm_id: str, disks: tuple[DiskSpec, ...], owner: tuple[int, int] | None
    ) -> tuple[Volume, ...]:
        """See the protocol. Raises ``invalid`` too: a disk that is larger than its spec, for none is ever shrunk."""
        directory = self._layout.directory(vm_id)
        running = directory / "running"
        unclean = running.exists()
        volumes = await together([self._ready(directory, disk, unclean) for disk in disks])
        nvram = self._variables(directory) if unclean else None
        # Where a machine runs on them, another is being got ready beside it; else :meth:`nvram` says who has them.
        if nvram is not None and not written(nvram.path):
            await self._qemu_img.check(nvram.path, nvram.size)
        with naming(directory):
            if directory.exists() and not unclean:
                await in_thread(write_whole, running, b"")
            for volume in volumes:
                hand_over(volume.path, owner)
        return tuple(volumes)

    async def settled(self, vm_id: str) -> None:
        with naming(self._root):
            (self._layout.directory(vm_id) / "running").unlink(missing_ok=True)

    async def nvram(self, vm_id: str, firmware: Firmware, owner: tuple[int, int] | None) -> Volume | None:
        """See the protocol. Raises ``host-lacks`` where there is no OVMF."""
        if firmware is not Firmware.UEFI:
            return None
        directory = self._layout.directory(vm_id)
        with naming(directory):
            if (found := self._variables(directory)) is None:
                await self._make_nvram(directory)
                # A VM without disks gets its directory only here, after prepare.
                await in_thread(write_whole, directory / "running", b"")
                found = self._variables(directory)
                assert found is not None
            require_unused(found.path, writing=True)
            hand_over(found.path, owner)
        return found

    async def remove(self, vm_id: str) -> None:
        directory = self._layout.directory(vm_id)
        with naming(directory):
            if directory.exists():
                await in_thread(shutil.rmtree, directory)

    async def usage(self, vm_id: str) -> Bytes:
        directory = self._layout.directory(vm_id)
        with naming(directory):
            if not directory.exists():
                return Bytes(0)
            # st_blocks is in units of 512 bytes whatever the file system's own block size (inode(7)).
            return Bytes(sum(file.stat(follow_symlinks=False).st_blocks * 512 for file in os.scandir(directory)))

    async def owners(self) -> set[str]:
        with naming(self._root):
            if not self._root.exists():
                return set()
            entries = os.scandir(self._root)
            return {
                entry.name for entry in entries if VM_ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            }

    # Making volumes.

    def _need_space(self, needed: int, disk: DiskSpec | None = None) -> None:
        self._layout.need_space(needed)
        total = file_system_size(self._root)
        if disk is not None and disk.size > total:
            raise MicaError(
                Code.INSUFFICIENT_DISK,
                f"disk {disk.name} of {format_size(disk.size)} is larger than the whole file system of {self._root}, "
                f"{format_size(total)}",
                hint="make the disk smaller, or keep it on a larger file system",
                details={"size": disk.size, "total": total},
            )

    def _describe(self, disk: DiskSpec, base: Path | None) -> tuple[DiskSpec, Record]:
        """What the volume will be. Raises ``not-found``, ``corrupt``, ``invalid``, ``state-conflict``."""
        if base is None:
            return disk, Record(disk.format)
        ground = self._layout.ground(base)
        if disk.name == NVRAM:  # firmware takes variables of its own size only
            disk = msgspec.structs.replace(disk, size=ground.size, format=DiskFormat.QCOW2)
        if disk.format is DiskFormat.QCOW2:
            check_depth(disk.name, ground)
        if ground.size > disk.size:
            raise invalid(
                f"disk {disk.name} of {format_size(disk.size)} is smaller than its image of {format_size(ground.size)}",
                hint=f"give it at least {ground.size} bytes",
                name=disk.name,
                size=disk.size,
                needed=ground.size,
            )
        return disk, Record(disk.format, str(ground.path), ground.format)

    async def _needed(self, disk: DiskSpec, record: Record) -> int:
        if disk.format is DiskFormat.QCOW2:
            return EMPTY_QCOW2
        if not record.base:
            return 0
        return await self._qemu_img.required(Path(record.base), record.base_format, DiskFormat.RAW)

    async def _fill(self, temporary: Path, disk: DiskSpec, record: Record) -> None:
        base = Path(record.base) if record.base else None
        if disk.format is DiskFormat.QCOW2:
            await self._qemu_img.create(temporary, disk.size, base, record.base_format)
            return
        if base is not None and not (record.base_format is DiskFormat.RAW and reflink(base, temporary)):
            await self._qemu_img.convert(base, record.base_format, temporary, DiskFormat.RAW, disk.size)
        os.truncate(temporary, disk.size)

    async def _make_nvram(self, directory: Path) -> None:
        if self._template is None or not self._template.is_file():
            raise MicaError(
                Code.HOST_LACKS,
                "this host has no UEFI firmware (OVMF)"
                if self._template is None
                else f"the template of UEFI variables {self._template} is not there",
                hint="install it: apt-get install -y ovmf; or use --firmware bios",
            )
        self._root.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._need_space(2 * EMPTY_QCOW2)
        self._layout.make_directory(directory)
        path = self._layout.file(directory, NVRAM, Record(DiskFormat.QCOW2))
        temporary = path.with_name(f".{path.name}.tmp")
        format_ = DiskFormat.QCOW2 if is_qcow2(self._template) else DiskFormat.RAW
        try:
            fresh(temporary)
            size = read_layer(self._template.resolve(), format_).size
            await self._qemu_img.convert(self._template, format_, temporary, DiskFormat.QCOW2, size)
            await in_thread(put_in_place, temporary, path)
        except BaseException:
            give_up(temporary)
            raise

    # Looking at volumes.

    def _find(self, directory: Path, disk: DiskSpec) -> Record | None:
        """The record of a volume whose file is there. Raises ``corrupt`` when there is a file without a record."""
        record = self._layout.find(directory, disk.name)
        if record is not None:
            return record if self._layout.file(directory, disk.name, record).exists() else None
        if any(self._layout.file(directory, disk.name, Record(format_)).exists() for format_ in DiskFormat):
            raise unknown(self._layout.record_file(directory, disk.name))
        return None

    def _look(self, directory: Path, disk: DiskSpec) -> Volume:
        """The volume as it is. Raises ``not-found``, ``corrupt``, ``in-use``, ``invalid``."""
        record = self._find(directory, disk)
        if record is None:
            raise no_volume(self._layout.file(directory, disk.name, Record(disk.format)))
        volume = self._as_made(directory, disk, record)
        require_unused(volume.path, writing=not disk.read_only)
        if volume.size > disk.size:
            raise invalid(
                f"{volume.path} has {format_size(volume.size)}; a disk is never shrunk to {format_size(disk.size)}",
                hint=f"set its size to {volume.size} bytes or more",
                name=disk.name,
                size=volume.size,
            )
        return volume

    def _as_made(self, directory: Path, disk: DiskSpec, record: Record) -> Volume:
        """The volume, if it is what it was made as. Raises ``corrupt``, ``in-use`` for a file below."""
        path = self._layout.file(directory, disk.name, record)
        # The header is compared before anything that it names is opened.
        compare(read_layer(path, record.format), record)
        top, *below = self._layout.chain(path, record.format)
        return Volume(
            name=disk.name,
            path=path,
            format=record.format,
            size=top.size,
            backing=tuple(layer.path for layer in below),
            read_only=disk.read_only,
        )

    def _variables(self, directory: Path) -> Volume | None:
        """The UEFI variables as they are. Raises ``corrupt``, ``in-use`` for a file below."""
        disk = DiskSpec(name=NVRAM, size=Bytes(0))
        record = self._find(directory, disk)
        return None if record is None else self._as_made(directory, disk, record)

    async def _ready(self, directory: Path, disk: DiskSpec, unclean: bool) -> Volume:
        volume = self._look(directory, disk)
        if unclean and volume.format is DiskFormat.QCOW2:
            await self._qemu_img.check(volume.path, volume.size)
        if volume.size < disk.size:
            self._need_space(EMPTY_QCOW2, disk)
            await self._qemu_img.resize(volume.path, volume.format, disk.size)
            volume = msgspec.structs.replace(volume, size=disk.size)
        return volume
