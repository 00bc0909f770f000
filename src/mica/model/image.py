"""Images: what a virtual machine starts from.

An image is a set of immutable files named by their content. Its digest is computed over the digests of its files and
over what a machine needs to know to boot it, so two builds with the same content are the same image, and a changed
byte is always found. A name such as ``micro`` points at one digest at a time.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from mica.model.units import Bytes


class DiskFormat(StrEnum):
    QCOW2 = "qcow2"
    RAW = "raw"


class Firmware(StrEnum):
    """What runs before the operating system: SeaBIOS or OVMF (UEFI)."""

    BIOS = "bios"
    UEFI = "uefi"


class ImageFile(msgspec.Struct, frozen=True):
    """One file of an image; ``blake3`` is the hexadecimal BLAKE3 digest of its bytes."""

    size: Bytes
    blake3: str


class DirectBoot(msgspec.Struct, frozen=True):
    """Kernel and initial RAM file system given to QEMU directly, skipping firmware and boot loader.

    ``kernel`` and ``initrd`` name files of the image. An image with a disk boots from its own loader instead: a kernel
    upgrade inside the guest changes the disk only, and the two would part.
    """

    kernel: str
    initrd: str
    cmdline: str


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An immutable image. ``digest`` is ``blake3:`` and 64 hexadecimal digits.

    ``disk`` names the file that is the root disk (``None``: the machine lives in its initial RAM file system), whose
    virtual size is ``disk_size``. ``created_at`` is Unix time in seconds. ``build`` records how it was made.
    """

    digest: str
    name: str
    os: str
    created_at: float
    files: dict[str, ImageFile]
    disk: str | None = None
    disk_format: DiskFormat = DiskFormat.QCOW2
    disk_size: Bytes = Bytes(0)
    firmware: Firmware = Firmware.BIOS
    direct_boot: DirectBoot | None = None
    min_memory: Bytes = Bytes(0)
    agent: bool = False
    cloud_init: bool = False
    build: dict[str, str] = {}

    @property
    def size(self) -> int:
        """Bytes on disk, all files together."""
        return sum(file.size for file in self.files.values())


class MicroRecipe(msgspec.Struct, frozen=True, tag_field="kind", tag="micro"):
    """The small guest: Debian's cloud kernel and an initramfs with busybox, the guest agent and the virtio modules."""

    name: str = "micro"
    suite: str = "bookworm"


class DebianRecipe(msgspec.Struct, frozen=True, tag_field="kind", tag="debian"):
    """A full Debian with systemd, guest agent, SSH, cloud-init and a serial console, made from Debian's packages."""

    name: str = "debian"
    suite: str = "bookworm"
    size: Bytes = Bytes(4 * 1024**3)
    hostname: str = "debian"
    include: tuple[str, ...] = ()


class ImportRecipe(msgspec.Struct, frozen=True, tag_field="kind", tag="import"):
    """A disk image that lies on this host (qcow2, raw, VMDK, VHDX, VDI: what ``qemu-img`` reads)."""

    name: str
    path: str
    firmware: Firmware = Firmware.UEFI
    agent: bool = False


ImageRecipe = MicroRecipe | DebianRecipe | ImportRecipe

# What ``mica run NAME`` builds on first use.
BUILT_IN: dict[str, type[MicroRecipe | DebianRecipe]] = {"micro": MicroRecipe, "debian": DebianRecipe}
