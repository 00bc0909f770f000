"""What a qcow2 header says, read without opening anything that it names.

QEMU can write its own disk files, so after an escape from a guest a header may name any file of the host as backing
or data file. Whoever then lets ``qemu-img`` (or the next QEMU) open the disk opens that file too. So the header is
read here first and compared with what we wrote down when we made the disk.

Source: QEMU documentation, interop/qcow2 ("Header", "Header extensions").
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

import msgspec

from mica.model.errors import Code, MicaError
from mica.model.units import Bytes

MAGIC: Final = b"QFI\xfb"
_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")
_END, _BACKING_FORMAT = 0, 0xE2792ACA
_CORRUPT, _DATA_FILE = 1 << 1, 1 << 2
# Extensions and the backing name lie in the first cluster, whose size is at most 2 MiB.
_READ: Final = 2 * 1024**2
_MAX_EXTENSIONS: Final = 64


class Header(msgspec.Struct, frozen=True):
    """``size`` is what the guest sees. ``backing`` and ``backing_format`` are as written, empty when there is none."""

    size: Bytes
    backing: str = ""
    backing_format: str = ""
    data_file: bool = False
    marked_corrupt: bool = False


def is_qcow2(path: Path) -> bool:
    """Whether the file begins like a qcow2 image. Only for files that no guest can write."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """Raises ``corrupt`` naming the file, and :class:`OSError`."""
    with path.open("rb") as file:
        return parse_header(file.read(_READ), path)


def parse_header(data: bytes, path: Path) -> Header:
    """The header at the beginning of ``data``. Raises ``corrupt`` naming ``path``."""
    try:
        return _parse(data)
    except (struct.error, ValueError) as error:
        raise MicaError(
            Code.CORRUPT,
            f"{path} is not a qcow2 image that can be read: {error}",
            hint="restore the disk from a backup; look at it with: qemu-img info " + str(path),
            details={"path": str(path)},
        ) from error


def _parse(data: bytes) -> Header:
    magic, version, name_at, name_length, _, size, *_ = _V2.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("it does not begin with the magic number")
    if version not in (2, 3):
        raise ValueError(f"it has version {version}")
    features, length = 0, _V2.size
    if version == 3:
        features, _, _, _, length = _V3.unpack_from(data, _V2.size)
    if name_length > 1023:
        raise ValueError("the name of its backing file is longer than 1023 bytes")
    if name_at and name_at + name_length > len(data):
        raise ValueError("the name of its backing file lies outside the header")
    return Header(
        size=Bytes(size),
        backing=data[name_at : name_at + name_length].decode() if name_at else "",
        backing_format=_extension(data, length, _BACKING_FORMAT).decode(),
        data_file=bool(features & _DATA_FILE),
        marked_corrupt=bool(features & _CORRUPT),
    )


def _extension(data: bytes, at: int, wanted: int) -> bytes:
    for _ in range(_MAX_EXTENSIONS):
        kind, length = _EXTENSION.unpack_from(data, at)
        at += _EXTENSION.size
        if kind == wanted:
            return data[at : at + length]
        if kind == _END:
            return b""
        at += (length + 7) // 8 * 8
    raise ValueError(f"it has more than {_MAX_EXTENSIONS} header extensions")
