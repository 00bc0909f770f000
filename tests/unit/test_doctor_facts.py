"""Host facts, read from trees that look like hosts we do not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from mica.host.facts import own_groups, read_boot_id, read_facts, read_memory
from mica.model.errors import Code, MicaError
from mica.model.units import GIB, MIB

_MEMINFO = f"MemTotal: {8 * GIB // 1024} kB\nMemAvailable: {6 * GIB // 1024} kB\nSwapTotal: 1024 kB\nSwapFree: 512 kB\n"


class FakeHost:
    """A directory with the files of ``/proc`` and ``/sys`` that the facts are read from."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", _MEMINFO)
        self.write("proc/sys/kernel/random/boot_id", "0f5b3e7e-boot\n")
        self.mounts("30 1 0:20 / /dev/shm rw - tmpfs tmpfs rw")
        (root / "dev/shm").mkdir(parents=True)

    def write(self, path: str, text: str | int) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(str(text))

    def mounts(self, *lines: str) -> None:
        self.write("proc/self/mountinfo", "\n".join(lines) + "\n")

    def v2(self, group: str, mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{group}\n")
        self.mounts(f"31 1 0:26 {mount_root} /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate")


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def test_a_host_without_control_groups_has_all_its_memory(host: FakeHost) -> None:
    memory = read_memory(host.root)
    assert (memory.host, memory.total, memory.available, memory.limit) == (8 * GIB, 8 * GIB, 6 * GIB, None)
    assert (memory.swap_total, memory.swap_free) == (1024 * 1024, 512 * 1024)


def test_the_tightest_limit_above_us_counts_and_its_page_cache_is_available(host: FakeHost) -> None:
    host.v2("/user.slice/app.scope")
    base = "sys/fs/cgroup/user.slice"
    host.write(f"{base}/memory.max", 2 * GIB)
    host.write(f"{base}/memory.current", GIB)
    host.write(f"{base}/memory.stat", f"anon 5\ninactive_file {256 * MIB}\n")
    host.write(f"{base}/app.scope/memory.max", "max\n")
    host.write(f"{base}/app.scope/cpu.max", "max 100000\n")
    host.write(f"{base}/cpu.max", "150000 100000\n")
    memory = read_memory(host.root)
    assert (memory.total, memory.limit) == (2 * GIB, 2 * GIB)
    assert memory.available == GIB + 256 * MIB
    assert read_facts(host.root).cpu_quota == 1.5


def test_a_limit_does_not_make_more_available_than_the_host_has(host: FakeHost) -> None:
    host.v2("/big")
    host.write("sys/fs/cgroup/big/memory.max", 7 * GIB)
    host.write("sys/fs/cgroup/big/memory.current", 0)
    assert read_memory(host.root).available == 6 * GIB
    host.write("sys/fs/cgroup/big/memory.max", 16 * GIB)
    assert read_memory(host.root).limit is None


def test_version_1_hierarchies_and_their_unlimited(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "5:cpu,cpuacct:/box\n4:memory:/box\n1:name=systemd:/box\n0::/\n")
    host.mounts(
        "31 1 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
        "32 1 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
        "33 1 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
    )
    host.write("sys/fs/cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    host.write("sys/fs/cgroup/memory/box/memory.limit_in_bytes", GIB)
    host.write("sys/fs/cgroup/memory/box/memory.usage_in_bytes", 512 * MIB)
    host.write("sys/fs/cgroup/memory/box/memory.stat", f"inactive_file 1\ntotal_inactive_file {128 * MIB}\n")
    host.write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", 50000)
    host.write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", 100000)
    host.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", -1)
    memory = read_memory(host.root)
    assert (memory.limit, memory.available) == (GIB, 640 * MIB)
    facts = read_facts(host.root)
    assert facts.cpu_quota == 0.5
    assert facts.processors == 0.5
    assert {own_groups(host.root)[name].version for name in ("memory", "cpu", "cpuacct")} == {1}


@pytest.mark.parametrize("mount_root", ["/docker/abc", "/"])
def test_a_container_sees_its_own_group_at_the_mount(host: FakeHost, mount_root: str) -> None:
    host.v2("/docker/abc" if mount_root != "/" else "/../other", mount_root)
    host.write("sys/fs/cgroup/memory.max", GIB)
    host.write("sys/fs/cgroup/memory.current", 0)
    group = own_groups(host.root)[""]
    assert group.directory == group.mount == host.root / "sys/fs/cgroup"
    assert read_memory(host.root).limit == GIB


def test_shared_memory_counts_only_where_a_tmpfs_is_mounted(host: FakeHost) -> None:
    assert read_facts(host.root).shm_total > 0
    host.mounts("30 1 0:20 / /dev rw - tmpfs tmpfs rw")
    assert read_facts(host.root).shm_total == 0


def test_without_proc_the_error_says_so(tmp_path: Path) -> None:
    for read in (read_memory, read_boot_id, read_facts):
        with pytest.raises(MicaError, match="/proc") as caught:
            read(tmp_path)
        assert caught.value.code is Code.HOST_LACKS


def test_this_host_has_facts() -> None:
    facts = read_facts()
    assert 0 < facts.memory_available <= facts.memory_total <= facts.memory_host
    assert facts.cpus >= 1
    assert len(facts.boot_id) == 36
