"""Where the files of a VM's disks lie, and what is known of each.

    ROOT/<vm>/<disk>.qcow2 or .raw       the file that a disk was made as
    ROOT/<vm>/<disk>.<n>.qcow2           the file that it is in generation n, a layer over a part
    ROOT/<vm>/<disk>.volume.json         its record: which of them it is, its format and base, for no guest to change
    ROOT/<vm>/.<disk>.staged.json        the record that comes next, while a snapshot is being made
    ROOT/<vm>/nvram_vars…                the same for the UEFI variables
    PARTS/<part>, <part>.layer.json      a part that is a disk's layer, and its record

A file keeps its name for as long as a machine may have it open; what changes is which file the record names. Names of
disks are DNS labels, so nothing else here can be mistaken for a disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from mica.model.errors import Code, MicaError, invalid, not_found
from mica.model.image import DiskFormat
from mica.model.units import MIB, Bytes
from mica.model.vm import NVRAM
from mica.storage.chain import MAX_CHAIN, Layer, Record, damaged, read_chain, read_part, read_record
from mica.storage.files import naming, need_space, sync_file
from mica.storage.qcow2 import is_qcow2

# What an empty qcow2 image takes at most before anything is written to it: header, tables, one cluster each.
EMPTY_QCOW2: Final = MIB
VM_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_NVRAM_STEM: Final = "nvram_vars"
_GENERATION: Final = re.compile(r"(?P<stem>[a-z0-9_-]+)(?:\.(?P<generation>\d+))?\.(?:qcow2|raw)")
_STAGED: Final = re.compile(r"\.(?P<stem>[a-z0-9_-]+)\.staged\.json")


class Ground(msgspec.Struct, frozen=True):
    """What a new layer is going to lie over: a file with its format, and all that lies below it."""

    path: Path
    format: DiskFormat
    layers: tuple[Layer, ...]

    @property
    def size(self) -> Bytes:
        return self.layers[0].size

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(layer.path for layer in self.layers)


class Layout:
    """Files below ``root`` and ``parts``. ``bases`` are the directories in which base images may lie, none for any."""

    def __init__(self, root: Path, parts: Path | None, bases: Sequence[Path], reserve: Bytes) -> None:
        self.root = root.absolute()
        self.parts = parts.resolve() if parts is not None else None
        allowed = [base.resolve() for base in bases]
        self._bases = (*allowed, self.parts) if allowed and self.parts is not None else tuple(allowed)
        self._reserve = reserve

    def directory(self, vm_id: str) -> Path:
        """Raises ``invalid``."""
        if not VM_ID.fullmatch(vm_id):
            raise invalid(f"{vm_id!r} cannot be the id of a VM")
        return self.root / vm_id

    def make_directory(self, directory: Path) -> None:
        # 0711: QEMU with a user id of its own opens its files below, and lists nothing.
        self.root.mkdir(mode=0o711, parents=True, exist_ok=True)
        directory.mkdir(mode=0o711, exist_ok=True)
        sync_file(self.root)

    def need_space(self, needed: int) -> None:
        """Raises ``insufficient-disk``."""
        need_space(self.root, needed, self._reserve)

    # One disk.

    @staticmethod
    def file(directory: Path, disk: str, record: Record) -> Path:
        generation = f".{record.generation}" if record.generation else ""
        return directory / f"{_stem(disk)}{generation}.{record.format}"

    @staticmethod
    def record_file(directory: Path, disk: str) -> Path:
        return directory / f"{_stem(disk)}.volume.json"

    @staticmethod
    def staged_file(directory: Path, disk: str) -> Path:
        return directory / f".{_stem(disk)}.staged.json"

    def find(self, directory: Path, disk: str) -> Record | None:
        """The disk's record, if it has one. UEFI variables without one were made from the template. Raises
        ``corrupt``."""
        path = self.record_file(directory, disk)
        with naming(path):
            found = _read_if_there(path)
        if found is None and disk == NVRAM and self.file(directory, disk, Record(DiskFormat.QCOW2)).exists():
            return Record(DiskFormat.QCOW2)
        return found

    def volumes(self, directory: Path) -> Iterator[tuple[str, Path]]:
        """Every disk that has a file, with it. Raises ``corrupt``."""
        for name in sorted(os.listdir(directory)) if directory.exists() else []:
            if match := _GENERATION.fullmatch(name):
                disk = _disk(match["stem"])
                record = self.find(directory, disk)
                if record is not None and self.file(directory, disk, record).name == name:
                    yield disk, directory / name

    def newest(self, directory: Path, disk: str) -> Path | None:
        """The file that a disk was made last, by its name alone."""
        found = {}
        for path in directory.iterdir() if directory.exists() else ():
            if (match := _GENERATION.fullmatch(path.name)) and _disk(match["stem"]) == disk:
                found[int(match["generation"] or 0)] = path
        return found[max(found)] if found else None

    def staged(self, directory: Path) -> Iterator[tuple[str, Record]]:
        """Every disk for which a file is staged, with its record. Raises ``corrupt``."""
        with naming(directory):
            names = sorted(os.listdir(directory)) if directory.exists() else []
            for name in names:
                if (match := _STAGED.fullmatch(name)) and (record := _read_if_there(directory / name)):
                    yield _disk(match["stem"]), record

    def outdated(self, directory: Path) -> list[Path]:
        """Files that disks have been before."""
        present: dict[str, int] = {}
        found = []
        for path in sorted(directory.iterdir()):
            if match := _GENERATION.fullmatch(path.name):
                stem = match["stem"]
                if stem not in present:
                    record = self.find(directory, _disk(stem))
                    present[stem] = record.generation if record is not None else 0
                if int(match["generation"] or 0) < present[stem]:
                    found.append(path)
        return found

    # What lies below.

    def chain(self, path: Path, format_: DiskFormat) -> list[Layer]:
        """As :func:`mica.storage.chain.read_chain`, within the directories that are allowed."""
        return read_chain(path, format_, self._bases, self.parts)

    def ground(self, base: Path) -> Ground:
        """What may lie below a new layer. Raises ``not-found``, ``corrupt``, ``invalid``, ``in-use``."""
        path = base.resolve()
        if path.parent == self.parts:
            # A guest may have written a raw disk that looks like a qcow2 image: only the record tells.
            format_ = read_part(path).format
        else:
            with naming(path):
                format_ = DiskFormat.QCOW2 if is_qcow2(path) else DiskFormat.RAW
        layers = tuple(self.chain(path, format_))
        if self._bases and not any(path.is_relative_to(allowed) for allowed in self._bases):
            raise invalid(f"{path} is no image of this host", hint="import it first: mica image import")
        return Ground(path, format_, layers)


def check_depth(disk: str, ground: Ground) -> None:
    """Raises ``state-conflict`` when a layer over ``ground`` would make too long a chain."""
    if len(ground.layers) < MAX_CHAIN:
        return
    raise MicaError(
        Code.STATE_CONFLICT,
        f"disk {disk} would lie over {len(ground.layers)} other files; a disk lies over at most {MAX_CHAIN - 1}",
        hint="delete snapshots that it descends from: mica snapshot list, mica snapshot delete",
        details={"disk": disk, "below": len(ground.layers), "limit": MAX_CHAIN - 1},
    )


def no_volume(path: Path) -> MicaError:
    return not_found("volume", str(path), hint="restore it from a backup, or take the disk out of the VM")


def unknown(path: Path) -> MicaError:
    """A volume is there, and its record, which should be at ``path``, is not."""
    return damaged(path, "it is missing, so nobody knows what the disk was made from")


def _read_if_there(path: Path) -> Record | None:
    try:
        return read_record(path)
    except FileNotFoundError:
        return None


def _stem(disk: str) -> str:
    return _NVRAM_STEM if disk == NVRAM else disk


def _disk(stem: str) -> str:
    return NVRAM if stem == _NVRAM_STEM else stem
