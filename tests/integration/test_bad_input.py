"""What cannot be: each gets an error that names the thing, the limit and the way out, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mica.client import Client
from mica.client.vms import make_create
from mica.model.errors import Code, MicaError
from mica.model.image import Firmware, ImportRecipe, MicroRecipe
from mica.model.units import MIB, Bytes
from mica.model.vm import DiskSpec, IoLimits, Machine, NicSpec, Publish
from tests.integration.conftest import create
from tests.integration.world import World, new_world

pytestmark = pytest.mark.guest

DISK = DiskSpec(name="data", size=Bytes(64 * MIB))


def other(**fields: Any) -> DiskSpec:
    return msgspec.structs.replace(DISK, **fields)


REFUSED: dict[str, tuple[dict[str, Any], Code, str]] = {
    "name with a blank": ({"name": "my vm"}, Code.INVALID, "'my vm' is not a DNS label"),
    "name with a path": ({"name": "../etc"}, Code.INVALID, "not a DNS label"),
    "name too long": ({"name": "x" * 64}, Code.INVALID, "not a DNS label"),
    "name in capitals": ({"name": "Web"}, Code.INVALID, "not a DNS label"),
    "no such image": ({"image": "solaris"}, Code.NOT_FOUND, "there is no image 'solaris'"),
    "no memory": ({"memory": "1M"}, Code.INVALID, "below the"),
    "memory below the image's": ({"memory": "64M"}, Code.INVALID, "that image micro needs"),
    "memory not whole": ({"memory": 128 * MIB + 1}, Code.INVALID, "not a whole number of MiB"),
    "no vCPU": ({"cpus": 0}, Code.INVALID, "0 vCPUs"),
    "too many vCPUs": ({"cpus": 1000}, Code.INVALID, "1000 vCPUs; a VM has 1 to 255"),
    "no such CPU": ({"cpu_model": "i9"}, Code.INVALID, "no CPU model 'i9'"),
    "CPU of the host": ({"cpu_model": "Nehalam"}, Code.INVALID, "no CPU model 'Nehalam'"),
    "no such network": ({"nics": (NicSpec(network="dmz"),)}, Code.INVALID, "'dmz'"),
    "two devices of a name": ({"disks": (DISK, DISK)}, Code.INVALID, "two devices are named 'data'"),
    "boot from nothing": ({"boot": ("floppy",)}, Code.INVALID, "'floppy', which is no disk or NIC"),
    "too many disks": ({"disks": tuple(other(name=f"d{n}") for n in range(17))}, Code.INVALID, "at most 16 disks"),
    "a disk of nothing": ({"disks": (other(size=Bytes(0)),)}, Code.INVALID, "below"),
    "a disk of odd size": ({"disks": (other(size=Bytes(64 * MIB + 1)),)}, Code.INVALID, "not a multiple of 512"),
    "negative limits": ({"disks": (other(limits=IoLimits(-1)),)}, Code.INVALID, "cannot be negative"),
    "UEFI on the minimal machine": (
        {"machine": Machine.MINIMAL, "firmware": Firmware.UEFI},
        Code.INVALID,
        "the minimal machine has no UEFI firmware",
    ),
    "a port beyond": ({"publish": (Publish(70000),)}, Code.INVALID, "70000"),
    "an odd protocol": ({"publish": (Publish(80, protocol="sctp"),)}, Code.INVALID, "'sctp'"),
    "a foreign address": ({"publish": (Publish(80, 0, "300.1.1.1"),)}, Code.INVALID, "300.1.1.1"),
    "a label with a blank": ({"labels": {"a b": "c"}}, Code.INVALID, "'a b'"),
    "a label of control characters": ({"labels": {"a": "b\nc"}}, Code.INVALID, "not printable"),
    "no time to stop": ({"stop_timeout_s": -1.0}, Code.INVALID, "stop time-out"),
    "a hostname with a command": ({"hostname": "a;reboot"}, Code.INVALID, "not a DNS label"),
    "an image of another disk": ({"disks": (other(image="blake3:" + "0" * 64),)}, Code.NOT_FOUND, "image"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_vm_that_cannot_be_is_refused(shared_world: World, shared_client: Client, case: str) -> None:
    fields, code, words = REFUSED[case]
    fields = {"image": "micro", "name": "impossible", "memory": "128M", **fields}
    before = (shared_world.leftovers(), {vm.id for vm in await shared_client.vms.list()})
    with pytest.raises(MicaError) as caught:
        await shared_client.vms.create(make_create(**fields))
    assert caught.value.code is code, caught.value.message
    assert words in caught.value.message
    after = (shared_world.leftovers(), {vm.id for vm in await shared_client.vms.list()})
    assert after == before


async def test_a_name_that_exists(shared_client: Client) -> None:
    vm = await create(shared_client, "twice")
    try:
        with pytest.raises(MicaError) as caught:
            await create(shared_client, "twice")
        assert caught.value.code is Code.EXISTS
        assert vm.id[:8] in caught.value.message
        assert caught.value.hint
        second = await create(shared_client, "thrice")
        with pytest.raises(MicaError) as caught:
            await second.set(name="twice")
        assert caught.value.code is Code.EXISTS
        assert (await second.refresh()).name == "thrice"
        await second.remove()
    finally:
        await vm.remove()


async def make_disk(path: Path, *options: str, size: str = "32M", form: str = "qcow2") -> Path:
    process = await asyncio.create_subprocess_exec("qemu-img", "create", "-q", "-f", form, *options, path, size)
    assert await process.wait() == 0
    return path


async def test_disks_and_images_that_do_not_fit(shared_client: Client, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    disk = await make_disk(tmp_path / "small.qcow2")
    await shared_client.images.make(ImportRecipe(name="imported", path=str(disk), firmware=Firmware.BIOS))
    with pytest.raises(MicaError) as caught:
        await shared_client.vms.create(make_create("imported", name="tight", disk="16M"))
    assert caught.value.code is Code.INVALID
    assert "16 MiB is below the 32 MiB of image imported" in caught.value.message
    operation = await shared_client.vms.create(make_create("imported", name="fits", disk="48M", memory="64M"))
    vm = await shared_client.vms.get(operation.target.partition("/")[2])
    try:
        with pytest.raises(MicaError) as caught:
            await shared_client.images.delete("imported")
        assert caught.value.code is Code.IN_USE
        assert "fits" in caught.value.message
        root = vm.view.spec.disks[0]
        with pytest.raises(MicaError) as caught:
            await vm.set(disks=(msgspec.structs.replace(root, size=Bytes(40 * MIB)),))
        assert "cannot shrink" in caught.value.message
        await vm.start()  # nothing boots from it, but it runs
        await vm.delete(force=True)
        with pytest.raises(MicaError) as caught:  # the trash counts too
            await shared_client.images.delete("imported")
        assert caught.value.code is Code.IN_USE
    finally:
        await vm.remove()
    await shared_client.images.delete("imported")


async def test_files_that_are_no_image(shared_client: Client, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    text = tmp_path / "text.vmdk"
    text.write_text("this is no disk\n" * 5000)
    base = await make_disk(tmp_path / "base.qcow2")
    chained = await make_disk(tmp_path / "chained.qcow2", "-b", str(base), "-F", "qcow2")
    broken = await make_disk(tmp_path / "broken.qcow2")
    with broken.open("r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 8)  # where the table of clusters is: nowhere
    empty = tmp_path / "empty.raw"
    empty.touch()
    expected = {
        chained: ({Code.INVALID}, "another file"),
        broken: ({Code.CORRUPT}, "broken.qcow2"),
        empty: ({Code.CORRUPT, Code.INVALID}, "empty.raw"),
        tmp_path / "absent": ({Code.NOT_FOUND}, "absent"),
        tmp_path: ({Code.INVALID, Code.CORRUPT}, str(tmp_path)),
        Path("relative.qcow2"): ({Code.INVALID}, "not an absolute path"),
    }
    before = {view.image.digest for view in await shared_client.images.list()}
    for path, (codes, words) in expected.items():
        with pytest.raises(MicaError) as caught:
            await shared_client.images.make(ImportRecipe(name="bad", path=str(path)))
        assert caught.value.code in codes, f"{path}: {caught.value.code} {caught.value.message}"
        assert words in caught.value.message
    assert {view.image.digest for view in await shared_client.images.list()} == before


def test_a_damaged_image_is_noticed_and_refused() -> None:
    with new_world(link=False) as world:

        async def damage() -> None:
            async with world.client() as client:
                ok = await create(client, "before")
                await client.images.verify("micro")
                (kernel,) = world.home.glob("images/*/vmlinuz")
                kernel.chmod(0o644)
                with kernel.open("r+b") as file:
                    file.seek(kernel.stat().st_size // 2)
                    byte = file.read(1)
                    file.seek(-1, 1)
                    file.write(bytes([byte[0] ^ 1]))
                with pytest.raises(MicaError) as caught:
                    await client.images.verify("micro")
                assert caught.value.code is Code.CORRUPT
                assert "vmlinuz" in caught.value.message
                view = await client.images.get("micro")
                assert "vmlinuz" in view.damaged
                with pytest.raises(MicaError) as caught:
                    await create(client, "after")
                assert caught.value.code is Code.CORRUPT
                assert "mica image delete micro" in caught.value.hint
                # Gone altogether: what stands on it does not start, and says what it lacks.
                kernel.unlink()
                with pytest.raises(MicaError) as caught:
                    await ok.start()
                assert "vmlinuz" in caught.value.message
                assert (await ok.refresh()).observed.state.value == "stopped"
                await ok.remove()
                await client.images.delete("micro")
                assert await client.images.list() == []

        asyncio.run(damage())
        assert world.leftovers() == []


async def test_ctrl_c_while_an_image_builds(shared_world: World, shared_client: Client) -> None:
    """The build is undone, the command says so, and the next one works."""
    argv = [sys.executable, "-P", "-m", "mica", "image", "build", "micro", "--name", "interrupted"]
    with subprocess.Popen(
        argv, env=shared_world.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
    ) as command:
        async with asyncio.timeout(60):
            while not (
                active := [o for o in await shared_client.operations.list(active=True) if o.verb == "image.make"]
            ):
                await asyncio.sleep(0.02)
        command.send_signal(signal.SIGINT)
        said = await asyncio.to_thread(command.communicate, timeout=60)
    assert command.returncode in (130, 25), said
    ended = await shared_client.operations.settle(active[0].id, timeout_s=60)
    assert ended.state.value == "cancelled"
    assert "interrupted" not in {view.image.name for view in await shared_client.images.list()}
    work = shared_world.home / "images" / ".work"
    assert not work.exists() or not list(work.iterdir())


async def test_what_a_build_cannot_get(shared_client: Client) -> None:
    with pytest.raises(MicaError) as caught:
        await shared_client.images.make(MicroRecipe(name="never", suite="no-such-suite"))
    assert "no-such-suite" in caught.value.message
    assert caught.value.hint
