"""One suite for every place that keeps volumes: what the engine relies on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from mica.model.errors import Code, MicaError
from mica.model.image import DiskFormat, Firmware
from mica.model.units import MIB, Bytes
from mica.model.vm import DiskSpec
from mica.ports.volumes import Volumes
from mica.storage.directory import DirectoryVolumes
from mica.storage.qemu_img import QemuImg

VM, OTHER = "11111111-aaaa-4bbb-8ccc-000000000001", "11111111-aaaa-4bbb-8ccc-000000000002"


class Rig(NamedTuple):
    """Volumes under test, and two base images of one MiB that they know."""

    volumes: Volumes
    base: Path
    other_base: Path


def directory(tmp_path: Path) -> Rig:
    program = shutil.which("qemu-img")
    if program is None:
        pytest.skip("needs qemu-img (package qemu-utils)")
    images = tmp_path / "images"
    images.mkdir()
    for name in ("one", "two"):
        (images / name).write_bytes(name.encode().ljust(MIB // 2, b".") + bytes(MIB // 2))
    template = tmp_path / "OVMF_VARS.fd"
    template.write_bytes(b"vars" * 1024)
    volumes = DirectoryVolumes(tmp_path / "vms", program, template, bases=[images])
    return Rig(volumes, images / "one", images / "two")


# Whoever adds an implementation adds it here.
RIGS: dict[str, Callable[[Path], Rig]] = {"directory": directory}


@pytest.fixture(params=sorted(RIGS))
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    return RIGS[request.param](tmp_path)


def disk(name: str = "root", size: int = 8 * MIB, format_: DiskFormat = DiskFormat.QCOW2) -> DiskSpec:
    return DiskSpec(name=name, size=Bytes(size), format=format_)


async def test_nothing_is_there_before_something_is_made(rig: Rig) -> None:
    assert await rig.volumes.owners() == set()
    assert await rig.volumes.usage(VM) == 0
    await rig.volumes.remove(VM)
    await rig.volumes.settled(VM)
    assert await rig.volumes.prepare(VM, (), None) == ()


@pytest.mark.parametrize("format_", DiskFormat)
async def test_an_empty_volume(rig: Rig, format_: DiskFormat) -> None:
    volume = await rig.volumes.create(VM, disk(format_=format_), None)
    assert (volume.name, volume.format, volume.size, volume.backing) == ("root", format_, 8 * MIB, ())
    assert not volume.read_only
    assert await rig.volumes.owners() == {VM}


async def test_a_layer_over_a_base_names_it(rig: Rig) -> None:
    volume = await rig.volumes.create(VM, disk(), rig.base)
    assert volume.backing == (rig.base,)
    assert await rig.volumes.prepare(VM, (disk(),), None) == (volume,)


async def test_making_it_again_keeps_it(rig: Rig) -> None:
    first = await rig.volumes.create(VM, disk(), rig.base)
    assert await rig.volumes.create(VM, disk(), rig.base) == first


async def test_something_else_under_the_same_name_is_refused(rig: Rig) -> None:
    await rig.volumes.create(VM, disk(), rig.base)
    for spec, base in ((disk(), rig.other_base), (disk(), None), (disk(format_=DiskFormat.RAW), rig.base)):
        with pytest.raises(MicaError) as caught:
            await rig.volumes.create(VM, spec, base)
        assert caught.value.code is Code.CORRUPT
    assert (await rig.volumes.prepare(VM, (disk(),), None))[0].backing == (rig.base,)


async def test_a_disk_smaller_than_its_base_is_refused(rig: Rig) -> None:
    with pytest.raises(MicaError) as caught:
        await rig.volumes.create(VM, disk(size=MIB // 2), rig.base)
    assert caught.value.code is Code.INVALID
    assert await rig.volumes.owners() == set()


async def test_a_base_that_is_not_there_is_named(rig: Rig) -> None:
    with pytest.raises(MicaError) as caught:
        await rig.volumes.create(VM, disk(), rig.base.with_name("nowhere"))
    assert caught.value.code is Code.NOT_FOUND
    assert "nowhere" in caught.value.message


async def test_preparing_gives_the_volumes_in_the_order_of_the_disks(rig: Rig) -> None:
    specs = (disk("c"), disk("a"), DiskSpec(name="b", size=Bytes(MIB), read_only=True))
    for spec in specs:
        await rig.volumes.create(VM, spec, None)
    volumes = await rig.volumes.prepare(VM, specs, None)
    assert [volume.name for volume in volumes] == ["c", "a", "b"]
    assert [volume.read_only for volume in volumes] == [False, False, True]
    assert await rig.volumes.prepare(VM, specs, None) == volumes


async def test_preparing_what_is_not_there(rig: Rig) -> None:
    await rig.volumes.create(VM, disk("here"), None)
    with pytest.raises(MicaError) as caught:
        await rig.volumes.prepare(VM, (disk("here"), disk("gone")), None)
    assert caught.value.code is Code.NOT_FOUND
    assert "gone" in caught.value.message


@pytest.mark.parametrize("format_", DiskFormat)
async def test_a_disk_grows_when_it_is_prepared_and_never_shrinks(rig: Rig, format_: DiskFormat) -> None:
    await rig.volumes.create(VM, disk(format_=format_), rig.base)
    (volume,) = await rig.volumes.prepare(VM, (disk(size=16 * MIB, format_=format_),), None)
    assert volume.size == 16 * MIB
    with pytest.raises(MicaError) as caught:
        await rig.volumes.prepare(VM, (disk(format_=format_),), None)
    assert caught.value.code is Code.INVALID
    (volume,) = await rig.volumes.prepare(VM, (disk(size=16 * MIB, format_=format_),), None)
    assert volume.size == 16 * MIB


async def test_after_an_unclean_end_a_healthy_disk_is_prepared_all_the_same(rig: Rig) -> None:
    volume = await rig.volumes.create(VM, disk(), rig.base)
    assert await rig.volumes.prepare(VM, (disk(),), None) == (volume,)
    assert await rig.volumes.prepare(VM, (disk(),), None) == (volume,)
    await rig.volumes.settled(VM)
    assert await rig.volumes.prepare(VM, (disk(),), None) == (volume,)


async def test_the_variable_store_is_made_once_and_only_for_uefi(rig: Rig) -> None:
    assert await rig.volumes.nvram(VM, Firmware.BIOS, None) is None
    assert await rig.volumes.owners() == set()
    first = await rig.volumes.nvram(VM, Firmware.UEFI, None)
    assert first is not None
    assert first.size > 0
    assert await rig.volumes.nvram(VM, Firmware.UEFI, None) == first
    assert await rig.volumes.owners() == {VM}


async def test_volumes_of_two_vms_are_apart(rig: Rig) -> None:
    mine = await rig.volumes.create(VM, disk(), rig.base)
    theirs = await rig.volumes.create(OTHER, disk(), rig.base)
    assert mine.path != theirs.path
    assert await rig.volumes.owners() == {VM, OTHER}
    await rig.volumes.remove(VM)
    assert await rig.volumes.owners() == {OTHER}
    assert await rig.volumes.prepare(OTHER, (disk(),), None) == (theirs,)


async def test_removing_takes_everything_and_can_be_repeated(rig: Rig) -> None:
    await rig.volumes.create(VM, disk(), rig.base)
    await rig.volumes.nvram(VM, Firmware.UEFI, None)
    assert await rig.volumes.usage(VM) > 0
    await rig.volumes.remove(VM)
    await rig.volumes.remove(VM)
    assert await rig.volumes.owners() == set()
    assert await rig.volumes.usage(VM) == 0
    with pytest.raises(MicaError) as caught:
        await rig.volumes.prepare(VM, (disk(),), None)
    assert caught.value.code is Code.NOT_FOUND
    assert (await rig.volumes.create(VM, disk(), rig.other_base)).backing == (rig.other_base,)


async def test_a_copy_has_all_that_its_source_had_and_needs_nothing_of_it(rig: Rig) -> None:
    made = await rig.volumes.create(VM, disk(), rig.base)
    assert made.backing
    told: list[float] = []
    copied = await rig.volumes.copy(OTHER, disk(), rig.base, told.append)
    assert (copied.backing, copied.format) == ((), DiskFormat.QCOW2)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert await rig.volumes.copy(OTHER, disk(), rig.base, told.append) == copied, "it is kept"
    rig.base.unlink()
    (prepared,) = await rig.volumes.prepare(OTHER, (disk(),), None)
    assert (prepared.path, prepared.size) == (copied.path, 8 * MIB)
    raw = rig.base.with_name("raw")
    await QemuImg(shutil.which("qemu-img") or "").convert(copied.path, DiskFormat.QCOW2, raw, DiskFormat.RAW, 8 * MIB)
    assert raw.read_bytes()[: MIB // 2] == b"one".ljust(MIB // 2, b".")
