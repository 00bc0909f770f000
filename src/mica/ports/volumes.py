"""What the engine needs from storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from mica.model.image import DiskFormat, Firmware
from mica.model.units import Bytes
from mica.model.vm import DiskSpec


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """A volume as a machine gets it. ``backing`` are the files below it, nearest first, read-only for the machine."""

    name: str
    path: Path
    format: DiskFormat
    size: Bytes
    backing: tuple[Path, ...] = ()
    read_only: bool = False


class Volumes(Protocol):
    """Volumes of VMs in one storage pool. All verbs are idempotent."""

    async def create(self, vm_id: str, disk: DiskSpec, base: Path | None) -> Volume:
        """Make the volume, a copy-on-write layer over ``base`` where there is one; keep it when it exists.

        Raises ``insufficient-disk`` before anything is written, ``corrupt`` when what exists is not that volume.
        """

    async def copy(self, vm_id: str, disk: DiskSpec, source: Path, report: Callable[[float], None]) -> Volume:
        """Make the volume with all that a guest would see of ``source``, over nothing; keep it when it exists.

        ``report`` is told 0.0 to 1.0. Raises as :meth:`create`.
        """

    async def prepare(
        self, vm_id: str, disks: tuple[DiskSpec, ...], owner: tuple[int, int] | None
    ) -> tuple[Volume, ...]:
        """Check and hand over the volumes of a VM about to start, owned by uid and gid ``owner``.

        After an unclean end the metadata is checked first. Raises ``not-found``, ``corrupt`` naming the file,
        ``in-use`` when another process holds it.
        """

    async def settled(self, vm_id: str) -> None:
        """The VM's process ended in order: its volumes need no check before the next start."""

    async def nvram(self, vm_id: str, firmware: Firmware, owner: tuple[int, int] | None) -> Volume | None:
        """The UEFI variable store of the VM, made from the host's template at first use; ``None`` without UEFI."""

    async def remove(self, vm_id: str) -> None:
        """Delete all volumes of a VM. Absent ones are no error."""

    async def usage(self, vm_id: str) -> Bytes:
        """Bytes that the VM's volumes take on the host."""

    async def owners(self) -> set[str]:
        """Ids of VMs that have volumes here, for the reaper."""
