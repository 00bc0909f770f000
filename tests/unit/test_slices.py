"""Control groups: version 1 on the real kernel where there is one, version 2 on a made-up tree and, as far as this
host has it, on the real one; systemd by stand-ins for its tools that keep the same promises."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mica.host import slices, slices_files
from mica.host.facts import own_groups
from mica.host.processes import ExitStatus, reference, spawn
from mica.host.slices_systemd import SystemdUnit
from mica.host.slices_v1 import CONTROLLERS, SlicesV1
from mica.host.slices_v2 import SlicesV2, enable
from mica.model.errors import Code, MicaError
from mica.model.units import MIB, Bytes
from mica.model.views import UsageSource
from mica.ports.slices import SliceLimits, SliceUsage

GROUPS = own_groups()
needs_v1 = pytest.mark.skipif(
    os.geteuid() != 0 or not {"cpu", "cpuacct", "memory"} <= GROUPS.keys(), reason="needs root and cgroup v1"
)
needs_v2 = pytest.mark.skipif(os.geteuid() != 0 or "" not in GROUPS, reason="needs root and cgroup v2")
FREE = SliceLimits(None, None)
NAME = f"mica-test-{os.getpid()}"


@pytest.fixture
def v1() -> Iterator[SlicesV1]:
    roots = {name: GROUPS[name].mount / NAME for name in CONTROLLERS if name in GROUPS}
    for root in roots.values():
        root.mkdir(exist_ok=True)
    yield SlicesV1(roots, remove_timeout_s=5)
    for root in set(roots.values()):
        for entry in root.iterdir():
            if entry.is_dir():
                entry.rmdir()
        root.rmdir()


BUSY = "while True: pass"


async def burn(group: SlicesV1 | SlicesV2, cpus: float | None, seconds: float) -> float:
    """Processors that an endless loop gets in a group."""
    handle = await group.create("busy", SliceLimits(cpus, None))
    with spawn([sys.executable, "-c", BUSY]) as process:
        try:
            await group.join(handle, process.pid)
            await asyncio.sleep(0.2)
            before, begin = (await group.usage(handle)).cpu_s, time.monotonic()
            await asyncio.sleep(seconds)
            after, end = (await group.usage(handle)).cpu_s, time.monotonic()
        finally:
            process.kill()
            await process.wait_exit(10)
    await group.remove(handle)
    assert before is not None
    assert after is not None
    return (after - before) / (end - begin)


@pytest.mark.root
@needs_v1
async def test_a_busy_process_is_held_to_its_share(v1: SlicesV1) -> None:
    held = await burn(v1, 0.2, 1.0)
    assert 0.05 < held < 0.26  # never above its quota, up to one period's slack
    free = await burn(v1, None, 0.5)
    assert free > held * 1.2


@pytest.mark.root
@needs_v1
async def test_a_limit_reaches_a_running_process(v1: SlicesV1) -> None:
    handle = await v1.create("vm", FREE)
    with spawn([sys.executable, "-c", BUSY]) as process:
        try:
            await v1.join(handle, process.pid)
            await v1.update(handle, SliceLimits(0.1, None))
            await asyncio.sleep(0.3)
            before = (await v1.usage(handle)).cpu_s or 0
            await asyncio.sleep(1)
            assert ((await v1.usage(handle)).cpu_s or 0) - before < 0.2
        finally:
            process.kill()
            await process.wait_exit(10)
    await v1.remove(handle)


HOG = "b=[]\nwhile True: b.append(bytearray(1<<20))"


@pytest.mark.root
@needs_v1
async def test_a_memory_hog_is_ended_within_its_group(v1: SlicesV1) -> None:
    handle = await v1.create("hog", SliceLimits(None, Bytes(48 * MIB)))
    other = await v1.create("other", SliceLimits(None, Bytes(48 * MIB)))
    read, write = os.pipe()
    argv = ["sh", "-c", 'read x; exec "$0" -c "$1"', sys.executable, HOG]
    with spawn(["sleep", "60"]) as neighbour, spawn(argv, stdin=read) as hog:
        try:
            await v1.join(handle, hog.pid)
            await v1.join(other, neighbour.pid)
            os.write(write, b"go\n")
            assert await hog.wait_exit(30) == ExitStatus(signal=signal.SIGKILL)
            assert (await v1.usage(handle)).oom_kills >= 1
            assert (await v1.usage(other)).oom_kills == 0
            assert neighbour.alive
        finally:
            os.close(read)
            os.close(write)
            for process in (hog, neighbour):
                process.kill()
                await process.wait_exit(10)
    await v1.remove(handle)
    await v1.remove(other)


@pytest.mark.root
@needs_v1
async def test_guest_ram_in_tmpfs_counts_for_who_touches_it_and_cannot_be_undercut(v1: SlicesV1) -> None:
    handle = await v1.create("vm", SliceLimits(None, Bytes(256 * MIB)))
    ram = Path("/dev/shm") / NAME
    read, write = os.pipe()
    argv = ["sh", "-c", f"read x; head -c 64M /dev/zero > {ram}; echo done > {ram}.done; exec sleep 60"]
    try:
        with spawn(argv, stdin=read) as process:
            try:
                await v1.join(handle, process.pid)
                os.write(write, b"go\n")
                async with asyncio.timeout(20):
                    while not Path(f"{ram}.done").exists():
                        await asyncio.sleep(0.01)
                assert ((await v1.usage(handle)).memory or 0) >= 64 * MIB
                with pytest.raises(MicaError) as caught:
                    await v1.update(handle, SliceLimits(None, Bytes(32 * MIB)))
                assert caught.value.code is Code.STATE_CONFLICT
                assert process.alive
                await v1.update(handle, SliceLimits(None, Bytes(128 * MIB)))
            finally:
                process.kill()
                await process.wait_exit(10)
    finally:
        os.close(read)
        os.close(write)
        for path in (ram, Path(f"{ram}.done")):
            path.unlink(missing_ok=True)
    await v1.remove(handle)


async def lifecycle(group: SlicesV1 | SlicesV2) -> None:
    """What every kind promises, on a real kernel."""
    handle = await group.create("vm-1", FREE)
    assert await group.create("vm-1", FREE) == handle  # idempotent
    assert group.present() == {"vm-1": handle}
    with spawn(["sleep", "60"]) as process:
        try:
            await group.join(handle, process.pid)
            await group.join(handle, process.pid)
            assert "vm-1" in Path(f"/proc/{process.pid}/cgroup").read_text()
            with pytest.raises(MicaError) as caught:
                await group.remove(handle)
            assert caught.value.code is Code.IN_USE
            assert caught.value.details["pids"] == [process.pid]
        finally:
            process.kill()
        removing = asyncio.ensure_future(group.remove(handle))
        await process.wait_exit(10)
        await removing  # waits until the kernel lets go
        with pytest.raises(MicaError) as caught:
            await group.join(await group.create("vm-1", FREE), process.pid)
        assert caught.value.code is Code.GONE
    await group.remove(handle)
    await group.remove(handle)
    assert group.present() == {}
    with pytest.raises(MicaError) as caught:
        await group.usage(handle)
    assert caught.value.code is Code.GONE


@pytest.mark.root
@needs_v1
async def test_life_of_a_group_on_v1(v1: SlicesV1) -> None:
    v1._remove_timeout_s = 0.3
    await lifecycle(v1)
    assert v1.reduced == ()
    assert NAME in v1.proof


@pytest.mark.root
@needs_v2
async def test_life_of_a_group_on_v2() -> None:
    root = GROUPS[""].mount / NAME
    root.mkdir()
    try:
        await lifecycle(SlicesV2(root, frozenset(), remove_timeout_s=0.3))
        used = await burn(SlicesV2(root, frozenset()), None, 0.3)  # cpu.stat is there without the controller
        assert used > 0.05
    finally:
        root.rmdir()


# ---- version 2 on a made-up tree


class Tree:
    """A cgroup v2 directory as files. Removing a group must remove its files, as the kernel does."""

    def __init__(self, root: Path, controllers: str = "cpuset cpu io memory pids") -> None:
        self.root = root
        self.group(root, controllers)

    def group(self, path: Path, controllers: str) -> Path:
        path.mkdir(exist_ok=True)
        (path / "cgroup.controllers").write_text(controllers + "\n")
        (path / "cgroup.subtree_control").write_text("")
        (path / "cgroup.procs").write_text("")
        return path


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "cgroup")


async def test_v2_limits_are_written_as_the_kernel_reads_them(tree: Tree) -> None:
    have = enable(tree.root)
    assert (tree.root / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    group = SlicesV2(tree.root, have, pids=99)
    handle = await group.create("vm", SliceLimits(1.5, Bytes(64 * MIB)))
    path = tree.root / "vm"
    assert (path / "cpu.max").read_text() == "150000 100000"
    assert (path / "memory.max").read_text() == str(64 * MIB)
    assert (path / "pids.max").read_text() == "99"
    await group.update(handle, FREE)
    assert (path / "cpu.max").read_text() == "max 100000"
    assert (path / "memory.max").read_text() == "max"
    await group.update(handle, SliceLimits(0.001, None))
    assert (path / "cpu.max").read_text() == "1000 100000"  # the kernel takes no less
    await group.join(handle, 4711)
    assert (path / "cgroup.procs").read_text() == "4711"


async def test_v2_usage_is_read(tree: Tree) -> None:
    group = SlicesV2(tree.root, enable(tree.root))
    handle = await group.create("vm", FREE)
    path = tree.root / "vm"
    assert await group.usage(handle) == SliceUsage(None, None)
    me = reference(os.getpid())
    (path / "cpu.stat").write_text("usage_usec 1000000\n")
    seen = await group.usage(handle, me)  # the memory controller is not there: the process tells that half
    assert (seen.cpu_s, seen.source) == (1.0, UsageSource.PROCESS)
    assert (seen.memory or 0) > MIB
    (path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    (path / "memory.current").write_text("12345\n")
    (path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    counted = await group.usage(handle, me)
    assert (counted.own or 0) > MIB, "what is the process's own is told in any case"
    assert msgspec.structs.replace(counted, own=None) == SliceUsage(2.5, Bytes(12345), 2, UsageSource.CGROUP)


async def test_v2_a_limit_below_what_is_used_is_refused(tree: Tree) -> None:
    group = SlicesV2(tree.root, enable(tree.root))
    handle = await group.create("vm", SliceLimits(None, Bytes(100)))
    (tree.root / "vm/memory.stat").write_text("anon 40\nfile 500\nshmem 30\nkernel 5\n")
    await group.update(handle, SliceLimits(None, Bytes(75)))
    with pytest.raises(MicaError) as caught:
        await group.update(handle, SliceLimits(None, Bytes(74)))
    assert caught.value.code is Code.STATE_CONFLICT
    assert "75 bytes" in caught.value.message
    assert (tree.root / "vm/memory.max").read_text() == "75"


def test_v2_only_delegated_controllers_are_used_and_the_rest_is_told(tmp_path: Path) -> None:
    group = SlicesV2(tmp_path, enable(Tree(tmp_path / "a", "memory pids").root))
    assert len(group.reduced) == 1
    assert "CPU time" in group.reduced[0]
    with pytest.raises(MicaError) as caught:
        enable(Tree(tmp_path / "b", "io").root)
    assert caught.value.code is Code.HOST_LACKS
    with pytest.raises(MicaError):
        enable(tmp_path / "absent")


@pytest.mark.parametrize("vm_id", ["", "..", "../x", "a/b", "." + "x"])
async def test_an_id_cannot_lead_elsewhere(tree: Tree, vm_id: str) -> None:
    with pytest.raises(MicaError) as caught:
        await SlicesV2(tree.root, frozenset()).create(vm_id, FREE)
    assert caught.value.code is Code.INVALID


async def test_when_a_write_is_refused_somebody_else_may_attach(tree: Tree) -> None:
    asked: list[tuple[Path, int]] = []

    async def attach(group: Path, pid: int) -> None:
        asked.append((group, pid))

    group = SlicesV2(tree.root, frozenset(), attach=attach)
    handle = await group.create("vm", FREE)
    (tree.root / "vm/cgroup.procs").mkdir()  # cannot be written
    await group.join(handle, 17)
    assert asked == [(tree.root / "vm", 17)]
    with pytest.raises(MicaError):
        await SlicesV2(tree.root, frozenset()).join(handle, 17)


# ---- detection, on made-up hosts


def host(root: Path, mounts: str, own: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(mounts)
    (root / "proc/self/cgroup").write_text(own)
    return root


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


def v2_host(root: Path, own: str = "/user.slice/session-1.scope", controllers: str = "cpu memory pids") -> Path:
    (root / "sys/fs").mkdir(parents=True)
    tree = Tree(root / "sys/fs/cgroup", controllers)
    path = tree.root
    for name in own.strip("/").split("/"):
        path = tree.group(path / name, controllers) if name else path
    return host(root, V2_MOUNT, f"0::{own}\n")


async def test_a_host_without_control_groups_says_so(tmp_path: Path) -> None:
    found = await slices.detect(root=True, prefix="mica", host=host(tmp_path, "", ""))
    assert isinstance(found, slices.NoSlices)
    assert "not limited" in found.reduced[0]
    handle = await found.create("vm", SliceLimits(1, Bytes(1)))
    await found.join(handle, 1)
    assert await found.usage(handle) == SliceUsage(None, None)
    await found.update(handle, FREE)
    await found.remove(handle)
    assert found.present() == {}


async def test_without_control_groups_use_is_that_of_the_process(tmp_path: Path) -> None:
    found = slices.NoSlices("none here")
    ready = tmp_path / "ready"
    # The work is a thread's that has ended, and memory in tmpfs counts as a guest's RAM does.
    code = (
        "import mmap,pathlib,threading,time\nm=mmap.mmap(-1,48<<20)\nm.write(b'x'*(48<<20))\n"
        "def work():\n end=time.thread_time()+0.3\n while time.thread_time()<end: pass\n"
        f"t=threading.Thread(target=work);t.start();t.join()\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)"
    )
    with spawn([sys.executable, "-c", code]) as process:
        try:
            while not ready.exists():
                assert process.alive
                await asyncio.sleep(0.01)
            seen = await found.usage({}, process.ref)
        finally:
            process.kill()
        await process.wait_exit(10)
    assert seen.source is UsageSource.PROCESS
    assert (seen.cpu_s or 0) >= 0.25
    assert 48 * MIB <= (seen.memory or 0) < 200 * MIB
    assert seen.own is not None
    assert seen.own <= (seen.memory or 0) - 48 * MIB, "what lies in tmpfs is not its own"
    assert await found.usage({}, process.ref) == SliceUsage(None, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="root owns the tree")
async def test_root_without_systemd_makes_a_group_at_the_top(tmp_path: Path) -> None:
    root = v2_host(tmp_path)
    top = root / "sys/fs/cgroup"
    Tree(top / "mica-home")  # the kernel fills a new group with its files at once
    found = await slices.detect(root=True, prefix="mica-home", host=root)
    assert isinstance(found, SlicesV2)
    handle = await found.create("vm", FREE)
    assert handle["path"] == str(top / "mica-home/vm")
    assert (top / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


async def test_an_ordinary_user_divides_a_group_that_is_theirs(tmp_path: Path) -> None:
    root = v2_host(tmp_path, "/mine")
    mine = root / "sys/fs/cgroup/mine"
    Tree(mine / "mica")
    found = await slices.detect(root=False, prefix="mica", host=root)
    assert isinstance(found, SlicesV2)
    assert (mine / "mica-daemon/cgroup.procs").read_text() == str(os.getpid())
    assert (await found.create("vm", FREE))["path"] == str(mine / "mica/vm")


async def test_an_ordinary_user_on_v1_is_told_what_would_help(tmp_path: Path) -> None:
    mounts = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    (tmp_path / "sys/fs/cgroup/cpu").mkdir(parents=True)
    found = await slices.detect(root=False, prefix="mica", host=host(tmp_path, mounts, "1:cpu:/\n"))
    assert isinstance(found, slices.NoSlices)
    assert "v1" in found.reason
    assert "unified" in found.hint


@pytest.mark.root
@needs_v1
async def test_this_host_is_detected() -> None:
    found = await slices.detect(root=True, prefix=NAME)
    assert isinstance(found, SlicesV1)
    handle = await found.create("vm", SliceLimits(1, Bytes(64 * MIB)))
    assert (GROUPS["cpu"].mount / NAME / "vm/cpu.cfs_quota_us").read_text() == "100000\n"
    await found.remove(handle)
    await slices_files.remove([GROUPS[name].mount / NAME for name in CONTROLLERS if name in GROUPS], 5)


# ---- systemd, by stand-ins

SYSTEMD_RUN = """#!/bin/sh
echo "systemd-run $*" >> {base}/calls
test -e {base}/refuse && {{ echo "Failed to connect to bus: No medium found" >&2; exit 1; }}
mkdir -p {group}; echo "{controllers}" > {group}/cgroup.controllers; : > {group}/cgroup.subtree_control
echo 4242 > {group}/cgroup.procs; mkdir -p {group}/mica-holder
echo active > {base}/state
"""
SYSTEMCTL = """#!/bin/sh
echo "systemctl $*" >> {base}/calls
if test -e {base}/state; then echo ActiveState=active; echo ControlGroup=/app.slice/mica-vms.service
else echo ActiveState=inactive; echo ControlGroup=; fi
"""
BUSCTL = """#!/bin/sh
echo "busctl $*" >> {base}/calls
"""


class Systemd:
    """Stand-ins for systemd's tools: what they are asked is in ``calls``."""

    def __init__(self, base: Path, mount: Path) -> None:
        self.base = base
        base.mkdir()
        self.group = mount / "app.slice/mica-vms.service"
        for name, text in (("systemd-run", SYSTEMD_RUN), ("systemctl", SYSTEMCTL), ("busctl", BUSCTL)):
            script = base / name
            script.write_text(text.format(base=base, group=self.group, controllers="cpu memory pids"))
            script.chmod(0o755)
        self.environment = {"PATH": f"{base}:/usr/bin:/bin"}

    @property
    def calls(self) -> list[str]:
        return (self.base / "calls").read_text().splitlines()


@pytest.fixture
def systemd(tmp_path: Path) -> Systemd:
    root = v2_host(tmp_path)
    (root / "run/systemd/system").mkdir(parents=True)
    return Systemd(tmp_path / "bin", root / "sys/fs/cgroup")


async def test_systemd_delegates_a_unit_that_outlives_the_daemon(systemd: Systemd, tmp_path: Path) -> None:
    async def detect() -> slices.HostSlices:
        return await slices.detect(root=False, prefix="mica", host=tmp_path, environment=systemd.environment)

    found = await detect()
    assert isinstance(found, SlicesV2)
    started = next(call for call in systemd.calls if call.startswith("systemd-run"))
    for word in ("--user", "mica-vms.service", "Delegate=yes", "KillMode=process", "OOMPolicy=continue"):
        assert word in started
    assert (systemd.group / "mica-holder/cgroup.procs").read_text() == "4242"
    handle = await found.create("vm", SliceLimits(1, None))
    assert handle["path"] == str(systemd.group / "vm")
    assert found.present() == {"vm": handle}
    await detect()
    assert sum(call.startswith("systemd-run") for call in systemd.calls) == 1  # the unit is found again


async def test_systemd_attaches_what_a_session_may_not_move(systemd: Systemd, tmp_path: Path) -> None:
    unit = SystemdUnit("mica-vms.service", user=True, environment=systemd.environment, mount=systemd.group.parents[1])
    directory = await unit.start()
    await unit.attach(directory / "vm", 4711)
    assert systemd.calls[-1].endswith("AttachProcessesToUnit ssau mica-vms.service /vm 1 4711")
    assert "--user" in systemd.calls[-1]


async def test_without_a_bus_the_next_way_is_taken_and_the_reason_told(systemd: Systemd, tmp_path: Path) -> None:
    (systemd.base / "refuse").touch()
    own = tmp_path / "sys/fs/cgroup/user.slice/session-1.scope"
    (own / "cgroup.controllers").write_text("\n")  # ours, but nothing delegated
    found = await slices.detect(root=False, prefix="mica", host=tmp_path, environment=systemd.environment)
    assert isinstance(found, slices.NoSlices)
    assert "No medium found" in found.reason
    assert "controller" in found.reason
    assert found.hint
