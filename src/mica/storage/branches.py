"""How the disks of a VM become layers (:class:`mica.ports.parts.Branches`), in a directory.

                       root.2.qcow2                    root.2.qcow2 ┬ part           part
    record: root.2 ──►              ── freeze, stage ─►             │      ── take ─► record: root.3 ──► root.3.qcow2
                                       .root.staged.json: root.3 ──► root.3.qcow2

``freeze`` is a hard link, so nothing is copied and a machine goes on writing. A layer gets its final name when it is
staged; ``take`` is the renaming of one small record. So a machine that opened the layer finds it under the same name
for ever, and whatever is interrupted is finished or taken back by doing it again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from mica.model.errors import Code, MicaError
from mica.model.image import DiskFormat
from mica.model.units import Bytes
from mica.model.vm import DiskSpec, check_name
from mica.ports.parts import Seal
from mica.ports.volumes import Volume
from mica.storage import merge
from mica.storage.chain import Record, compare, damaged, layer_record, read_layer
from mica.storage.files import (
    DEFAULT_RESERVE,
    fresh,
    give_up,
    hand_over,
    in_thread,
    make_read_only,
    naming,
    put_in_place,
    sync_file,
    write_whole,
)
from mica.storage.layout import EMPTY_QCOW2, Layout, check_depth, no_volume, unknown
from mica.storage.parts import make_parts_directory, part_path
from mica.storage.qemu_img import QemuImg

_NO_LINK: Final = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class DirectoryBranches:
    """Layers below ``root``, where :class:`mica.storage.directory.DirectoryVolumes` has its volumes, over ``parts``,
    the directory of :class:`mica.storage.parts.DirectoryParts`, which is on the same file system.

    ``qemu_img``, ``bases`` and ``reserve`` are as for the volumes; ``gently`` are words before a command that has it
    leave processor and disk to others (``nice``, ``ionice``).
    """

    def __init__(
        self,
        root: Path,
        parts: Path,
        qemu_img: str,
        *,
        bases: Sequence[Path] = (),
        reserve: Bytes = DEFAULT_RESERVE,
        gently: Sequence[str] = (),
    ) -> None:
        self._layout = Layout(root, parts, bases, reserve)
        self._parts = parts.absolute()
        self._qemu_img = QemuImg(qemu_img)
        self._gentle = QemuImg(qemu_img, gently)

    async def disks(self, vm_id: str) -> set[str]:
        directory = self._layout.directory(vm_id)
        with naming(directory):
            return {disk for disk, _ in self._layout.volumes(directory)}

    async def freeze(self, vm_id: str, disk: DiskSpec, part_id: str) -> None:
        """See the protocol. Raises ``not-found``, ``corrupt``; ``host-lacks`` where files cannot have two names;
        ``exists`` when the part is another file."""
        check_name(disk.name, "disk name")
        directory = self._layout.directory(vm_id)
        record = self._layout.find(directory, disk.name)
        path = self._layout.file(directory, disk.name, record or Record(disk.format))
        if not path.exists():
            raise no_volume(path)
        if record is None:
            raise unknown(self._layout.record_file(directory, disk.name))
        compare(read_layer(path, record.format), record)
        part = part_path(self._parts, part_id)
        with naming(part):
            await in_thread(_link, path, part, msgspec.structs.replace(record, generation=0))

    async def set_aside(self, vm_id: str, disk: str, part_id: str) -> None:
        """See the protocol. What the disk's record says that cannot be read goes with the file."""
        directory, part = self._layout.directory(vm_id), part_path(self._parts, part_id)
        about = self._layout.record_file(directory, disk)
        with naming(part):
            try:
                record = self._layout.find(directory, disk)
            except MicaError as error:
                if error.code is not Code.CORRUPT:
                    raise
                record = None
            path = self._layout.newest(directory, disk)
            if record is not None:
                path = self._layout.file(directory, disk, record)
                record = msgspec.structs.replace(record, generation=0)
            if path is not None and path.exists() and not part.exists():
                await in_thread(_link, path, part, record)
            if record is None and part.exists():  # nobody could go on from it, and it is in the way of what comes
                if path is not None:
                    path.unlink(missing_ok=True)
                if about.exists():
                    about.rename(layer_record(self._parts, part_id))

    async def merge(self, part_id: str, below: int) -> Seal:
        """See the protocol. Raises ``invalid`` when there are not so many."""
        return await merge.merge(self._layout, self._gentle, self._parts, part_id, below)

    async def put_merged(self, part_id: str) -> None:
        merge.put(self._parts, part_id)
        with naming(self._parts):
            await in_thread(sync_file, self._parts)

    async def drop_merged(self, part_id: str) -> None:
        await merge.discard(self._parts, part_id)

    async def stage(self, vm_id: str, disk: DiskSpec, base: Path, owner: tuple[int, int] | None) -> Volume:
        """See the protocol. What is staged already is kept when it lies over ``base``, else replaced.

        The layer is as large as ``base``; preparing it grows it. Raises ``state-conflict`` when the chain would be too
        long, ``not-found``, ``corrupt``.
        """
        check_name(disk.name, "disk name")
        directory = self._layout.directory(vm_id)
        ground = self._layout.ground(base)
        check_depth(disk.name, ground)
        record = self._layout.find(directory, disk.name)
        generation = record.generation + 1 if record is not None else 1
        wanted = Record(DiskFormat.QCOW2, str(ground.path), ground.format, generation)
        path = self._layout.file(directory, disk.name, wanted)
        with naming(path):
            if not path.exists() or (disk.name, wanted) not in self._layout.staged(directory):
                self._layout.make_directory(directory)
                self._layout.need_space(EMPTY_QCOW2)
                await self._make(path, self._layout.staged_file(directory, disk.name), ground.size, wanted)
            compare(read_layer(path, DiskFormat.QCOW2), wanted)
            hand_over(path, owner)
        return Volume(
            name=disk.name,
            path=path,
            format=DiskFormat.QCOW2,
            size=ground.size,
            backing=ground.paths,
            read_only=disk.read_only,
        )

    async def _make(self, path: Path, note: Path, size: Bytes, record: Record) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            await in_thread(_note, path, note, record)
            fresh(temporary)
            await self._qemu_img.create(temporary, size, Path(record.base), record.base_format)
            await in_thread(put_in_place, temporary, path)
        except BaseException:
            path.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
            give_up(temporary)
            raise

    async def take(self, vm_id: str) -> None:
        """See the protocol. Raises ``corrupt`` before anything is taken when a staged file is gone."""
        directory = self._layout.directory(vm_id)
        with naming(directory):
            if directory.exists():
                await in_thread(self._take, directory)

    def _take(self, directory: Path) -> None:
        staged = list(self._layout.staged(directory))
        for disk, record in staged:
            path = self._layout.file(directory, disk, record)
            if not path.exists():
                raise damaged(path, "it was staged, and is gone")
        for disk, _ in staged:
            present = self._layout.find(directory, disk)
            if present is not None:
                path = self._layout.file(directory, disk, present)
                if path.exists() and path.stat().st_nlink > 1:  # it is a part, for other machines too
                    make_read_only(path)
        for disk, _ in staged:
            self._layout.staged_file(directory, disk).rename(self._layout.record_file(directory, disk))
        if staged:
            sync_file(directory)
        for path in self._layout.outdated(directory):
            path.unlink()

    async def unstage(self, vm_id: str) -> None:
        directory = self._layout.directory(vm_id)
        with naming(directory):
            for disk, record in list(self._layout.staged(directory)):
                path = self._layout.file(directory, disk, record)
                for file in (path.with_name(f".{path.name}.tmp"), path, self._layout.staged_file(directory, disk)):
                    file.unlink(missing_ok=True)


def _link(path: Path, part: Path, record: Record | None) -> None:
    make_parts_directory(part.parent)
    if part.exists():
        if part.samefile(path):
            return
        raise MicaError(
            Code.EXISTS,
            f"part {part} is another file than {path}, which it was to be",
            hint="make another snapshot",
        )
    # First what is known of it: a layer without its record would be nobody's to read.
    if record is not None:
        write_whole(layer_record(part.parent, part.name), msgspec.json.encode(record))
    try:
        os.link(path, part, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        layer_record(part.parent, part.name).unlink(missing_ok=True)
        raise MicaError(
            Code.HOST_LACKS,
            f"{path} cannot get a second name in {part.parent}: {error.strerror}",
            hint="keep volumes and parts of MICA_HOME on one file system that has hard links, such as ext4 or XFS",
        ) from error
    sync_file(part.parent)


def _note(path: Path, note: Path, record: Record) -> None:
    """Write down what is going to be staged; what was staged before is gone."""
    path.unlink(missing_ok=True)
    write_whole(note, msgspec.json.encode(record))
