"""Volumes as files in a directory.

    ROOT/<vm>/<disk>.qcow2 or .raw     the volume
    ROOT/<vm>/<disk>.volume.json       what we know of it: format and base, for no guest to change
    ROOT/<vm>/nvram_vars.qcow2         the UEFI variables
    ROOT/<vm>/running                  a run has begun and has not ended in order

                     create                    prepare               settled
    (nothing) ──► .<disk>.tmp ──► volume ──► volume + running ──► volume
                                     ▲              │ no settled: the next prepare checks the metadata first
                                     └──────────────┘

Names of disks are DNS labels, so nothing here can be mistaken for a disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from mica.model.errors import Code, MicaError, invalid, not_found
from mica.model.image import DiskFormat, Firmware
from mica.model.units import MIB, Bytes, format_size
from mica.model.vm import DiskSpec, check_name
from mica.ports.volumes import Volume
from mica.storage.chain import Layer, damaged, read_chain, read_layer, require_unused
from mica.storage.files import (
    DEFAULT_RESERVE,
    file_system_size,
    in_thread,
    naming,
    need_space,
    put_in_place,
    reflink,
    sync_file,
    together,
    write_whole,
)
from mica.storage.qcow2 import is_qcow2
from mica.storage.qemu_img import QemuImg

NVRAM: Final = "nvram_vars"
_VM_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
# What an empty qcow2 image takes at most before anything is written to it: header, tables, one cluster each.
_EMPTY_QCOW2: Final = MIB


class _Record(msgspec.Struct, frozen=True):
    """What a volume was made as. ``base`` is an absolute path, empty when there is none."""

    format: DiskFormat
    base: str = ""
    base_format: DiskFormat = DiskFormat.RAW


class DirectoryVolumes:
    """:class:`mica.ports.volumes.Volumes` below ``root``.

    ``qemu_img`` is the program's path (empty where the host has none). ``ovmf_vars_template`` is the variable store
    that new UEFI machines begin with. ``bases`` are the directories in which base images may lie; an image that names
    a file elsewhere is refused. ``reserve`` is what is left free for the host, but at most a twentieth of it all.
    """

    def __init__(
        self,
        root: Path,
        qemu_img: str,
        ovmf_vars_template: Path | None,
        *,
        bases: Sequence[Path] = (),
        reserve: Bytes = DEFAULT_RESERVE,
    ) -> None:
        self._root = root.absolute()
        self._qemu_img = QemuImg(qemu_img)
        self._template = ovmf_vars_template
        self._bases = tuple(base.resolve() for base in bases)
        self._reserve = reserve

    async def create(self, vm_id: str, disk: DiskSpec, base: Path | None) -> Volume:
        """See the protocol. Raises ``invalid`` too: a disk smaller than its base."""
        check_name(disk.name, "disk name")
        record = self._describe(disk, base)
        directory = self._directory(vm_id)
        path = directory / f"{disk.name}.{disk.format}"
        for present in (directory / f"{disk.name}.{format_}" for format_ in DiskFormat):
            if present.exists():
                if self._record(directory, disk) != record:
                    raise damaged(present, f"it is not a {disk.format} disk made from {record.base or 'nothing'}")
                return self._look(directory, disk)
        temporary = directory / f".{disk.name}.{disk.format}.tmp"
        needed = await self._needed(disk, record)
        with naming(path):
            self._root.mkdir(mode=0o711, parents=True, exist_ok=True)
            self._need_space(needed, disk)
            self._make_directory(directory)
            try:
                _fresh(temporary)
                await self._fill(temporary, disk, record)
                # First what is known of it: a volume without its record would be nobody's.
                about = directory / f"{disk.name}.volume.json"
                await in_thread(write_whole, about, msgspec.json.encode(record))
                await in_thread(put_in_place, temporary, path)
            except BaseException:
                _give_up(temporary)
                raise
        return self._look(directory, disk)

    async def prepare(
        self, vm_id: str, disks: tuple[DiskSpec, ...], owner: tuple[int, int] | None
    ) -> tuple[Volume, ...]:
        """See the protocol. Raises ``invalid`` too: a disk that is larger than its spec, for none is ever shrunk."""
        directory = self._directory(vm_id)
        running = directory / "running"
        unclean = running.exists()
        volumes = await together([self._ready(directory, disk, unclean) for disk in disks])
        nvram = directory / f"{NVRAM}.qcow2"
        if unclean and nvram.exists():
            await self._qemu_img.check(nvram, _own_nvram(nvram).size)
        with naming(directory):
            if directory.exists() and not unclean:
                await in_thread(write_whole, running, b"")
            for volume in volumes:
                _hand_over(volume.path, owner)
        return tuple(volumes)

    async def settled(self, vm_id: str) -> None:
        with naming(self._root):
            (self._directory(vm_id) / "running").unlink(missing_ok=True)

    async def nvram(self, vm_id: str, firmware: Firmware, owner: tuple[int, int] | None) -> Volume | None:
        """See the protocol. Raises ``host-lacks`` where there is no OVMF."""
        if firmware is not Firmware.UEFI:
            return None
        directory = self._directory(vm_id)
        path = directory / f"{NVRAM}.qcow2"
        with naming(path):
            if not path.exists():
                await self._make_nvram(directory, path)
                # A VM without disks gets its directory only here, after prepare.
                await in_thread(write_whole, directory / "running", b"")
            size = _own_nvram(path).size
            require_unused(path, writing=True)
            _hand_over(path, owner)
        return Volume(name="nvram", path=path, format=DiskFormat.QCOW2, size=size)

    async def remove(self, vm_id: str) -> None:
        directory = self._directory(vm_id)
        with naming(directory):
            if directory.exists():
                await in_thread(shutil.rmtree, directory)

    async def usage(self, vm_id: str) -> Bytes:
        directory = self._directory(vm_id)
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
                entry.name for entry in entries if _VM_ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            }

    def _directory(self, vm_id: str) -> Path:
        if not _VM_ID.fullmatch(vm_id):
            raise invalid(f"{vm_id!r} cannot be the id of a VM")
        return self._root / vm_id

    # Making volumes.

    def _make_directory(self, directory: Path) -> None:
        # 0711: QEMU with a user id of its own opens its files below, and lists nothing.
        directory.mkdir(mode=0o711, exist_ok=True)
        sync_file(self._root)

    def _need_space(self, needed: int, disk: DiskSpec | None = None) -> None:
        need_space(self._root, needed, self._reserve)
        total = file_system_size(self._root)
        if disk is not None and disk.size > total:
            raise MicaError(
                Code.INSUFFICIENT_DISK,
                f"disk {disk.name} of {format_size(disk.size)} is larger than the whole file system of {self._root}, "
                f"{format_size(total)}",
                hint="make the disk smaller, or keep it on a larger file system",
                details={"size": disk.size, "total": total},
            )

    def _describe(self, disk: DiskSpec, base: Path | None) -> _Record:
        """What the volume will be. Raises ``not-found``, ``corrupt``, ``invalid``."""
        if base is None:
            return _Record(disk.format)
        path = base.resolve()
        with naming(path):
            format_ = DiskFormat.QCOW2 if is_qcow2(path) else DiskFormat.RAW
        size = read_chain(path, format_, self._bases)[0].size
        if self._bases and not any(path.resolve().is_relative_to(allowed) for allowed in self._bases):
            raise invalid(f"{path} is no image of this host", hint="import it first: mica image import")
        if size > disk.size:
            raise invalid(
                f"disk {disk.name} of {format_size(disk.size)} is smaller than its image of {format_size(size)}",
                hint=f"give it at least {size} bytes",
                name=disk.name,
                size=disk.size,
                needed=size,
            )
        return _Record(disk.format, str(path), format_)

    async def _needed(self, disk: DiskSpec, record: _Record) -> int:
        if disk.format is DiskFormat.QCOW2:
            return _EMPTY_QCOW2
        if not record.base:
            return 0
        return await self._qemu_img.required(Path(record.base), record.base_format, DiskFormat.RAW)

    async def _fill(self, temporary: Path, disk: DiskSpec, record: _Record) -> None:
        base = Path(record.base) if record.base else None
        if disk.format is DiskFormat.QCOW2:
            await self._qemu_img.create(temporary, disk.size, base, record.base_format)
            return
        if base is not None and not (record.base_format is DiskFormat.RAW and reflink(base, temporary)):
            await self._qemu_img.convert(base, record.base_format, temporary, DiskFormat.RAW, disk.size)
        os.truncate(temporary, disk.size)

    async def _make_nvram(self, directory: Path, path: Path) -> None:
        if self._template is None or not self._template.is_file():
            raise MicaError(
                Code.HOST_LACKS,
                "this host has no UEFI firmware (OVMF)"
                if self._template is None
                else f"the template of UEFI variables {self._template} is not there",
                hint="install it: apt-get install -y ovmf; or use --firmware bios",
            )
        self._root.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._need_space(2 * _EMPTY_QCOW2)
        self._make_directory(directory)
        temporary = directory / f".{NVRAM}.tmp"
        format_ = DiskFormat.QCOW2 if is_qcow2(self._template) else DiskFormat.RAW
        try:
            _fresh(temporary)
            size = read_layer(self._template.resolve(), format_).size
            await self._qemu_img.convert(self._template, format_, temporary, DiskFormat.QCOW2, size)
            await in_thread(put_in_place, temporary, path)
        except BaseException:
            _give_up(temporary)
            raise

    # Looking at volumes.

    def _record(self, directory: Path, disk: DiskSpec) -> _Record:
        path = directory / f"{disk.name}.volume.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Record)
        except FileNotFoundError:
            raise damaged(path, "it is missing, so nobody knows what the disk was made from") from None
        except msgspec.MsgspecError as error:
            raise damaged(path, str(error)) from error

    def _look(self, directory: Path, disk: DiskSpec) -> Volume:
        """The volume as it is. Raises ``not-found``, ``corrupt``, ``in-use``, ``invalid``."""
        path = directory / f"{disk.name}.{disk.format}"
        if not path.exists():
            raise not_found("volume", str(path), hint="restore it from a backup, or take the disk out of the VM")
        record = self._record(directory, disk)
        # The header is compared before anything that it names is opened.
        _compare(read_layer(path, record.format), record)
        top, *below = read_chain(path, record.format, self._bases)
        require_unused(path, writing=not disk.read_only)
        if top.size > disk.size:
            raise invalid(
                f"{path} has {format_size(top.size)}; a disk is never shrunk to {format_size(disk.size)}",
                hint=f"set its size to {top.size} bytes or more",
                name=disk.name,
                size=top.size,
            )
        return Volume(
            name=disk.name,
            path=path,
            format=disk.format,
            size=top.size,
            backing=tuple(layer.path for layer in below),
            read_only=disk.read_only,
        )

    async def _ready(self, directory: Path, disk: DiskSpec, unclean: bool) -> Volume:
        volume = self._look(directory, disk)
        if unclean and volume.format is DiskFormat.QCOW2:
            await self._qemu_img.check(volume.path, volume.size)
        if volume.size < disk.size:
            self._need_space(_EMPTY_QCOW2, disk)
            await self._qemu_img.resize(volume.path, volume.format, disk.size)
            volume = msgspec.structs.replace(volume, size=disk.size)
        return volume


def _fresh(temporary: Path) -> None:
    """An empty file that only we may read, for whoever fills it; what an earlier attempt left there is gone."""
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600, exist_ok=False)


def _give_up(temporary: Path) -> None:
    """Leave nothing of what could not be finished."""
    temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other volumes are in the directory
        temporary.parent.rmdir()


def _hand_over(path: Path, owner: tuple[int, int] | None) -> None:
    path.chmod(0o600)
    if owner is not None:
        os.chown(path, *owner, follow_symlinks=False)


def _compare(found: Layer, record: _Record) -> None:
    """Raises ``corrupt`` when a header does not say what the volume was made as."""
    if record.format is DiskFormat.RAW:
        return  # there is no header, and a base was copied
    if (found.base, found.base_format) != (record.base, record.base_format.value if record.base else ""):
        raise damaged(
            found.path,
            f"its header names {found.base or 'no base'} ({found.base_format or 'no format'}), "
            f"but it was made over {record.base or 'nothing'}",
        )


def _own_nvram(path: Path) -> Layer:
    layer = read_layer(path, DiskFormat.QCOW2)
    _compare(layer, _Record(DiskFormat.QCOW2))
    return layer
