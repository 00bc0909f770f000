"""The home and the host that a daemon finds: taken, too new, damaged, without a QEMU, full."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mica.client.handle import VmHandle
from mica.model.errors import TABLE, Code, MicaError
from mica.model.units import MIB, Bytes
from mica.model.vm import DiskSpec, VmState
from tests.integration.conftest import create
from tests.integration.shell import shell
from tests.integration.world import World, new_world

pytestmark = pytest.mark.guest

ROMS = [file for directory in ("/usr/share/qemu", "/usr/share/seabios") for file in Path(directory).glob("*.bin")]
# Debian builds accelerators and displays as modules.
MODULES = [
    *Path("/usr/lib/x86_64-linux-gnu/qemu").glob("accel-tcg-x86_64.so"),
    *Path("/usr/lib/x86_64-linux-gnu/qemu").glob("hw-display-virtio-*.so"),
]
QEMU = shutil.which("qemu-system-x86_64") or ""


AT_REST = (VmState.STOPPED, VmState.RUNNING, VmState.CRASHED)


def daemon(world: World) -> subprocess.CompletedProcess[str]:
    """Run a daemon that is to end by itself."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "mica.daemon", "--home", str(world.home)],
        env=world.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def quiet() -> Iterator[World]:
    """A home whose daemon does not run yet."""
    with new_world(start=False) as made:
        yield made


def test_a_second_daemon_is_refused(shared_world: World) -> None:
    ended = daemon(shared_world)
    assert ended.returncode == TABLE[Code.HOME_LOCKED].exit_status
    assert f"pid {shared_world.pid} " in ended.stderr
    assert str(shared_world.home) in ended.stderr
    assert "mica daemon stop" in ended.stderr
    assert shared_world.answers()


def test_up_beside_a_daemon_does_not_claim_to_run_one(shared_world: World) -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "mica", "up", "--home", str(shared_world.home)],
        env=shared_world.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == TABLE[Code.HOME_LOCKED].exit_status
    assert "the daemon with pid" in ended.stderr
    assert "running the daemon" not in ended.stderr


def test_a_home_of_a_newer_mica_is_refused_and_left_alone(quiet: World) -> None:
    quiet.start()
    quiet.kill(15)
    file = quiet.home / "state.db"
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("INSERT INTO schema_version VALUES (999, 'from the future')")
    before = file.read_bytes()
    ended = daemon(quiet)
    assert ended.returncode == TABLE[Code.HOME_NEWER].exit_status
    assert "schema 999" in ended.stderr
    assert "MICA_HOME" in ended.stderr
    assert file.read_bytes() == before
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("DELETE FROM schema_version WHERE version = 999")
    quiet.start()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("qemu = [", "not TOML"),
        ('quemu = "x"', "unknown settings: quemu"),
        ('listen = "0.0.0.0:80"', "nothing but loopback"),
        ('reserve = "lots"', "lots"),
        ('trash = "soon"', "soon"),
        ('accelerator = "hvf"', "kvm or tcg"),
    ],
)
def test_settings_that_make_no_sense(quiet: World, text: str, words: str) -> None:
    (quiet.home / "config.toml").write_text(text)
    ended = daemon(quiet)
    assert ended.returncode == TABLE[Code.INVALID].exit_status
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_damaged_database_is_refused_by_name(quiet: World) -> None:
    quiet.start()
    quiet.kill(15)
    file = quiet.home / "state.db"
    file.write_bytes(b"not a database at all" * 1000)
    ended = daemon(quiet)
    assert ended.returncode == TABLE[Code.CORRUPT].exit_status
    assert str(file) in ended.stderr
    assert "hint:" in ended.stderr


# ---- QEMU


async def test_a_missing_qemu_is_told_and_found_when_it_is_there(quiet: World) -> None:
    path = quiet.home / "bin" / "qemu"
    path.parent.mkdir(mode=0o755)
    quiet.configure(qemu=str(path))
    await asyncio.to_thread(quiet.start)
    async with quiet.client() as client:
        assert (await client.host()).qemu == ""
        with pytest.raises(MicaError) as caught:
            await create(client, "early")
        assert caught.value.code is Code.HOST_LACKS
        assert str(path) in caught.value.message
        assert "apt-get install" in caught.value.hint
        assert await client.vms.list() == []
        done = await asyncio.to_thread(quiet.cli, "run", "micro", "--name", "early")
        assert done.returncode == TABLE[Code.HOST_LACKS].exit_status
        assert "apt-get install" in done.stderr
        # Broken in one way after the other, each told in its own words.
        path.write_text("#!/bin/sh\necho this is no qemu >&2\nexit 3\n")
        path.chmod(0o755)
        with pytest.raises(MicaError) as caught:
            await create(client, "early")
        assert caught.value.code is Code.HOST_LACKS
        assert "this is no qemu" in caught.value.message
        path.chmod(0o644)
        with pytest.raises(MicaError) as caught:
            await create(client, "early")
        assert caught.value.code is Code.HOST_LACKS
        # Repaired, without a new daemon. A link to a place that a jail shows anyway.
        path.unlink()
        path.symlink_to(QEMU)
        vm = await create(client, "early")
        await vm.start()
        assert vm.state is VmState.RUNNING
        assert (await client.host()).qemu
        await vm.remove()


async def test_a_qemu_of_the_users_own(quiet: World) -> None:
    """Built by hand and installed elsewhere: the jail shows it what is its own, and nothing else there."""
    prefix = quiet.home.parent / f"{quiet.home.name}-prefix"
    try:
        (prefix / "bin").mkdir(parents=True)
        prefix.chmod(0o755)
        (prefix / "secret").write_text("not for QEMU")
        shutil.copy2(QEMU, prefix / "bin" / "qemu-mine")
        data, modules = prefix / "share" / "qemu", prefix / "lib" / "x86_64-linux-gnu" / "qemu"
        for source, target in ((ROMS, data), (MODULES, modules)):
            target.mkdir(parents=True)
            for file in source:
                shutil.copy2(file, target)
        shutil.copytree("/usr/share/qemu/keymaps", data / "keymaps")
        quiet.configure(qemu=str(prefix / "bin" / "qemu-mine"))
        await asyncio.to_thread(quiet.start)
        async with quiet.client() as client:
            vm = await create(client, "mine")
            await vm.start()
            await vm.wait_agent(timeout_s=90)
            assert vm.view.process is not None
            root = Path(f"/proc/{vm.view.process.pid}/root")
            assert os.readlink(f"/proc/{vm.view.process.pid}/exe") == str(prefix / "bin" / "qemu-mine")
            assert (root / str(data).lstrip("/")).is_dir()
            assert not (root / str(prefix / "secret").lstrip("/")).exists()
            await vm.remove()
    finally:
        shutil.rmtree(prefix, ignore_errors=True)


async def test_a_qemu_that_refuses_its_arguments_gives_its_last_words(shared_world: World, vm: VmHandle) -> None:
    """QEMU ends at once: its words are the error, and nothing is left. A damaged disk is the simplest way there."""
    await vm.remove()
    async with shared_world.client() as client:
        broken = await create(client, "broken", disk="16M")
        try:
            (disk,) = (shared_world.home / "volumes" / broken.id).glob("root.qcow2")
            with disk.open("r+b") as file:
                file.write(b"\0" * 512)
            with pytest.raises(MicaError) as caught:
                await broken.start()
            assert caught.value.code in (Code.QEMU_FAILED, Code.CORRUPT)
            assert disk.name in caught.value.message
            view = await broken.refresh()
            assert view.observed.state is VmState.STOPPED
            assert view.observed.problem is not None
            assert not [line for line in shared_world.leftovers() if broken.id in line and "/run/" in line]
        finally:
            await broken.remove()


# ---- full


@contextlib.contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    """A small file system at ``directory``; yields the file that fills it when it grows."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    directory.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0711", "tmpfs", str(directory)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode()}")
    try:
        yield directory / ".filler"
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(file: Path, leave: int = 0) -> None:
    """Take all the space that is left but ``leave`` bytes."""
    stat = os.statvfs(file.parent)
    size = stat.f_bavail * stat.f_frsize - leave
    with file.open("ab", buffering=0) as out:
        with contextlib.suppress(OSError):
            os.posix_fallocate(out.fileno(), out.tell(), size)
        while not leave:
            try:
                out.write(b"x" * 4096)
            except OSError:
                break


async def test_a_full_disk_below_the_volumes(quiet: World) -> None:
    with small_disk(quiet.home / "volumes", "24M") as filler:
        await asyncio.to_thread(quiet.start)
        disks = (DiskSpec(name="data", size=Bytes(16 * MIB)),)
        async with quiet.client() as client:
            # In the middle of a creation: refused, and nothing is half done.
            fill(filler)
            with pytest.raises(MicaError) as caught:
                await create(client, "full", disks=disks)
            assert caught.value.code is Code.INSUFFICIENT_DISK
            assert await client.vms.list() == []
            assert [entry for entry in (quiet.home / "volumes").iterdir() if not entry.name.startswith(".")] == []
            filler.unlink()
            vm = await create(client, "full", disks=disks)
            # In the middle of a run: the guest is held, and goes on once there is space.
            await vm.start()
            async with shell(vm) as guest:
                await guest.run("until [ -b /dev/vda ]; do usleep 100000; done")
                fill(filler, leave=4 * MIB)
                writing = asyncio.create_task(
                    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=12 conv=fsync 2>&1")
                )
                view = await client.vms.wait_until(
                    vm.id, lambda v: v.observed.state is VmState.PAUSED, timeout_s=60, what="the guest held"
                )
                assert "disk may be full" in view.observed.reason
                filler.unlink()
                await vm.resume()
                assert "12+0 records out" in await writing
                assert guest.status == 0
            await vm.remove()


async def test_a_full_disk_below_everything(quiet: World) -> None:
    """Nothing can be written, not even that something was asked for: refused, and all is well afterwards."""
    home = quiet.home
    kept = home.with_name(home.name + "-kept")
    shutil.copytree(home, kept)
    try:
        with small_disk(home, "120M") as filler:
            shutil.copytree(kept, home, dirs_exist_ok=True)
            await asyncio.to_thread(quiet.start)
            async with quiet.client() as client:
                vm = await create(client, "here", disk="32M")
                fill(filler)
                codes = set()
                for _ in range(30):
                    try:
                        await create(client)
                    except MicaError as error:
                        codes.add(error.code)
                    try:
                        await vm.start()
                        await vm.stop(force=True)
                    except MicaError as error:
                        codes.add(error.code)
                    if Code.INSUFFICIENT_DISK in codes:
                        break
                assert codes == {Code.INSUFFICIENT_DISK}
                assert "here" in [v.name for v in await client.vms.list()]  # it still answers
                filler.unlink()
                await asyncio.to_thread(quiet.restart)
                view = await client.vms.wait_until(
                    vm.id,
                    lambda v: (
                        v.observed.state in (VmState.STOPPED, VmState.RUNNING, VmState.CRASHED) and not v.operations
                    ),
                    timeout_s=30,
                    what="rest",
                )
                assert view.observed.state is not VmState.CRASHED
                await vm.start()
                await asyncio.gather(*(v.remove() for v in await client.vms.list()))
            assert quiet.leftovers() == []
            quiet.kill()
    finally:
        shutil.rmtree(kept)
