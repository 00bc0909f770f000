"""A virtio disk: QEMU's protocol and format nodes, and the device in front of them.

A disk made from an image goes through the host's page cache, which all VMs of that image share. An empty one bypasses
it where the file system can (O_DIRECT), with the kernel's native AIO, so that its data is in memory only once.
Limits are set by QMP before the guest runs and may change while it does (``block_set_io_throttle``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mica.model.image import DiskFormat
from mica.model.vm import DiskSpec
from mica.ports.volumes import Volume
from mica.qemu.arguments import Arguments, Bus, concat, from_json

SHORT = 20


def short(name: str) -> str:
    """A disk's name in at most 20 characters, which is what a virtio disk tells the guest (virtio 1.2, section 5.2.6).

    A longer one ends in a digest, so that two of them never look alike.
    """
    if len(name) <= SHORT:
        return name
    return f"{name[: SHORT - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def node(name: str) -> str:
    """The name of a disk's format node; QEMU allows 31 characters."""
    return f"disk-{short(name)}"


def device(name: str) -> str:
    """The id of a disk's device."""
    return f"dev-{name}"


def arguments(
    disk: DiskSpec, volume: Volume, bus: Bus, *, bootindex: int | None, direct_io: Callable[[Path], bool]
) -> Arguments:
    direct = not volume.backing and direct_io(volume.path)
    file: dict[str, Any] = {
        "driver": "file",
        "node-name": f"{node(disk.name)}-file",
        "filename": str(volume.path),
        "aio": "native" if direct else "threads",
        "cache": {"direct": direct, "no-flush": False},
        "discard": "unmap",
        "read-only": disk.read_only,
    }
    form: dict[str, Any] = {
        "driver": volume.format.value,
        "node-name": node(disk.name),
        "file": f"{node(disk.name)}-file",
        "cache": {"direct": direct, "no-flush": False},
        "discard": "unmap",
        "read-only": disk.read_only,
    }
    if volume.format is DiskFormat.QCOW2:
        # The guest's discards free space in the image as well.
        form |= {"pass-discard-request": True, "pass-discard-snapshot": True, "pass-discard-other": True}
    port, place = bus.port()
    front = {
        "driver": "virtio-blk-pci",
        "id": device(disk.name),
        "drive": node(disk.name),
        "serial": short(disk.name),
        "bootindex": bootindex,
        # A full host disk pauses the guest instead of giving it errors it cannot mend.
        "werror": "enospc",
        "rerror": "report",
        **place,
    }
    return concat([from_json("blockdev", file), from_json("blockdev", form), port, from_json("device", front)])


def throttle(disk: DiskSpec) -> dict[str, Any]:
    """Arguments of ``block_set_io_throttle`` (QMP reference); zeros lift every limit."""
    return {
        # The block layer knows the device behind the PCI proxy, by its path (QEMU docs, "QOM": /machine/peripheral).
        "id": f"/machine/peripheral/{device(disk.name)}/virtio-backend",
        "iops": disk.limits.iops,
        "iops_rd": 0,
        "iops_wr": 0,
        "bps": disk.limits.bytes_per_s,
        "bps_rd": 0,
        "bps_wr": 0,
    }
