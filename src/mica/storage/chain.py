"""What a disk consists of, and whether somebody has it open: read here, in microseconds and without a process.

QEMU says with locks what it does to a file and what it tolerates (QEMU source, ``block/file-posix.c``: byte 100 + n
is locked by whoever uses permission n, byte 200 + n by whoever refuses it to others; write is n = 1). ``qemu-img
info`` notices only part of that: it opens a raw image that a machine is writing without a word.

What a header says is believed only where no machine could have written it, which is so for images. For all else there
is a record of what the file was made as.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from mica.model.errors import Code, MicaError, not_found
from mica.model.image import DiskFormat
from mica.model.units import Bytes
from mica.storage.files import naming
from mica.storage.qcow2 import read_header

# Every layer costs QEMU an open file, and every read of an untouched block a look-up in each of them.
MAX_CHAIN: Final = 16
_WRITES, _REFUSES_WRITERS = 101, 201
# struct flock of the 64-bit ABIs (fcntl_locking(2)): type, whence, start, length, pid.
_FLOCK: Final = struct.Struct("@hhqqi0q")


class Layer(msgspec.Struct, frozen=True):
    """One file of a disk. ``size`` is what the guest would see of it; ``base`` is empty for the last one."""

    path: Path
    format: DiskFormat
    size: Bytes
    base: str = ""
    base_format: str = ""


class Record(msgspec.Struct, frozen=True):
    """What a file was made as. ``base`` is an absolute path, empty when there is none.

    ``generation`` counts the files that a disk has had; a part has none.
    """

    format: DiskFormat
    base: str = ""
    base_format: DiskFormat = DiskFormat.RAW
    generation: int = 0

    def same_as(self, other: Record) -> bool:
        """Whether both describe the same content, in whichever generation."""
        mine, theirs = ((r.format, r.base, r.base_format) for r in (self, other))
        return mine == theirs


def damaged(path: Path, what: str) -> MicaError:
    return MicaError(
        Code.CORRUPT,
        f"{path}: {what}",
        hint="restore it from a backup, or delete the VM",
        details={"path": str(path), "found": what},
    )


def read_layer(path: Path, format_: DiskFormat) -> Layer:
    """One file by its header. Raises ``corrupt``, ``not-found``, ``forbidden``."""
    with naming(path):
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise damaged(path, "it is not a regular file")
        if format_ is DiskFormat.RAW:
            return Layer(path, format_, Bytes(found.st_size))
        header = read_header(path)
    if header.data_file:
        raise damaged(path, "its header names a data file of its own, which Mica never makes")
    if header.marked_corrupt:
        raise damaged(path, "QEMU found damage while it ran and marked it so")
    return Layer(path, format_, header.size, header.backing, header.backing_format)


def layer_record(parts: Path, part_id: str) -> Path:
    """Where it is written down what the part was made as."""
    return parts / f"{part_id}.layer.json"


def read_record(path: Path) -> Record:
    """Raises ``corrupt``, :class:`FileNotFoundError`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except msgspec.MsgspecError as error:
        raise damaged(path, str(error)) from error


def read_part(path: Path) -> Layer:
    """A part that is a disk's layer, whose header says what its record says. Raises ``corrupt``, ``not-found``."""
    about = layer_record(path.parent, path.name)
    with naming(path):
        path.lstat()
    try:
        record = read_record(about)
    except FileNotFoundError:
        raise damaged(about, "it is missing, so nobody knows what the layer was made from") from None
    layer = read_layer(path, record.format)
    compare(layer, record)
    return layer


def compare(found: Layer, record: Record) -> None:
    """Raises ``corrupt`` when a header does not say what the file was made as."""
    if record.format is DiskFormat.RAW:
        return  # there is no header, and a base was copied
    if (found.base, found.base_format) != (record.base, record.base_format.value if record.base else ""):
        raise damaged(
            found.path,
            f"its header names {found.base or 'no base'} ({found.base_format or 'no format'}), "
            f"but it was made over {record.base or 'nothing'}",
        )


def read_chain(path: Path, format_: DiskFormat, bases: Sequence[Path] = (), parts: Path | None = None) -> list[Layer]:
    """The file and all that lies below it, nearest first.

    Where ``bases`` are given, everything below lies in one of those directories. What lies in the directory ``parts``
    has been written by machines: its headers say what its records say. Raises ``corrupt``, ``not-found`` naming the
    missing file, ``forbidden``, ``in-use`` when somebody writes to a file below that is no part.
    """
    layers = [read_layer(path, format_)]
    while layers[-1].base:
        top = layers[-1]
        if len(layers) == MAX_CHAIN:
            raise damaged(path, f"it lies over more than {MAX_CHAIN - 1} other files")
        if top.base_format not in (DiskFormat.QCOW2, DiskFormat.RAW):
            # Guessing the format of a file that a guest has written lets the guest choose which files are opened.
            raise damaged(
                top.path, f"its header names the base {top.base} with format {top.base_format or 'unknown'!r}"
            )
        below = (top.path.parent / top.base).resolve()
        if bases and not any(below.is_relative_to(base) for base in bases):
            raise damaged(top.path, f"it lies over {below}, which is no image of this host")
        if not below.exists():
            raise not_found("image file", str(below), hint=f"{top.path} was made over it; import that image again")
        if below.parent == parts:
            # The machine that it is being made of may write to it still, while copies of that moment are got ready.
            layers.append(read_part(below))
        else:
            layers.append(read_layer(below, DiskFormat(top.base_format)))
            require_unused(below, writing=False)
    return layers


def require_unused(path: Path, *, writing: bool) -> None:
    """Raises ``in-use`` when another process writes to the image, or we want to and another tolerates no writer."""
    with naming(path):
        locked = _locked(path, _WRITES) or (writing and _locked(path, _REFUSES_WRITERS))
    if locked:
        raise MicaError(
            Code.IN_USE,
            f"{path} is in use by another process",
            hint=f"find it and end it: fuser -v {path}",
            retryable=True,
            details={"path": str(path)},
        )


def written(path: Path) -> bool:
    """Whether another process has the image open for writing."""
    with naming(path):
        return _locked(path, _WRITES)


def _locked(path: Path, byte: int) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return False  # a file system without locks cannot tell, and QEMU will say so when it starts
        raise
    finally:
        os.close(descriptor)
    assert isinstance(answer, bytes)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
