"""What a disk image says of itself in its first bytes, read before any program opens it.

Formats and offsets: QEMU, docs/interop/qcow2.txt; VMware, Virtual Disk Format 5.0; Microsoft, [MS-VHDX] and the Virtual
Hard Disk Image Format Specification; VirtualBox, Storage/VDICore.h.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from pathlib import Path

from mica.model.errors import Code, MicaError, invalid, not_found

_HEAD = 1 << 16
_QCOW2_EXTERNAL_DATA = 1 << 2
_VMDK_NO_PARENT = "ffffffff"
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"\xfd7zXZ": "unxz",
    b"BZh": "bunzip2",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\x03\x04": "unzip",
}


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file. Raises ``not-found``, ``forbidden``, ``invalid``."""
    try:
        # Not blocking, for a FIFO would never open.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise not_found("file", str(path)) from error
    except PermissionError as error:
        raise MicaError(
            Code.FORBIDDEN, f"{path} may not be read", hint=f"let the user that runs Mica read it: chmod a+r {path}"
        ) from error
    except OSError as error:
        raise invalid(f"{path} cannot be opened: {error.strerror}", field="path") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise invalid(f"{path} is not a regular file", hint="copy a device into a file first", field="path")
    return descriptor


def disk_format(path: Path) -> str:
    """The format as ``qemu-img -f`` calls it, of a file that stands for itself.

    Raises ``corrupt`` for what is no disk image or a damaged one, ``invalid`` for an image that names other files:
    opening it would read them.
    """
    descriptor = open_regular(path)
    with open(descriptor, "rb") as file:
        head = file.read(_HEAD)
        size = os.fstat(descriptor).st_size
        file.seek(max(size - 512, 0))
        foot = file.read(512)
        try:
            return _named_format(path, head) or _other_format(path, head, foot, size)
        except struct.error as error:
            raise _no_image(path, "its header is cut off") from error


def _named_format(path: Path, head: bytes) -> str | None:
    if head.startswith(b"QFI\xfb"):
        _check_qcow2(path, head)
        return "qcow2"
    if head.startswith(b"KDMV"):
        _check_vmdk(path, head)
        return "vmdk"
    if head.lstrip().lower().startswith(b"# disk descriptorfile"):
        raise _names_others(path, "the extents of a VMDK descriptor", "export it as one file (monolithicSparse)")
    if head.startswith(b"vhdxfile"):
        return "vhdx"
    if head[0x40:0x44] == struct.pack("<I", 0xBEDA107F):
        return "vdi"
    return None


def _other_format(path: Path, head: bytes, foot: bytes, size: int) -> str:
    if b"conectix" in (head[:8], foot[:8]):
        kind = struct.unpack_from(">I", foot if foot.startswith(b"conectix") else head, 60)[0]
        if kind == 4:
            raise _names_others(path, "the parent of a differencing VHD", "merge it with its parent first")
        return "vpc"
    for magic, program in _COMPRESSED.items():
        if head.startswith(magic):
            raise _no_image(path, "it is compressed", hint=f"unpack it first: {program}")
    if head[257:262] == b"ustar":
        raise _no_image(path, "it is a tar archive (an OVA is one)", hint="unpack it and import the disk in it")
    # A raw disk has no name of its own. One that boots has a boot sector or a protective MBR; both end in 55 AA.
    if len(head) < 512 or size % 512 or head[510:512] != b"\x55\xaa":
        raise _no_image(path, "it has no header of a known format, and no boot sector as a raw disk would")
    return "raw"


def _check_qcow2(path: Path, head: bytes) -> None:
    version, backing_offset = struct.unpack_from(">IQ", head, 4)
    if version not in (2, 3):
        raise _no_image(path, f"it is qcow2 of the unknown version {version}")
    if backing_offset:
        length = struct.unpack_from(">I", head, 16)[0]
        name = head[backing_offset : backing_offset + min(length, 1023)].decode(errors="replace")
        raise _names_others(path, f"its backing file {name!r}", "merge them first: qemu-img convert")
    if version == 3 and struct.unpack_from(">Q", head, 72)[0] & _QCOW2_EXTERNAL_DATA:
        raise _names_others(path, "an external data file", "make it one file first: qemu-img convert")


def _check_vmdk(path: Path, head: bytes) -> None:
    capacity, _, start, length = struct.unpack_from("<QQQQ", head, 12)
    text = head[start * 512 : (start + length) * 512].decode(errors="replace")
    if capacity == 0 or (start * 512 >= _HEAD > 0 and length):
        raise _names_others(path, "the extents of a VMDK descriptor", "export it as one file (monolithicSparse)")
    parent = re.search(r"^parentCID\s*=\s*(\w+)", text, re.MULTILINE | re.IGNORECASE)
    if "parentfilenamehint" in text.lower() or (parent and parent.group(1).lower() != _VMDK_NO_PARENT):
        raise _names_others(path, "the parent of a VMDK snapshot", "export it as one file without snapshots")


def _names_others(path: Path, what: str, hint: str) -> MicaError:
    return invalid(f"{path} refers to another file ({what}), which an imported image must not", hint=hint, field="path")


def _no_image(path: Path, why: str, hint: str = "") -> MicaError:
    return MicaError(
        Code.CORRUPT,
        f"{path} is not a disk image that Mica can read: {why}",
        hint=hint or "qcow2, raw, VMDK, VHDX, VHD and VDI disks can be imported",
        details={"path": str(path)},
    )
