"""``mica doctor`` on hosts that lack things, and on this one."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mica.host.doctor import CHECKS, Examination, Probes, examine
from mica.host.doctor_fix import Fixes, read_family
from mica.host.facts import own_groups
from mica.host.slices import HostSlices, NoSlices, detect
from mica.model.doctor import AcceleratorProof, AcceleratorStep, DoctorReport, Finding, Status
from mica.model.errors import Code, MicaError
from mica.network.slirp import Slirp
from mica.ports.slices import SliceLimits

_MEMINFO = "MemTotal: 8388608 kB\nMemAvailable: 6291456 kB\n"


class FakeBuild(msgspec.Struct, frozen=True):
    path: str = "/usr/bin/qemu-system-x86_64"
    version: str = "9.2.0"
    machines: tuple[str, ...] = ("pc-q35-9.2", "microvm")
    aliases: dict[str, str] = msgspec.field(default_factory=lambda: {"q35": "pc-q35-9.2"})
    accelerators: tuple[str, ...] = ("kvm", "tcg")
    has_sandbox: bool = False


class FakeJail(msgspec.Struct, frozen=True):
    kind: str = "root"
    proof: str = "CapEff was 0"
    reduced: tuple[str, ...] = ()


class FakeNetwork(msgspec.Struct, frozen=True):
    path: str = "/usr/bin/passt"
    proof: str = "forged frames were dropped"


class FakeFirmware(msgspec.Struct, frozen=True):
    code: str
    vars: str


KVM = AcceleratorProof(name="kvm", works=True, reason="right in all 9 steps")
NO_KVM = AcceleratorProof(
    name="kvm", works=False, reason="step cmpxchg16b: wrong", steps=(AcceleratorStep("cmpxchg16b", ok=False),)
)
TCG = AcceleratorProof(name="tcg", works=True, reason="right in all 9 steps")


def _answers(value: Any) -> Callable[..., Awaitable[Any]]:
    async def answer(*_: object) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    return answer


class FakeHost:
    """A directory tree that looks like a host, programs of our own on its path, and answers from other rooms."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir()
        self.uid = 0
        self.user = "root"
        self.answers: dict[str, Any] = {
            "qemu": FakeBuild(),
            "accelerators": (KVM, TCG),
            "jail": FakeJail(),
            "network": FakeNetwork(),
            "reduced_network": MicaError(Code.HOST_LACKS, "no slirp", hint="a newer one; setting slirp = allow"),
        }
        self.firmware: FakeFirmware | None = None
        self.slices: HostSlices | None = None
        self.check_timeout_s = 20.0
        for name in ("home", "shm", "etc", "sys"):
            (root / name).mkdir()
        self.write("proc/meminfo", _MEMINFO)
        self.write("proc/sys/kernel/random/boot_id", "boot\n")
        self.write("proc/self/cgroup", "0::/\n")
        self.mounts()
        self.write("etc/os-release", "ID=debian\n")
        for name in ("apt-get", "dpkg-deb", "mmdebstrap", "mke2fs", "sfdisk", "mcopy", "newuidmap", "unshare", "passt"):
            self.program(name)
        self.program("bwrap")
        self.program("qemu-img", "echo qemu-img version 9.2.0")

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def mounts(self, *lines: str, shm: str = "tmpfs") -> None:
        base = f"30 1 0:9 / {self.root}/shm rw - {shm} none rw"
        self.write("proc/self/mountinfo", "\n".join([base, *lines]) + "\n")

    def program(self, name: str, body: str = "exit 0") -> None:
        file = self.bin / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)

    async def examine(self, **changes: Any) -> DoctorReport:
        probes = Probes(
            qemu=_answers(self.answers["qemu"]),
            accelerators=_answers(self.answers["accelerators"]),
            jail=_answers(self.answers["jail"]),
            network=_answers(self.answers["network"]),
            reduced_network=_answers(self.answers["reduced_network"]),
            firmware=lambda: self.firmware,
            slices=self.slices,
        )
        values: dict[str, Any] = {
            "home": self.root / "home/mica",
            "path": str(self.bin),
            "uid": self.uid,
            "user": self.user,
            "probes": probes,
            "root": self.root,
            "check_timeout_s": self.check_timeout_s,
        }
        return await examine(Examination(**(values | changes)))

    async def finding(self, key: str, **changes: Any) -> Finding:
        report = await self.examine(**changes)
        (found,) = [finding for finding in report.findings if finding.id == key]
        return found


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


@pytest.fixture
def user(host: FakeHost) -> FakeHost:
    host.uid, host.user = 1000, "ada"
    return host


async def test_every_line_has_a_proof_and_every_gap_a_price(host: FakeHost) -> None:
    report = await host.examine()
    assert len({finding.id for finding in report.findings}) == len(report.findings) >= len(CHECKS)
    for finding in report.findings:
        assert finding.proof
        assert (finding.status is Status.OK) == (finding.costs == ""), finding
        if finding.status is Status.OK:
            assert not finding.fix
    assert report.host.memory_total == 8 * 1024**3
    assert report.accelerators == (KVM, TCG)
    assert msgspec.json.decode(msgspec.json.encode(report), type=DoctorReport) == report


async def test_without_qemu_the_report_says_how_to_get_it_and_goes_on(user: FakeHost) -> None:
    user.answers["qemu"] = MicaError(Code.HOST_LACKS, "there is no QEMU", hint="install it")
    report = await user.examine()
    qemu = report.findings[0]
    assert (qemu.id, qemu.status) == ("qemu", Status.MISSING)
    assert qemu.fix == ("sudo", "apt-get", "install", "-y", "qemu-system-x86")
    assert report.status is Status.MISSING
    assert "memory" in {finding.id for finding in report.findings}


async def test_a_kvm_that_lies_is_told_with_its_step_and_its_price(host: FakeHost) -> None:
    host.answers["accelerators"] = (NO_KVM, TCG)
    report = await host.examine()
    kvm, tcg, boundary = (
        next(finding for finding in report.findings if finding.id == key)
        for key in ("accelerator-kvm", "accelerator-tcg", "boundary")
    )
    assert kvm.status is Status.DEGRADED
    assert "a small 64-bit guest was run, and it failed: step cmpxchg16b" in kvm.proof
    assert "software emulation" in kvm.costs
    assert tcg.status is Status.OK
    assert boundary.status is Status.DEGRADED
    assert "the jail is the only boundary" in boundary.costs


async def test_with_a_proven_kvm_the_hardware_is_part_of_the_boundary(host: FakeHost) -> None:
    boundary = await host.finding("boundary")
    assert boundary.status is Status.OK
    assert "hardware" in boundary.proof


async def test_where_no_accelerator_works_nothing_runs(host: FakeHost) -> None:
    host.answers["accelerators"] = (NO_KVM, AcceleratorProof(name="tcg", works=False, reason="no", fix="install"))
    report = await host.examine()
    assert {f.status for f in report.findings if f.id.startswith("accelerator")} == {Status.MISSING}
    assert next(f for f in report.findings if f.id == "accelerator-tcg").fix[0] == "apt-get"


@pytest.mark.parametrize(
    ("fix", "argv"),
    [
        ("sudo usermod -aG kvm ada", ("sudo", "usermod", "-aG", "kvm", "ada")),
        ("sudo chgrp kvm /d && sudo usermod -aG kvm ada", ("sudo", "sh", "-c", "chgrp kvm /d && usermod -aG kvm ada")),
    ],
)
async def test_the_way_to_kvm_for_a_user(user: FakeHost, fix: str, argv: tuple[str, ...]) -> None:
    user.answers["accelerators"] = (AcceleratorProof(name="kvm", works=False, reason="permission", fix=fix), TCG)
    kvm = await user.finding("accelerator-kvm")
    assert kvm.fix == argv
    assert "log in again" in kvm.fix_note


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("kernel/unprivileged_userns_clone", "0", "= 1"),
        ("user/max_user_namespaces", "0", "= 65536"),
    ],
)
async def test_a_setting_that_forbids_namespaces_is_found(
    user: FakeHost, setting: str, value: str, allowed: str
) -> None:
    user.write(f"proc/sys/{setting}", f"{value}\n")
    user.program("bwrap", "echo 'setting up uid map: Permission denied' >&2; exit 1")
    found = await user.finding("privileges")
    assert found.status is Status.MISSING
    assert "uid map: Permission denied" in found.proof
    assert found.fix[:3] == ("sudo", "sh", "-c")
    assert allowed in found.fix[3]
    assert "sysctl -p" in found.fix[3]
    assert setting.replace("/", ".") in found.fix_note


async def test_apparmor_is_told_to_let_bubblewrap_alone_through(user: FakeHost) -> None:
    user.write("proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n")
    user.program("bwrap", "echo 'setting up uid map: Permission denied' >&2; exit 1")
    found = await user.finding("privileges")
    bwrap = user.bin / "bwrap"
    assert "apparmor_restrict_unprivileged_userns is 1" in found.fix_note
    assert found.fix[:3] == ("sudo", "sh", "-c")
    script = found.fix[3].replace("/etc/apparmor.d", str(user.root)).replace("apparmor_parser -r", "cat")
    written = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert written.splitlines() == [
        "abi <abi/4.0>,",
        "include <tunables/global>",
        f"profile mica-bwrap {bwrap} flags=(unconfined) {{ userns, }}",
    ]
    assert (user.root / "mica-bwrap").read_text() == written


async def test_a_setting_is_not_blamed_where_namespaces_work(user: FakeHost) -> None:
    user.write("proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n")
    assert (await user.finding("privileges")).status is Status.OK


async def test_without_bubblewrap(host: FakeHost) -> None:
    (host.bin / "bwrap").unlink()
    if shutil.which("bwrap", path="/usr/local/sbin:/usr/sbin:/sbin") is not None:
        pytest.skip("this host has bwrap among its system programs")
    found = await host.finding("privileges")
    assert found.status is Status.MISSING
    assert found.fix == ("apt-get", "install", "-y", "bubblewrap")


async def test_what_the_other_rooms_lack_is_told_in_their_words(host: FakeHost) -> None:
    host.answers["jail"] = MicaError(
        Code.HOST_LACKS, "setpriv is missing", hint="get it", details={"program": "setpriv"}
    )
    host.answers["network"] = MicaError(Code.HOST_LACKS, "passt does not know --no-map-gw", hint="a newer one")
    jail, network = await host.finding("jail"), await host.finding("network")
    assert (jail.status, jail.fix) == (Status.MISSING, ("apt-get", "install", "-y", "util-linux"))
    assert (network.status, network.fix, network.fix_note) == (
        Status.DEGRADED,
        (),
        "a newer one; setting slirp = allow",
    )
    assert "a VM with a NIC is refused" in network.costs


async def test_a_network_that_is_less_is_named(host: FakeHost) -> None:
    host.answers["network"] = MicaError(Code.HOST_LACKS, "passt does not know --no-map-gw", hint="a newer one")
    host.answers["reduced_network"] = Slirp("passt does not know --no-map-gw")
    found = await host.finding("network")
    assert (found.status, found.fix, found.fix_note) == (Status.DEGRADED, (), "a newer one")
    assert "loopback" in found.costs
    assert "refused" not in found.costs


async def test_a_jail_that_is_off_is_a_gap(user: FakeHost) -> None:
    user.answers["jail"] = FakeJail("off", "switched off by a setting", ("files are open to it",))
    found = await user.finding("jail")
    assert (found.status, found.costs) == (Status.DEGRADED, "files are open to it")


async def test_a_check_that_hangs_or_fails_does_not_take_the_others_along(host: FakeHost) -> None:
    async def hang() -> Any:
        await asyncio.Event().wait()

    host.answers["network"] = OSError(5, "Input/output error", "/some/file")
    host.check_timeout_s = 1.0
    report = await host.examine(
        probes=Probes(
            qemu=_answers(FakeBuild()),
            accelerators=_answers((TCG,)),
            jail=hang,
            network=_answers(host.answers["network"]),
            reduced_network=_answers(host.answers["reduced_network"]),
            firmware=lambda: None,
        )
    )
    by_id = {finding.id: finding for finding in report.findings}
    assert by_id["jail"].proof == "could not be examined: did not come back within 1 s"
    assert "/some/file: Input/output error" in by_id["network"].proof
    assert by_id["disk"].proof.startswith(str(host.root / "home/mica"))


async def test_images_need_programs_and_for_users_sub_ids(user: FakeHost) -> None:
    missing = await user.finding("images")
    span = "100000-165535"
    assert missing.fix == ("sudo", "usermod", "--add-subuids", span, "--add-subgids", span, "ada")
    user.write("etc/subuid", "bob:100000:65536\nada:165536:65536\n")
    user.write("etc/subgid", "bob:100000:65536\n")
    assert "165536-231071" in (await user.finding("images")).fix
    user.write("etc/subgid", "1000:165536:65536\n")
    assert (await user.finding("images")).status is Status.OK
    user.program("mmdebstrap", "echo 'newuidmap: not setuid' >&2; exit 1")
    found = await user.finding("images")
    assert (found.status, "newuidmap: not setuid" in found.proof) == (Status.DEGRADED, True)


async def test_images_on_other_distributions_are_not_promised(host: FakeHost) -> None:
    (host.bin / "mcopy").unlink()
    (host.bin / "mmdebstrap").unlink()
    found = await host.finding("images")
    if shutil.which("mcopy", path="/usr/sbin") is None:
        assert found.fix == ("apt-get", "install", "-y", "mmdebstrap", "mtools")
    host.write("etc/os-release", "ID=fedora\n")
    found = await host.finding("images")
    assert (found.fix, "Debian" in found.fix_note) == ((), True)


async def test_qemu_img_is_run(host: FakeHost) -> None:
    assert "qemu-img version 9.2.0" in (await host.finding("qemu-img")).proof
    host.program("qemu-img", "echo 'libfoo.so is missing' >&2; exit 127")
    found = await host.finding("qemu-img")
    assert (found.status, found.fix) == (Status.DEGRADED, ("apt-get", "install", "-y", "qemu-utils"))
    assert "libfoo.so is missing" in found.proof


async def test_firmware_is_read(host: FakeHost) -> None:
    assert (await host.finding("uefi")).fix == ("apt-get", "install", "-y", "ovmf")
    code, template = host.write("code.fd", "flash"), host.write("vars.fd", "")
    host.firmware = FakeFirmware(str(code), str(template))
    assert f"{template} is empty" in (await host.finding("uefi")).proof
    template.write_text("flash")
    assert (await host.finding("uefi")).status is Status.OK
    code.unlink()
    assert "code.fd: No such file" in (await host.finding("uefi")).proof


async def test_memory_and_its_limits(host: FakeHost) -> None:
    assert (await host.finding("memory")).status is Status.OK
    host.write("proc/self/cgroup", "0::/box\n")
    host.mounts(f"31 1 0:26 / {'/sys/fs/cgroup'} rw - cgroup2 cgroup2 rw")
    host.write("sys/fs/cgroup/box/memory.max", str(512 * 1024**2))
    host.write("sys/fs/cgroup/box/memory.current", "0")
    found = await host.finding("memory")
    assert found.status is Status.DEGRADED
    assert "limited by control groups to 512 MiB" in found.proof


async def test_guest_memory_can_be_sealed(host: FakeHost) -> None:
    found = await host.finding("guest-ram")
    assert found.status is Status.OK
    assert "sealed" in found.proof


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
async def test_places_that_cannot_be_written(host: FakeHost) -> None:
    (host.root / "home").chmod(0o555)
    report = await host.examine()
    status = {finding.id: finding.status for finding in report.findings}
    assert status["disk"] is Status.MISSING


async def test_a_read_only_place_is_missing(host: FakeHost) -> None:
    # /proc refuses files to everybody, root included.
    report = await host.examine(home=Path("/proc/mica"))
    status = {finding.id: finding.status for finding in report.findings}
    assert status["disk"] is Status.MISSING


# Control groups ---------------------------------------------------------------------------------------------------


async def test_no_control_groups(host: FakeHost) -> None:
    found = await host.finding("cgroups")
    assert found.status is Status.DEGRADED
    assert "no hierarchy of control groups is mounted" in found.proof


async def test_a_version_2_group_without_controllers_is_of_no_use(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "0::/user\n")
    host.mounts("31 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
    host.write("sys/fs/cgroup/user/cgroup.subtree_control", "pids memory\n")
    host.write("sys/fs/cgroup/cgroup.subtree_control", "pids\n")
    found = await host.finding("cgroups")
    assert "hands cpu and memory to its children" in found.proof
    assert list((host.root / "sys/fs/cgroup").glob("**/mica-doctor*")) == []


async def test_systemd_makes_scopes_and_delegation_is_looked_at(user: FakeHost) -> None:
    (user.root / "run/systemd/system").mkdir(parents=True)
    user.write("sys/fs/cgroup/user.slice/app.slice/cgroup.subtree_control", "memory pids\n")
    user.program("systemd-run", 'echo "$@" > "${0%/*}/../arguments"; echo 0::/user.slice/app.slice/run-1.scope')
    found = await user.finding("cgroups")
    assert found.status is Status.DEGRADED
    assert "cpu not delegated" in found.proof
    assert "Delegate=cpu" in found.fix[-1]
    user.write("sys/fs/cgroup/user.slice/app.slice/cgroup.subtree_control", "cpu memory pids\n")
    assert (await user.finding("cgroups")).status is Status.OK
    arguments = (user.root / "arguments").read_text()
    assert "--user --scope" in arguments
    assert "MemoryMax=" in arguments
    user.program("systemd-run", "echo 'Failed to connect to bus' >&2; exit 1")
    assert "systemd-run: Failed to connect to bus" in (await user.finding("cgroups")).proof


class FakeSlices(NoSlices, frozen=True):
    """Groups that are made and removed, as far as ``lacks`` and ``fails`` let them."""

    made: list[str] = msgspec.field(default_factory=list)
    lacks: tuple[str, ...] = ()
    fails: str = ""

    @property
    def reduced(self) -> tuple[str, ...]:
        return self.lacks

    async def create(self, vm_id: str, limits: SliceLimits) -> dict[str, Any]:
        assert limits.cpus
        assert limits.memory
        if self.fails:
            raise OSError(28, self.fails)
        self.made.append(vm_id)
        return {"id": vm_id}

    async def remove(self, handle: dict[str, Any]) -> None:
        if handle:
            self.made.remove(handle["id"])


async def test_the_groups_that_the_daemon_uses_are_tried(host: FakeHost) -> None:
    good = FakeSlices("unit mica-vms.service, delegated by systemd")
    host.slices = good
    found = await host.finding("cgroups")
    assert (found.status, good.made) == (Status.OK, [])
    assert found.proof.startswith("unit mica-vms.service")
    host.slices = FakeSlices("v2", lacks=("CPU time of VMs is not limited",))
    found = await host.finding("cgroups")
    assert (found.status, found.costs) == (Status.DEGRADED, "CPU time of VMs is not limited")
    host.slices = FakeSlices("v2", fails="No space left on device")
    assert "No space left on device" in (await host.finding("cgroups")).proof
    host.slices = NoSlices("no control groups are mounted", "mount them")
    found = await host.finding("cgroups")
    assert (found.status, found.fix_note) == (Status.DEGRADED, "mount them")


async def test_lingering(user: FakeHost) -> None:
    assert (await user.finding("linger")).status is Status.OK
    (user.root / "run/systemd/system").mkdir(parents=True)
    user.program("systemd-run", "exit 1")
    user.program("loginctl", "echo no")
    found = await user.finding("linger")
    assert (found.status, found.fix) == (Status.DEGRADED, ("sudo", "loginctl", "enable-linger", "ada"))
    user.program("loginctl", "echo yes")
    assert (await user.finding("linger")).status is Status.OK


@pytest.mark.parametrize(("scope", "status"), [("0", Status.OK), ("1", Status.OK), ("2", Status.DEGRADED)])
async def test_ptrace_scope(user: FakeHost, scope: str, status: Status) -> None:
    user.write("proc/sys/kernel/yama/ptrace_scope", scope)
    found = await user.finding("ptrace")
    assert found.status is status
    assert f"ptrace scope: {scope}" in found.proof
    assert bool(found.fix) == (scope == "2")


# Distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "family", "command"),
    [
        ("ID=debian\nVERSION_ID=12\n", "debian", "apt-get install -y qemu-utils uidmap"),
        ('ID=ubuntu\nID_LIKE="debian"\n', "debian", "apt-get install -y qemu-utils uidmap"),
        ("ID=linuxmint\nID_LIKE='ubuntu debian'\n", "debian", "apt-get install -y qemu-utils uidmap"),
        ("ID=rocky\nID_LIKE='rhel centos fedora'\n", "fedora", "dnf install -y qemu-img shadow-utils"),
        ("ID=opensuse-leap\n", "suse", "zypper --non-interactive install qemu-img shadow"),
        ("ID=arch\n", "arch", "pacman -S --needed --noconfirm qemu-img shadow"),
        ("ID=plan9\n", "", ""),
    ],
)
def test_each_distribution_has_its_command(tmp_path: Path, release: str, family: str, command: str) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text(release)
    assert read_family(tmp_path) == family
    assert " ".join(Fixes(family, root=True).install(["newuidmap", "qemu-img"])) == command
    assert Fixes(family, root=False).install(["newuidmap"])[:1] == (("sudo",) if family else ())


def test_a_kernel_setting_is_kept_for_the_next_boot(tmp_path: Path) -> None:
    *shell, script = Fixes("debian", root=True).sysctl("kernel.some_setting", 1)
    assert shell == ["sh", "-c"]
    (tmp_path / "sysctl.d").mkdir()
    local = script.replace("/etc/", f"{tmp_path}/").replace("sysctl -p", "cat")
    output = subprocess.run(["sh", "-c", local], check=True, capture_output=True, text=True).stdout
    assert output == "kernel.some_setting = 1\n"
    assert (tmp_path / "sysctl.d/60-mica-some_setting.conf").exists()


# This host --------------------------------------------------------------------------------------------------------


def _leftovers(directories: Sequence[Path]) -> list[Path]:
    return [path for directory in directories for path in directory.glob("*mica-doctor*")]


@pytest.mark.guest
@pytest.mark.skipif(shutil.which("qemu-system-x86_64", path="/usr/bin:/bin") is None, reason="QEMU is not installed")
async def test_this_host_is_examined_for_real_and_nothing_is_left(tmp_path: Path) -> None:
    from mica.qemu import jail
    from mica.qemu.accelerators.platforms import ProverContext, provers
    from mica.qemu.accelerators.prover import Accelerators
    from mica.qemu.discover import Qemu
    from mica.qemu.discover_firmware import best_uefi

    qemu = Qemu(path="/usr/bin:/bin", cache=tmp_path)

    async def prove(fresh: bool) -> tuple[AcceleratorProof, ...]:
        context = ProverContext(await qemu.build(), os.getuid(), "me")
        accelerators = Accelerators(provers(sys.platform, context), cache=tmp_path, now=lambda: 1.0)
        return await accelerators.prove(fresh=fresh)

    probes = Probes(
        qemu=qemu.build,
        accelerators=prove,
        jail=lambda: jail.detect(root=os.getuid() == 0),
        network=_answers(FakeNetwork()),
        reduced_network=_answers(MicaError(Code.HOST_LACKS, "not asked")),
        firmware=best_uefi,
    )
    report = await examine(
        Examination(
            home=tmp_path / "home",
            path="/usr/bin:/bin",
            uid=os.getuid(),
            user="me",
            probes=probes,
        )
    )
    by_id = {finding.id: finding for finding in report.findings}
    assert by_id["qemu"].status is Status.OK
    assert by_id["accelerator-tcg"].status is Status.OK
    assert by_id["sandbox"].status is Status.OK, by_id["sandbox"].proof
    assert not [finding for finding in report.findings if "could not be examined" in finding.proof]
    groups = [path for path in Path("/sys/fs/cgroup").glob("*") if path.is_dir()]
    assert _leftovers([Path("/sys/fs/cgroup"), *groups]) == []
    assert not (tmp_path / "home").exists(), "it looks, and makes nothing"
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if "qemu" in Path(f"/proc/{pid}/comm").read_text()]


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="only root makes groups anywhere")
@pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="would start a unit of systemd's")
async def test_a_real_group_is_made_and_removed(host: FakeHost) -> None:
    prefix = f"mica-doctor-test-{os.getpid()}"
    mounts = {group.mount for group in own_groups().values()}
    try:
        host.slices = await detect(root=True, prefix=prefix)
        if isinstance(host.slices, NoSlices):
            pytest.skip(f"no control groups here: {host.slices.reason}")
        found = await host.finding("cgroups")
        assert found.status is (Status.DEGRADED if host.slices.reduced else Status.OK), found
        assert host.slices.present() == {}
    finally:
        for mount in mounts:
            if (mount / prefix).is_dir():
                (mount / prefix).rmdir()
