"""Foreign disk images: taken when they stand for themselves, refused by name when they do not."""

from __future__ import annotations

import asyncio
import gzip
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from mica.images.directory import DirectoryImages
from mica.images.headers import disk_format
from mica.model.errors import Code, MicaError
from mica.model.image import DiskFormat, Firmware, Image, ImportRecipe
from mica.ports.progress import no_progress

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")

SIZE = 8 << 20


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A raw disk with a boot sector and something on it."""
    path = tmp_path / "disk.raw"
    data = bytearray(SIZE)
    data[510:512] = b"\x55\xaa"
    data[1 << 20 : (1 << 20) + 4096] = os.urandom(4096)
    path.write_bytes(data)
    return path


@pytest.fixture
def images(tmp_path: Path) -> DirectoryImages:
    return DirectoryImages(tmp_path / "images", cache=tmp_path / "cache")


async def take(images: DirectoryImages, path: Path) -> Image:
    return await images.make(ImportRecipe(name="foreign", path=str(path), firmware=Firmware.BIOS), no_progress)


async def refused(images: DirectoryImages, path: Path, code: Code, words: str) -> MicaError:
    with pytest.raises(MicaError) as caught:
        await take(images, path)
    assert caught.value.code is code, caught.value
    assert str(path) in caught.value.message
    assert words in caught.value.message
    assert await images.present() == []
    return caught.value


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vmdk", "vhdx", "vpc", "vdi"])
async def test_what_qemu_img_reads_is_taken_byte_by_byte(
    tmp_path: Path, raw: Path, images: DirectoryImages, kind: str
) -> None:
    path = tmp_path / f"foreign.{kind}"
    qemu_img("convert", "-f", "raw", "-O", kind, *(["-o", "force_size=on"] if kind == "vpc" else []), raw, path)
    assert disk_format(path) == kind
    fractions: list[float | None] = []
    recipe = ImportRecipe(name="foreign", path=str(path), firmware=Firmware.BIOS)
    image = await images.make(recipe, lambda fraction, text: fractions.append(fraction))
    assert (image.disk, image.disk_format, image.disk_size) == ("disk.qcow2", DiskFormat.QCOW2, SIZE)
    assert image.firmware is Firmware.BIOS
    assert 1.0 in fractions
    back = tmp_path / "back.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", images.path(image, "disk.qcow2"), back)
    assert back.read_bytes() == raw.read_bytes()
    assert await images.present() == [image]


async def test_a_backing_file_is_refused_unread(tmp_path: Path, images: DirectoryImages) -> None:
    trap = tmp_path / "fifo"
    os.mkfifo(trap)
    path = tmp_path / "evil.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", trap, "-F", "raw", path, "8M")
    async with asyncio.timeout(30):  # whoever opened the FIFO would wait forever
        error = await refused(images, path, Code.INVALID, "backing file")
    assert str(trap) in error.message


async def test_an_external_data_file_is_refused(tmp_path: Path, images: DirectoryImages) -> None:
    path = tmp_path / "evil.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.raw", path, "8M")
    await refused(images, path, Code.INVALID, "external data file")


async def test_a_vmdk_descriptor_is_refused(tmp_path: Path, images: DirectoryImages) -> None:
    path = tmp_path / "evil.vmdk"
    path.write_text(
        '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        'RW 16384 FLAT "/etc/hostname" 0\n'
    )
    await refused(images, path, Code.INVALID, "VMDK descriptor")


async def test_a_vmdk_with_a_parent_is_refused(tmp_path: Path, raw: Path, images: DirectoryImages) -> None:
    parent, path = tmp_path / "parent.vmdk", tmp_path / "child.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", raw, parent)
    qemu_img("create", "-q", "-f", "vmdk", "-b", parent, "-F", "vmdk", path)
    await refused(images, path, Code.INVALID, "snapshot")


async def test_a_differencing_vhd_is_refused(tmp_path: Path, images: DirectoryImages) -> None:
    path = tmp_path / "child.vhd"
    footer = bytearray(512)
    footer[:8] = b"conectix"
    struct.pack_into(">I", footer, 60, 4)
    path.write_bytes(bytes(footer) + bytes(1024) + bytes(footer))
    await refused(images, path, Code.INVALID, "differencing")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no header of a known format"),
        (b"Dear diary,\n" * 100, "no header of a known format"),
        (bytes(1 << 20), "no header of a known format"),
        (gzip.compress(b"x" * 4096), "compressed"),
        (b"QFI\xfb\x00\x00\x00\x09" + bytes(600), "unknown version 9"),
        (b"QFI\xfb\x00", "header is cut off"),
        (b"KDMV\x01", "header is cut off"),
    ],
)
async def test_what_is_no_disk_is_refused(tmp_path: Path, images: DirectoryImages, content: bytes, words: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    error = await refused(images, path, Code.CORRUPT, words)
    assert error.hint


async def test_a_damaged_qcow2_is_refused(tmp_path: Path, raw: Path, images: DirectoryImages) -> None:
    path = tmp_path / "damaged.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    with path.open("r+b") as file:
        file.seek(40)
        (table,) = struct.unpack(">Q", file.read(8))
        file.seek(table)
        file.write(struct.pack(">Q", 0x8000_0000_7FFF_0000))
    await refused(images, path, Code.CORRUPT, "damaged")


async def test_a_cut_off_qcow2_is_refused(tmp_path: Path, raw: Path, images: DirectoryImages) -> None:
    path = tmp_path / "short.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    os.truncate(path, 100_000)
    await refused(images, path, Code.CORRUPT, "damaged")


async def test_a_claimed_size_beyond_the_limit_is_refused(tmp_path: Path, images: DirectoryImages) -> None:
    path = tmp_path / "huge.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "100T")
    await refused(images, path, Code.INVALID, "64 TiB")


async def test_an_encrypted_image_is_refused(tmp_path: Path, images: DirectoryImages) -> None:
    path = tmp_path / "secret.qcow2"
    secret = ["--object", "secret,id=s,data=abc"]
    options = "encrypt.format=aes,encrypt.key-secret=s"
    qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", options, path, "1M")
    await refused(images, path, Code.INVALID, "encrypted")


async def test_paths_that_are_no_files(tmp_path: Path, images: DirectoryImages) -> None:
    os.mkfifo(tmp_path / "fifo")
    await refused(images, tmp_path / "fifo", Code.INVALID, "not a regular file")
    await refused(images, tmp_path, Code.INVALID, "")
    await refused(images, Path("/dev/zero"), Code.INVALID, "not a regular file")
    await refused(images, tmp_path / "absent", Code.NOT_FOUND, "")
    with pytest.raises(MicaError, match="not an absolute path"):
        await take(images, Path("disk.qcow2"))


async def test_an_image_that_a_machine_uses_is_refused(tmp_path: Path, raw: Path, images: DirectoryImages) -> None:
    path = tmp_path / "busy.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    holder = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "qcow2", str(path), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"write 0 512\n")
        await holder.stdin.drain()
        await holder.stdout.readuntil(b"ops/sec")
        error = await refused(images, path, Code.IN_USE, "in use")
        assert error.retryable
    finally:
        holder.kill()
        await holder.communicate()
