"""Several layers of a disk become one, which reads the same and lies over what was below them.

    .scratch/merge-<part>/<part>               a copy of the upper one, made to hold what the others held too
    .scratch/merge-<part>/<part>.layer.json    what it was made as

It takes the name of the upper layer, so that whatever lies over that need not be touched; machines that have the old
files open keep them. ``qemu-img rebase`` copies what differs, ``qemu-img compare`` says that both read the same.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import msgspec

from mica.model.errors import invalid
from mica.model.image import DiskFormat
from mica.model.units import Bytes
from mica.ports.parts import Seal
from mica.storage.chain import Layer, Record, layer_record
from mica.storage.files import in_thread, make_read_only, naming, reflink, sync_file, write_whole
from mica.storage.layout import Layout
from mica.storage.parts import copy_data, digest_of, part_path
from mica.storage.qemu_img import QemuImg


def _scratch(parts: Path, part_id: str) -> Path:
    return part_path(parts, part_id).parent / ".scratch" / f"merge-{part_id}"


async def merge(layout: Layout, qemu_img: QemuImg, parts: Path, part_id: str, below: int) -> Seal:
    """See :meth:`mica.ports.parts.Branches.merge`."""
    path, directory = part_path(parts, part_id), _scratch(parts, part_id)
    layers = layout.chain(path, DiskFormat.QCOW2)
    if not 1 <= below < len(layers):
        raise invalid(f"{path} lies over {len(layers) - 1} files, of which {below} cannot be merged into it")
    base = layers[below + 1] if below + 1 < len(layers) else None
    await discard(parts, part_id)
    with naming(path):
        layout.need_space(sum(layer.path.stat().st_blocks * 512 for layer in layers[: below + 1]))
        directory.mkdir(mode=0o700, parents=True)
        target, stop = directory / part_id, threading.Event()
        await in_thread(_duplicate, path, target, stop, stop=stop)
        size = max(layer.size for layer in layers)
        await qemu_img.rebase(target, base.path if base else None, base.format if base else DiskFormat.RAW, size)
        await qemu_img.compare(path, target, size)
        record = msgspec.json.encode(_record(base))
        await in_thread(write_whole, layer_record(directory, part_id), record)
        await in_thread(_settle, target)
        digest = await digest_of(target, lambda _: None)
        return Seal(Bytes(target.stat().st_blocks * 512), digest)


def _record(base: Layer | None) -> Record:
    return Record(DiskFormat.QCOW2) if base is None else Record(DiskFormat.QCOW2, str(base.path), base.format)


def _duplicate(source: Path, target: Path, stop: threading.Event) -> None:
    if not reflink(source, target):
        copy_data(source, target, stop)
    target.chmod(0o600)


def _settle(target: Path) -> None:
    make_read_only(target)
    sync_file(target)
    sync_file(target.parent)


def put(parts: Path, part_id: str) -> None:
    """See :meth:`mica.ports.parts.Branches.put_merged`.

    Nothing waits in between for the loop or for a disk: whoever reads a layer here finds file and record together.
    """
    path, directory = part_path(parts, part_id), _scratch(parts, part_id)
    with naming(path):
        about = layer_record(directory, part_id)
        if about.exists():
            about.rename(layer_record(parts, part_id))
        if (directory / part_id).exists():
            (directory / part_id).rename(path)


async def discard(parts: Path, part_id: str) -> None:
    """Remove what is on its way to be a merged layer."""
    directory = _scratch(parts, part_id)
    with naming(directory):
        if directory.exists():
            await in_thread(shutil.rmtree, directory)
