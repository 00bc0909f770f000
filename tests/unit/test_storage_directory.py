"""Volumes in a directory, down to the bytes: what is made, what is refused, what is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mica.model.errors import Code, MicaError
from mica.model.image import DiskFormat, Firmware
from mica.model.units import GIB, MIB, Bytes
from mica.model.vm import DiskSpec
from mica.storage.chain import MAX_CHAIN
from mica.storage.directory import DirectoryVolumes

QEMU_IMG = shutil.which("qemu-img") or ""
QEMU_IO = shutil.which("qemu-io") or ""
VM = "11111111-aaaa-4bbb-8ccc-000000000001"
DISK = DiskSpec(name="root", size=Bytes(8 * MIB))

pytestmark = pytest.mark.skipif(not (QEMU_IMG and QEMU_IO), reason="needs qemu-img and qemu-io (package qemu-utils)")


def run(*argv: object) -> str:
    return subprocess.run([str(arg) for arg in argv], check=True, capture_output=True, text=True).stdout


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(QEMU_IMG, "info", "--output=json", path))
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    (directory / "raw").write_bytes(b"base" * (MIB // 8) + bytes(MIB // 2))
    run(QEMU_IMG, "convert", "-O", "qcow2", "-f", "raw", directory / "raw", directory / "qcow2")
    return directory


@pytest.fixture
def volumes(tmp_path: Path, images: Path) -> DirectoryVolumes:
    template = tmp_path / "OVMF_VARS.fd"
    template.write_bytes(b"vars" * 33 * 1024)
    return DirectoryVolumes(tmp_path / "vms", QEMU_IMG, template, bases=[images])


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.mark.parametrize("base", ["raw", "qcow2"])
async def test_a_layer_shows_its_base_and_keeps_it_untouched(
    volumes: DirectoryVolumes, images: Path, base: str
) -> None:
    before = (images / base).read_bytes()
    volume = await volumes.create(VM, DISK, images / base)
    run(QEMU_IO, "-f", "qcow2", "-c", "read -P 0x62 0 1", "-c", "write -P 7 0 64k", volume.path)
    assert (images / base).read_bytes() == before
    about = info(volume.path)
    assert about["full-backing-filename"] == str(images / base)
    assert about["backing-filename-format"] == base
    assert about["virtual-size"] == 8 * MIB


@pytest.mark.parametrize("base", ["raw", "qcow2"])
async def test_a_raw_volume_is_a_sparse_copy(volumes: DirectoryVolumes, images: Path, base: str) -> None:
    spec = DiskSpec(name="root", size=Bytes(64 * MIB), format=DiskFormat.RAW)
    volume = await volumes.create(VM, spec, images / base)
    assert volume.backing == ()
    assert volume.path.read_bytes()[:MIB] == (images / "raw").read_bytes()
    assert volume.path.stat().st_size == 64 * MIB
    assert await volumes.usage(VM) <= 2 * MIB
    assert await volumes.prepare(VM, (spec,), None) == (volume,)


async def test_a_small_write_over_a_base_takes_little_space(volumes: DirectoryVolumes, images: Path) -> None:
    spec = DiskSpec(name="root", size=Bytes(64 * MIB))
    await volumes.create(VM, spec, images / "raw")
    before = await volumes.usage(VM)
    path = (await volumes.prepare(VM, (spec,), None))[0].path
    run(QEMU_IO, "-f", "qcow2", *(arg for n in range(8) for arg in ("-c", f"write {n * 128}k 4k")), path)
    assert await volumes.usage(VM) - before < 8 * 65536


async def test_only_the_owner_may_touch_a_volume(volumes: DirectoryVolumes, images: Path) -> None:
    volume = await volumes.create(VM, DISK, images / "raw")
    nvram = await volumes.nvram(VM, Firmware.UEFI, None)
    assert nvram is not None
    for file in volume.path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(volume.path.parent.stat().st_mode) == 0o711


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
async def test_what_is_prepared_belongs_to_the_owner(volumes: DirectoryVolumes, images: Path) -> None:
    volume = await volumes.create(VM, DISK, images / "raw")
    await volumes.prepare(VM, (DISK,), (54321, 54322))
    nvram = await volumes.nvram(VM, Firmware.UEFI, (54321, 54322))
    assert nvram is not None
    for path in (volume.path, nvram.path):
        assert (path.stat().st_uid, path.stat().st_gid) == (54321, 54322)
    assert (volume.path.with_name("root.volume.json")).stat().st_uid == 0
    assert (volume.path.with_name("running")).stat().st_uid == 0
    assert (images / "raw").stat().st_uid == 0


async def test_the_variable_store_is_the_template_as_qcow2(volumes: DirectoryVolumes, tmp_path: Path) -> None:
    volume = await volumes.nvram(VM, Firmware.UEFI, None)
    assert volume is not None
    template = tmp_path / "OVMF_VARS.fd"
    assert volume.size == template.stat().st_size
    run(QEMU_IMG, "compare", "-f", "raw", "-F", "qcow2", template, volume.path)


@pytest.mark.parametrize("template", [None, Path("nowhere/OVMF_VARS.fd")])
async def test_without_ovmf_the_host_lacks_something(tmp_path: Path, template: Path | None) -> None:
    volumes = DirectoryVolumes(tmp_path / "vms", QEMU_IMG, template)
    with pytest.raises(MicaError, match="apt-get install -y ovmf") as caught:
        await volumes.nvram(VM, Firmware.UEFI, None)
    assert caught.value.code is Code.HOST_LACKS
    assert await volumes.owners() == set()


@pytest.mark.parametrize("program", ["", "/nowhere/qemu-img"])
async def test_without_qemu_img_the_host_lacks_something(tmp_path: Path, program: str) -> None:
    volumes = DirectoryVolumes(tmp_path / "vms", program, None)
    with pytest.raises(MicaError) as caught:
        await volumes.create(VM, DISK, None)
    assert caught.value.code is Code.HOST_LACKS
    assert tree(tmp_path / "vms") == []


# What does not fit.


async def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, images: Path) -> None:
    whole = os.statvfs(tmp_path)
    total = whole.f_blocks * whole.f_frsize
    volumes = DirectoryVolumes(tmp_path / "vms", QEMU_IMG, None)
    for format_ in DiskFormat:
        size = Bytes((total // GIB + 1) * GIB)
        with pytest.raises(MicaError, match="larger than the whole file system") as caught:
            await volumes.create(VM, DiskSpec(name="root", size=size, format=format_), None)
        assert caught.value.code is Code.INSUFFICIENT_DISK
        assert caught.value.details == {"size": size, "total": total}
    assert tree(tmp_path / "vms") == []


@contextmanager
def mounted(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
async def test_a_full_file_system(tmp_path: Path, images: Path) -> None:
    with mounted(tmp_path / "small", "20m"):
        volumes = DirectoryVolumes(tmp_path / "small" / "vms", QEMU_IMG, None)
        kept = await volumes.create(VM, DISK, images / "raw")
        (tmp_path / "small" / "ballast").write_bytes(bytes(19 * MIB))
        before = tree(tmp_path / "small")
        for format_ in DiskFormat:
            with pytest.raises(MicaError, match="stay reserved") as caught:
                await volumes.create(VM, DiskSpec(name="data", size=Bytes(MIB), format=format_), images / "raw")
            assert caught.value.code is Code.INSUFFICIENT_DISK
            assert caught.value.retryable
            assert caught.value.details["needed"] > 0
        assert tree(tmp_path / "small") == before
        assert await volumes.prepare(VM, (DISK,), None) == (kept,)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
async def test_a_file_system_that_fills_up_in_the_middle_of_a_copy(tmp_path: Path, images: Path) -> None:
    # qemu-img measures the compressed image as it will be, so only a reserve below zero lets the copy begin.
    (images / "big").write_bytes(os.urandom(12 * MIB))
    spec = DiskSpec(name="root", size=Bytes(12 * MIB), format=DiskFormat.RAW)
    with mounted(tmp_path / "small", "12m"):
        volumes = DirectoryVolumes(tmp_path / "small" / "vms", QEMU_IMG, None, reserve=Bytes(-64 * MIB))
        (tmp_path / "small" / "ballast").write_bytes(bytes(4 * MIB))
        with pytest.raises(MicaError) as caught:
            await volumes.create(VM, spec, images / "big")
        assert caught.value.code is Code.INSUFFICIENT_DISK
        assert tree(tmp_path / "small") == ["ballast", "vms"]
        (tmp_path / "small" / "ballast").unlink()
        (images / "big").write_bytes(os.urandom(MIB))
        await volumes.create(VM, spec, images / "big")


async def test_a_size_beyond_the_format_is_invalid(tmp_path: Path) -> None:
    from mica.storage.qemu_img import QemuImg

    with pytest.raises(MicaError) as caught:
        await QemuImg(QEMU_IMG).create(tmp_path / "x.qcow2", 9 * 10**18, None, DiskFormat.RAW)
    assert caught.value.code is Code.INVALID


# What is left behind.


async def test_a_cancelled_creation_leaves_nothing_and_can_be_repeated(
    volumes: DirectoryVolumes, images: Path, tmp_path: Path
) -> None:
    for turns in range(24):
        task = asyncio.create_task(volumes.create(VM, DISK, images / "qcow2"))
        for _ in range(turns):
            await asyncio.sleep(0.0005)
        task.cancel()
        await asyncio.wait([task])
        assert not [name for name in tree(tmp_path / "vms") if name.endswith(".tmp")]
    volume = await volumes.create(VM, DISK, images / "qcow2")
    assert await volumes.prepare(VM, (DISK,), None) == (volume,)


async def test_what_a_killed_daemon_left_half_made_is_replaced(
    volumes: DirectoryVolumes, images: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "vms" / VM
    directory.mkdir(parents=True)
    (directory / ".root.qcow2.tmp").write_bytes(b"half")
    (directory / ".root.volume.json.tmp").write_bytes(b"{")
    (directory / "root.volume.json").write_bytes(b'{"format":"raw"}')
    volume = await volumes.create(VM, DISK, images / "raw")
    assert await volumes.prepare(VM, (DISK,), None) == (volume,)
    assert tree(directory) == ["root.qcow2", "root.volume.json", "running"]


# Headers that QEMU could have rewritten.


def patch(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


async def refused(volumes: DirectoryVolumes, code: Code, match: str, spec: DiskSpec = DISK) -> MicaError:
    with pytest.raises(MicaError, match=match) as caught:
        await volumes.prepare(VM, (spec,), None)
    assert caught.value.code is code
    assert str(VM) in caught.value.message
    return caught.value


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"root:x:0:0" * 1000)
    return path


async def test_a_header_that_names_another_base_is_refused(
    volumes: DirectoryVolumes, images: Path, secret: Path
) -> None:
    volume = await volumes.create(VM, DISK, images / "raw")
    run(QEMU_IMG, "rebase", "-u", "-F", "raw", "-b", secret, volume.path)
    await refused(volumes, Code.CORRUPT, "secret")
    run(QEMU_IMG, "rebase", "-u", "-F", "qcow2", "-b", images / "raw", volume.path)
    await refused(volumes, Code.CORRUPT, "qcow2")
    run(QEMU_IMG, "rebase", "-u", "-b", "", volume.path)
    await refused(volumes, Code.CORRUPT, "no base")
    run(QEMU_IMG, "rebase", "-u", "-F", "raw", "-b", images / "raw", volume.path)
    assert await volumes.prepare(VM, (DISK,), None) == (volume,)


async def test_a_header_that_names_a_data_file_is_refused(
    volumes: DirectoryVolumes, images: Path, secret: Path
) -> None:
    volume = await volumes.create(VM, DISK, None)
    run(QEMU_IMG, "create", "-f", "qcow2", "-o", f"data_file={secret},data_file_raw=on", volume.path, "8M")
    secret.write_bytes(b"still a secret")
    await refused(volumes, Code.CORRUPT, "data file")
    assert secret.read_bytes() == b"still a secret"


async def test_a_variable_store_with_a_base_is_refused(volumes: DirectoryVolumes, secret: Path) -> None:
    nvram = await volumes.nvram(VM, Firmware.UEFI, None)
    assert nvram is not None
    run(QEMU_IMG, "rebase", "-u", "-F", "raw", "-b", secret, nvram.path)
    with pytest.raises(MicaError, match="secret") as caught:
        await volumes.nvram(VM, Firmware.UEFI, None)
    assert caught.value.code is Code.CORRUPT


async def test_a_volume_that_is_a_link_is_refused(volumes: DirectoryVolumes, secret: Path) -> None:
    spec = DiskSpec(name="root", size=Bytes(8 * MIB), format=DiskFormat.RAW)
    volume = await volumes.create(VM, spec, None)
    volume.path.unlink()
    volume.path.symlink_to(secret)
    await refused(volumes, Code.CORRUPT, "regular file", spec)


@pytest.mark.parametrize(
    ("offset", "content", "match"),
    [
        (0, b"QFI\x00", "magic number"),
        (4, struct.pack(">I", 9), "version 9"),
        (16, struct.pack(">I", 5000), "longer than 1023"),
        (8, struct.pack(">Q", 1 << 40), "outside"),
        (79, b"\x02", "marked it so"),
    ],
)
async def test_a_broken_header_is_named(
    volumes: DirectoryVolumes, images: Path, offset: int, content: bytes, match: str
) -> None:
    volume = await volumes.create(VM, DISK, images / "raw")
    patch(volume.path, offset, content)
    error = await refused(volumes, Code.CORRUPT, match)
    assert str(volume.path) in error.message
    assert error.hint


async def test_an_empty_file_is_no_volume(volumes: DirectoryVolumes) -> None:
    volume = await volumes.create(VM, DISK, None)
    volume.path.write_bytes(b"")
    await refused(volumes, Code.CORRUPT, "not a qcow2 image")


@pytest.mark.parametrize("content", [None, b"{", b'{"format":"vmdk"}'])
async def test_a_volume_without_a_readable_record_is_refused(volumes: DirectoryVolumes, content: bytes | None) -> None:
    volume = await volumes.create(VM, DISK, None)
    record = volume.path.with_name("root.volume.json")
    record.unlink() if content is None else record.write_bytes(content)
    await refused(volumes, Code.CORRUPT, "volume.json")


# Bases.


async def test_a_base_outside_the_image_store_is_refused(volumes: DirectoryVolumes, secret: Path) -> None:
    with pytest.raises(MicaError, match="no image of this host"):
        await volumes.create(VM, DISK, secret)


async def test_a_base_that_lies_over_a_file_outside_the_image_store_is_refused(
    volumes: DirectoryVolumes, images: Path, secret: Path
) -> None:
    run(QEMU_IMG, "create", "-f", "qcow2", "-F", "raw", "-b", secret, images / "trojan")
    with pytest.raises(MicaError, match="secret") as caught:
        await volumes.create(VM, DISK, images / "trojan")
    assert caught.value.code is Code.CORRUPT


async def test_a_base_may_be_named_through_a_link(volumes: DirectoryVolumes, images: Path, tmp_path: Path) -> None:
    (tmp_path / "by-name").symlink_to(images / "raw")
    volume = await volumes.create(VM, DISK, tmp_path / "by-name")
    assert volume.backing == (images / "raw",)


async def test_a_base_that_vanished_is_named(volumes: DirectoryVolumes, images: Path) -> None:
    await volumes.create(VM, DISK, images / "raw")
    (images / "raw").unlink()
    with pytest.raises(MicaError, match="images/raw") as caught:
        await volumes.prepare(VM, (DISK,), None)
    assert caught.value.code is Code.NOT_FOUND
    assert "import" in caught.value.hint


async def test_a_chain_is_followed_and_bounded(volumes: DirectoryVolumes, images: Path) -> None:
    below = images / "raw"
    for n in range(MAX_CHAIN):
        above = images / f"layer-{n}"
        format_ = "raw" if n == 0 else "qcow2"
        run(QEMU_IMG, "create", "-q", "-f", "qcow2", "-F", format_, "-b", below.name, above)
        below = above
    deep = await volumes.create(VM, DISK, images / f"layer-{MAX_CHAIN - 3}")
    assert len(deep.backing) == MAX_CHAIN - 1
    assert deep.backing[-1] == images / "raw"
    with pytest.raises(MicaError, match="more than 15"):
        await volumes.create(VM, DiskSpec(name="deeper", size=Bytes(8 * MIB)), images / f"layer-{MAX_CHAIN - 1}")
    assert "deeper" not in " ".join(tree(deep.path.parent))


# Who else has it open.


@contextmanager
def opened(path: Path, format_: str, *, read_only: bool = False) -> Iterator[None]:
    """A real block driver of QEMU that has the image open, as a machine would."""
    argv = [QEMU_IO, "-f", format_, *(["-r"] if read_only else []), str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"length\n")
            process.stdin.flush()
            while b"MiB" not in (line := process.stdout.readline()):
                assert line, "qemu-io did not open the image"
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("format_", DiskFormat)
async def test_a_disk_that_another_machine_writes_is_in_use(volumes: DirectoryVolumes, format_: DiskFormat) -> None:
    spec = DiskSpec(name="root", size=Bytes(8 * MIB), format=format_)
    volume = await volumes.create(VM, spec, None)
    with opened(volume.path, format_):
        error = await refused(volumes, Code.IN_USE, "in use by another process", spec)
        assert "fuser" in error.hint
    assert await volumes.prepare(VM, (spec,), None) == (volume,)


async def test_a_base_may_be_read_by_many_and_written_by_none(volumes: DirectoryVolumes, images: Path) -> None:
    volume = await volumes.create(VM, DISK, images / "qcow2")
    with opened(images / "qcow2", "qcow2", read_only=True):
        assert await volumes.prepare(VM, (DISK,), None) == (volume,)
    with opened(images / "qcow2", "qcow2"), pytest.raises(MicaError, match="images/qcow2") as caught:
        await volumes.prepare(VM, (DISK,), None)
    assert caught.value.code is Code.IN_USE


# After an unclean end.


def corrupt_table(path: Path) -> None:
    """Point the first entry of the L1 table into the middle of a cluster."""
    header = path.read_bytes()[:104]
    (table,) = struct.unpack_from(">Q", header, 40)
    patch(path, table, struct.pack(">Q", (1 << 63) | (200 << 16) | 0x200))


async def test_metadata_is_checked_only_after_an_unclean_end(volumes: DirectoryVolumes, images: Path) -> None:
    volume = await volumes.create(VM, DISK, images / "raw")
    await volumes.prepare(VM, (DISK,), None)
    run(QEMU_IO, "-f", "qcow2", "-c", "write -P 7 0 1M", volume.path)
    await volumes.settled(VM)
    corrupt_table(volume.path)
    assert await volumes.prepare(VM, (DISK,), None) == (volume,), "a clean end is believed"
    content = volume.path.read_bytes()
    error = await refused(volumes, Code.CORRUPT, "qemu-img check found")
    assert str(volume.path) in error.message
    assert error.details["corruptions"] + error.details.get("errors", 0) >= 1
    assert volume.path.read_bytes() == content, "nothing is repaired by itself"
    await refused(volumes, Code.CORRUPT, "qemu-img check found")


async def test_leaked_clusters_do_no_harm(volumes: DirectoryVolumes) -> None:
    volume = await volumes.create(VM, DISK, None)
    run(QEMU_IO, "-f", "qcow2", "-c", "write -P 7 0 1M", volume.path)
    (table,) = struct.unpack_from(">Q", volume.path.read_bytes(), 40)
    patch(volume.path, table, bytes(8))
    assert subprocess.run([QEMU_IMG, "check", "-q", str(volume.path)], check=False).returncode == 3
    await volumes.prepare(VM, (DISK,), None)
    await volumes.prepare(VM, (DISK,), None)


async def test_a_damaged_variable_store_is_found_too(volumes: DirectoryVolumes) -> None:
    nvram = await volumes.nvram(VM, Firmware.UEFI, None)
    assert nvram is not None
    corrupt_table(nvram.path)
    with pytest.raises(MicaError, match=r"nvram_vars\.qcow2") as caught:
        await volumes.prepare(VM, (), None)
    assert caught.value.code is Code.CORRUPT


# Names.


@pytest.mark.parametrize("vm_id", ["", ".", "..", "a/b", "../x", "lost+found", "a\x00b", "-x", "a\n"])
async def test_an_id_cannot_lead_out_of_the_directory(volumes: DirectoryVolumes, vm_id: str) -> None:
    with pytest.raises(MicaError) as caught:
        await volumes.remove(vm_id)
    assert caught.value.code is Code.INVALID


@pytest.mark.parametrize("name", ["../root", "a/b", ".", "running.x", "nvram_vars"])
async def test_a_disk_name_cannot_lead_out_of_the_directory(volumes: DirectoryVolumes, name: str) -> None:
    with pytest.raises(MicaError) as caught:
        await volumes.create(VM, DiskSpec(name=name, size=Bytes(MIB)), None)
    assert caught.value.code is Code.INVALID


async def test_strange_things_in_the_root_belong_to_nobody(volumes: DirectoryVolumes, tmp_path: Path) -> None:
    await volumes.create(VM, DISK, None)
    (tmp_path / "vms" / "lost+found").mkdir()
    (tmp_path / "vms" / "a-file").touch()
    assert await volumes.owners() == {VM}
