"""A disk that boots itself under UEFI, put together in a file: no loop device, no mount, no root.

GPT by sfdisk, the EFI system partition by mtools, the root file system by ``mke2fs -d``, then qcow2.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from mica.images.commands import Commands
from mica.images.debian_files import Identity
from mica.images.userns import Namespace
from mica.model.errors import invalid
from mica.model.units import MIB, format_size

ESP_START = 1 * MIB
ESP_SIZE = 256 * MIB
ROOT_START = ESP_START + ESP_SIZE
# The backup GPT lies in the last sectors; a whole MiB keeps the partition's end aligned.
TAIL = 1 * MIB

# Partition types, see the UAPI group's Discoverable Partitions Specification.
_TYPE_ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
_TYPE_ROOT_X86_64 = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
_SECTOR = 512


class Layout(msgspec.Struct, frozen=True):
    """``size`` of the whole disk in bytes, a multiple of 1 MiB."""

    size: int
    identity: Identity

    @property
    def root_size(self) -> int:
        return self.size - ROOT_START - TAIL


def check_size(size: int, content: int) -> None:
    """Raises ``invalid`` when a disk of ``size`` cannot hold ``content`` bytes of files and room to work."""
    need = ROOT_START + TAIL + content * 5 // 4 + 256 * MIB
    need += -need % MIB
    if size < need:
        raise invalid(
            f"a disk of {format_size(size)} is too small: this Debian needs {format_size(need)}",
            hint=f"set the size to {-(-need // (1024 * MIB))}G or more",
            field="size",
            minimum=need,
        )


async def partition(commands: Commands, disk: Path, layout: Layout) -> None:
    """Make ``disk``, a sparse file with the partition table."""
    with disk.open("wb") as file:
        file.truncate(layout.size)
    identity = layout.identity
    table = disk.with_suffix(".sfdisk")
    table.write_text(
        f"label: gpt\nlabel-id: {identity.disk}\n"
        f'start={ESP_START // _SECTOR}, size={ESP_SIZE // _SECTOR}, type={_TYPE_ESP}, name="esp", '
        f"uuid={identity.esp_partition}\n"
        f"start={ROOT_START // _SECTOR}, size={layout.root_size // _SECTOR}, type={_TYPE_ROOT_X86_64}, "
        f'name="root", uuid={identity.root_partition}\n'
    )
    with table.open("rb") as script:
        await commands.run(
            ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", str(disk)], stdin=script, timeout_s=60
        )


async def fill_esp(commands: Commands, disk: Path, identity: Identity, files: dict[str, Path]) -> None:
    """Format the EFI system partition and copy ``files`` (path on it → file here)."""
    drive = f"{disk}@@{ESP_START}"
    sectors = ESP_SIZE // _SECTOR
    await commands.run(
        ["mformat", "-i", drive, "-F", "-T", str(sectors), "-N", identity.esp_serial, "-v", "ESP", "::"], timeout_s=60
    )
    folders = {str(parent) for name in files for parent in Path(name).parents if str(parent) != "."}
    for folder in sorted(folders):
        await commands.run(["mmd", "-i", drive, f"::{folder}"], timeout_s=60)
    for name, source in sorted(files.items()):
        await commands.run(["mcopy", "-m", "-i", drive, str(source), f"::{name}"], timeout_s=120)


async def fill_root(commands: Commands, namespace: Namespace, disk: Path, tree: Path, layout: Layout) -> None:
    """Make the root file system with all that is in ``tree``, which is seen as ``namespace`` sees it."""
    # In a user namespace we are "others" to this file, which lies in a directory that only we can enter.
    disk.chmod(0o666)
    options = f"offset={ROOT_START},lazy_itable_init=1,nodiscard,hash_seed={layout.identity.root}"
    with disk.open("r+b") as file:
        await commands.run(
            [
                *namespace.prefix,
                *("mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-m", "1"),
                *("-U", layout.identity.root, "-E", options, "-d", "."),
                # The file is handed over open: the namespace may not reach its path.
                *("/proc/self/fd/0", f"{layout.root_size // 1024}k"),
            ],
            stdin=file,
            cwd=tree,
            timeout_s=900,
        )


async def to_qcow2(commands: Commands, disk: Path, target: Path) -> None:
    """Not compressed: quick to make and to run; what is zero takes no space."""
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-W", "-m", "4", str(disk), str(target)]
    await commands.run(argv, timeout_s=1800)
