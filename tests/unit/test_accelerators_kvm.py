"""KVM as it is proven: a fake one that lies in every way that has been seen, and the real one of this host."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mica.model.doctor import AcceleratorProof
from mica.model.errors import Code, MicaError
from mica.qemu.accelerators import canary
from mica.qemu.accelerators.kvm import KvmProver
from mica.qemu.accelerators.kvm_api import Halt, LinuxKvm, PortWrite
from mica.qemu.accelerators.kvm_canary import run_canary
from mica.qemu.accelerators.platforms import PROVERS, ProverContext, provers
from mica.qemu.accelerators.prover import Accelerators
from mica.qemu.accelerators.tcg import TcgProver
from mica.qemu.discover import Qemu, QemuBuild

_PATH = "/usr/bin:/bin"
_RIGHT: tuple[tuple[int, int], ...] = (
    (1, 0x0123456789ABCDEF * 0x1000000000000003 % (1 << 64)),
    (2, 0x178BFBFFF7F83203),
    *((3, value) for value in (1, 0x1122334455667788, 0x99AABBCCDDEEFF00, 0x1122334455667788, 0x99AABBCCDDEEFF00)),
    (4, 0xFEEDFACECAFEBEEF),
    (4, 0xFEEDFACECAFEBEEF),
    (5, 0x5CA1AB1E0DDBA115),
    *((6, v) for v in (0xAAAA0000AAAA0001, 0xBBBB0000BBBB0002, 0xAAAA0000AAAA0001)),
    *((6, v) for v in (0x7777777788888888, 0xBBBB0000BBBB0003)),
    (7, 0x601000 << 8),
    (8, 0x123413572468),
)


class GuestScript:
    """What a guest reports, record by record; ``wrong`` replaces the value of (step, occurrence)."""

    def __init__(
        self, *, wrong: dict[tuple[int, int], int] | None = None, records: list[tuple[int, int]] | None = None
    ) -> None:
        if records is None:
            loop = canary.SHORT_LOOPS
            records = [*_RIGHT, (9, 0), (10, canary.loop_result(loop)), (9, 0)]
        seen: dict[int, int] = {}
        self.records: list[tuple[int, int]] = []
        for step, value in records:
            occurrence = seen[step] = seen.get(step, -1) + 1
            self.records.append((step, (wrong or {}).get((step, occurrence), value)))

    def stream(self) -> bytes:
        return b"".join(bytes([step]) + value.to_bytes(8, "little") for step, value in self.records)


class FakeKvm:
    """A KVM that runs the canary without a processor: it reports what a guest would, in a time of its own.

    ``wrong`` are values that come out wrong; ``stops`` ends the guest in a step with an exit or an error; ``slowness``
    is how many times longer than on the host its loops take; ``fails`` raises in the call of that name.
    """

    def __init__(
        self,
        *,
        wrong: dict[tuple[int, int], int] | None = None,
        stops: dict[int, Halt | OSError] | None = None,
        slowness: float | list[float] = 1.0,
        fails: dict[str, OSError] | None = None,
        version: int = 12,
    ) -> None:
        self._wrong = wrong or {}
        self._stops = stops or {}
        self._slowness = slowness if isinstance(slowness, list) else [slowness]
        self._fails = fails or {}
        self._version = version
        self._loops = 0
        self._time = 0.0
        self.rounds = 0
        self.closed = False

    def clock(self) -> float:
        return self._time

    @staticmethod
    def host_loop(count: int) -> float:
        return count * 1e-9

    def api_version(self) -> int:
        self._fail("api_version")
        return self._version

    def create(self, listing: canary.Listing, image: bytes | bytearray) -> FakeKvm:
        self._fail("create")
        at = canary.LOOPS - canary.BASE
        self._loops = int.from_bytes(image[at : at + 8], "little")
        self._exits = self._run()
        return self

    def _fail(self, name: str) -> None:
        if name in self._fails:
            raise self._fails[name]

    def write(self, address: int, data: bytes) -> None:
        assert address == canary.LOOPS
        self._loops = int.from_bytes(data, "little")

    def close(self) -> None:
        self.closed = True

    def run(self) -> PortWrite | Halt:
        self._time += 2e-6
        stop = next(self._exits)
        if isinstance(stop, OSError):
            raise stop
        return stop

    def _run(self) -> Iterator[PortWrite | Halt | OSError]:
        for step, value in GuestScript(records=list(_RIGHT), wrong=self._wrong).records:
            if step in self._stops:
                yield self._stops[step]
            yield from _report(step, value)
        while True:
            yield from _report(9, 0)
            turns, self._loops = self._loops, 0
            if not turns:
                yield PortWrite(canary.END_PORT, b"\0")
            if 10 in self._stops:
                yield self._stops[10]
            self._time += self.host_loop(turns) * self._slowness[min(self.rounds, len(self._slowness) - 1)]
            self.rounds += 1
            yield from _report(10, self._wrong.get((10, 0), canary.loop_result(turns)))


def _report(step: int, value: int) -> Iterator[PortWrite]:
    for byte in bytes([step]) + value.to_bytes(8, "little"):
        yield PortWrite(canary.REPORT_PORT, bytes([byte]))


def _prove(fake: FakeKvm, begun: Callable[[str], None] = lambda step: None) -> canary.Verdict:
    return run_canary(fake, begun=begun, clock=fake.clock, host_loop=fake.host_loop)


def test_a_kvm_that_answers_rightly_works() -> None:
    begun: list[str] = []
    fake = FakeKvm()
    verdict = _prove(fake, begun.append)
    assert verdict.works, verdict.reason
    assert verdict.loop_ratio == pytest.approx(1.0, abs=0.1)
    assert all(step.ok for step in verdict.steps)
    assert begun[-1] == "timed loop"
    assert fake.closed


def test_noise_in_some_rounds_does_not_condemn_a_good_kvm() -> None:
    fake = FakeKvm(slowness=[5.0, 6.0, 4.0, 1.4, 7.0, 1.1, 1.0])
    verdict = _prove(fake)
    assert verdict.works
    assert verdict.loop_ratio == pytest.approx(1.1, abs=0.05)
    assert fake.rounds == 6


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (FakeKvm(wrong={(3, 1): 0}), "step cmpxchg16b: the low half in memory was 0x0"),
        (FakeKvm(wrong={(3, 0): 0}), "step cmpxchg16b: the zero flag"),
        (FakeKvm(wrong={(2, 0): 0x178BFBFFF7F81203}), "step CPUID: cmpxchg16b and fxsave"),
        (FakeKvm(wrong={(4, 1): 1}), "step fxsave64: xmm0 restored was 0x1"),
        (FakeKvm(wrong={(5, 0): 7}), "step xsave: xmm0 restored was 0x7"),
        (FakeKvm(wrong={(6, 1): 0xAAAA0000AAAA0001}), "step page-table switch: the window under the second tables"),
        (FakeKvm(wrong={(10, 0): 3}), "step timed loop: 200000 turns gave 3"),
        (
            FakeKvm(stops={3: Halt("KVM internal error, suberror 1 (instruction emulation failed)")}),
            "step cmpxchg16b: KVM internal error, suberror 1",
        ),
        (FakeKvm(stops={7: Halt("KVM_EXIT_SHUTDOWN: triple fault")}), "step page fault: KVM_EXIT_SHUTDOWN"),
        (FakeKvm(stops={10: Halt("KVM_EXIT_SHUTDOWN: triple fault")}), "step timed loop: KVM_EXIT_SHUTDOWN"),
        (FakeKvm(stops={1: OSError(errno.ENOSYS, "Function not implemented")}), "KVM_RUN failed: Function not"),
        (FakeKvm(stops={1: OSError(errno.EFAULT, "Bad address")}), "step 64-bit arithmetic: KVM_RUN failed"),
        (FakeKvm(slowness=1000.0), "a loop takes .* times as long"),
        (FakeKvm(slowness=20.0), "a loop takes 20.0 times as long"),
        (FakeKvm(slowness=4.0), r"a loop takes 4.0 times as long in the guest as on the host \(more than 3\)"),
        (FakeKvm(version=11), "API version 11, not 12"),
        (FakeKvm(fails={"api_version": OSError(errno.ENOTTY, "no ioctl")}), "KVM_GET_API_VERSION failed: no ioctl"),
        (FakeKvm(fails={"create": OSError(errno.ENOSYS, "no call")}), "creation of a virtual machine failed: no call"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_kvm_that_lies_is_found_out(fake: FakeKvm, words: str) -> None:
    verdict = _prove(fake)
    assert not verdict.works
    with pytest.raises(MicaError, match=words):
        raise MicaError(Code.INTERNAL, verdict.reason)


def test_a_crawling_kvm_is_given_up_after_the_short_loop() -> None:
    fake = FakeKvm(slowness=1000.0)
    verdict = _prove(fake)
    assert fake.rounds == 1
    assert verdict.loop_ratio == pytest.approx(1000, rel=0.05)


def test_a_guest_that_writes_to_other_ports_for_ever_is_ended() -> None:
    class Noisy(FakeKvm):
        def run(self) -> PortWrite | Halt:
            self._loops = 1
            return PortWrite(canary.REPORT_PORT, b"\x01") if self.rounds else PortWrite(0x80, b"\0")

    assert "to port 0x80" in _prove(Noisy()).reason


# The prover around it ---------------------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A file that can be opened as /dev/kvm can; that it is none comes out later."""
    file = tmp_path / "kvm"
    file.touch()
    return file


def _prover(device: Path | str, probe: str = "", *, uid: int = 0, **changes: Any) -> KvmProver:
    options: dict[str, Any] = {"in_qemu": True, "uid": uid, "user": "ada", "device": str(device)}
    if probe:
        options["probe"] = (sys.executable, "-c", probe)
    return KvmProver(**(options | {"architecture": "x86_64"} | changes))


async def test_a_kvm_that_never_returns_is_killed_and_its_step_named(device: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    probe = (
        "import os, signal\n"
        'print(\'{"kind":"step","step":"CPUID"}\\n{"kind":"step","step":"fxsave64"}\', flush=True)\n'
        f"open({str(pid)!r}, 'w').write(str(os.getpid()))\nwhile True: signal.pause()\n"
    )
    proof = await _prover(device, probe, deadline_s=1.0).prove()
    assert not proof.works
    assert proof.reason == "the guest did not come back within 1 s, in step fxsave64"
    assert not Path("/proc", pid.read_text()).exists()


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        ("import os; os.kill(os.getpid(), 11)", "the probe ended with status -11 in step none"),
        ("print('nonsense')", "ended with status 0 in step none"),
        ("raise SystemExit('no memory')", "status 1 in step none: no memory"),
        ('print(\'{"kind":"step","step":"xsave"}\', flush=True); raise SystemExit(3)', "status 3 in step xsave"),
    ],
)
async def test_a_probe_that_dies_proves_nothing(device: Path, probe: str, words: str) -> None:
    proof = await _prover(device, probe).prove()
    assert not proof.works
    assert words in proof.reason


async def test_the_verdict_of_the_probe_is_the_proof(device: Path) -> None:
    verdict = canary.Verdict(works=True, reason="it ran", loop_ratio=1.02)
    line = msgspec.json.encode({"kind": "verdict", "verdict": verdict}).decode()
    proof = await _prover(device, f"print({line!r})").prove()
    assert (proof.name, proof.works, proof.reason, proof.loop_ratio, proof.fix) == ("kvm", True, "it ran", 1.02, "")


async def test_the_real_probe_says_that_a_file_is_no_kvm(device: Path) -> None:
    proof = await _prover(device).prove()
    assert not proof.works
    assert proof.reason.startswith("KVM_GET_API_VERSION failed: ")
    assert _prover(device).key() == ""


@pytest.mark.parametrize(("flags", "fix"), [("fpu vmx", "modprobe kvm_intel"), ("svm", "modprobe kvm_amd"), ("", "")])
async def test_without_a_device_the_processor_tells_why(tmp_path: Path, flags: str, fix: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"flags : {flags}\n")
    proof = await _prover(tmp_path / "absent", root=tmp_path).prove()
    assert (proof.works, proof.fix) == (False, fix)
    assert "there is no" in proof.reason
    if fix:
        assert (await _prover(tmp_path / "absent", root=tmp_path, uid=1000).prove()).fix == f"sudo {fix}"


@pytest.mark.parametrize("changes", [{"in_qemu": False}, {"architecture": "aarch64"}])
async def test_what_could_not_be_used_is_not_tried(device: Path, changes: dict[str, Any]) -> None:
    proof = await _prover(device, "raise SystemExit('was run')", **changes).prove()
    assert not proof.works
    assert "was run" not in proof.reason


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize(
    ("mode", "gid", "fix"),
    [
        (0o660, 65534, "sudo usermod -aG nogroup ada"),
        (0o600, 0, "sudo chgrp kvm {0} && sudo chmod 0660 {0} && sudo usermod -aG kvm ada"),
    ],
)
async def test_a_user_who_may_not_open_it_is_told_the_way(device: Path, mode: int, gid: int, fix: str) -> None:
    for directory in device.parents[:3]:
        directory.chmod(0o755)
    os.chown(device, 0, gid)
    device.chmod(mode)
    os.seteuid(12345)
    try:
        proof = await _prover(device, uid=12345).prove()
    finally:
        os.seteuid(0)
    assert not proof.works
    assert proof.reason.startswith("permission: ")
    assert "ada" in proof.reason
    assert proof.fix == fix.format(device)


# Proofs as they are kept ------------------------------------------------------------------------------------------


class FakeProver:
    def __init__(self, name: str, *, works: bool, key: str) -> None:
        self.name = name
        self._works = works
        self._key = key
        self.runs = 0

    def key(self) -> str:
        return self._key

    async def prove(self) -> AcceleratorProof:
        self.runs += 1
        await asyncio.sleep(0)
        return AcceleratorProof(name=self.name, works=self._works, reason=f"run {self.runs}")


async def test_a_proof_is_kept_for_its_boot_and_build(tmp_path: Path) -> None:
    first = FakeProver("kvm", works=True, key="boot-1")
    proofs = await Accelerators([first], cache=tmp_path / "c", now=lambda: 7.0).prove()
    assert (proofs[0].key, proofs[0].proven_at) == ("boot-1", 7.0)
    same = FakeProver("kvm", works=False, key="boot-1")
    assert await Accelerators([same], cache=tmp_path / "c", now=lambda: 9.0).prove() == proofs
    assert same.runs == 0
    other = FakeProver("kvm", works=False, key="boot-2")
    later = Accelerators([other], cache=tmp_path / "c", now=lambda: 9.0)
    assert [proof.works for proof in await later.prove()] == [False]
    assert [proof.works for proof in await later.prove(fresh=True)] == [False]
    assert other.runs == 2


async def test_what_has_no_key_is_proven_each_time_and_damage_is_not_believed(tmp_path: Path) -> None:
    keyless, kept = FakeProver("kvm", works=False, key=""), FakeProver("tcg", works=True, key="k")
    accelerators = Accelerators([keyless, kept], cache=tmp_path, now=lambda: 1.0)
    await accelerators.prove()
    await accelerators.prove()
    assert (keyless.runs, kept.runs) == (2, 1)
    (tmp_path / "accelerators.json").write_bytes(b"{damaged")
    assert (await accelerators.best()).name == "tcg"
    assert kept.runs == 2


async def test_two_who_ask_at_once_share_one_run(tmp_path: Path) -> None:
    prover = FakeProver("kvm", works=True, key="k")
    accelerators = Accelerators([prover], cache=tmp_path, now=lambda: 1.0)
    await asyncio.gather(accelerators.prove(), accelerators.prove(), accelerators.best())
    assert prover.runs == 1


async def test_where_nothing_works_every_reason_is_told(tmp_path: Path) -> None:
    broken = [FakeProver("kvm", works=False, key="a"), FakeProver("tcg", works=False, key="b")]
    with pytest.raises(MicaError, match=r"kvm: run 1; tcg: run 1") as caught:
        await Accelerators(broken, cache=tmp_path, now=lambda: 1.0).best()
    assert caught.value.code is Code.HOST_LACKS


# The real ones ----------------------------------------------------------------------------------------------------

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64", path=_PATH) is None, reason="qemu-system-x86_64 is not installed"
)


@pytest.fixture
async def build(tmp_path: Path) -> QemuBuild:
    return await Qemu(path=_PATH, cache=tmp_path / "build").build()


@pytest.mark.guest
@needs_qemu
async def test_the_canary_gives_the_right_answers_under_software_emulation(build: QemuBuild) -> None:
    proof = await TcgProver(build).prove()
    assert proof.works, proof.reason
    assert len(proof.steps) == 9
    assert all(step.ok for step in proof.steps)
    assert "not offered" not in str(proof.steps), "xsave was run too"


@pytest.mark.guest
@needs_qemu
async def test_a_qemu_without_the_accelerator_or_that_fails_has_no_proof(build: QemuBuild) -> None:
    absent = msgspec.structs.replace(build, accelerators=("kvm",))
    assert (await TcgProver(absent).prove()).reason.endswith("was built without tcg")
    broken = msgspec.structs.replace(build, aliases={"q35": "pc-q35-99.0"})
    proof = await TcgProver(broken).prove()
    assert not proof.works
    assert "QEMU ended with status 1" in proof.reason
    assert "apt-get install" in proof.fix


@needs_qemu
def test_each_system_has_its_accelerators_best_first(build: QemuBuild) -> None:
    context = ProverContext(build, 0, "root")
    assert [prover.name for prover in provers("linux", context)] == ["kvm", "tcg"]
    for system in ("darwin", "win32", "plan9"):
        assert [prover.name for prover in provers(system, context)] == ["tcg"]
    assert set(PROVERS) == {"linux", "darwin", "win32"}


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


@pytest.mark.guest
@pytest.mark.skipif(not _opens("/dev/kvm"), reason="/dev/kvm cannot be opened here")
async def test_the_kvm_of_this_host_has_a_verdict_and_the_child_agrees_with_a_run_in_this_process() -> None:
    begun = time.monotonic()
    prover = _prover("/dev/kvm", uid=os.getuid())
    proof = await prover.prove()
    assert time.monotonic() - begun < 30
    assert prover.key() != ""
    assert proof.reason
    assert proof.works == all(step.ok for step in proof.steps)
    if "did not come back" not in proof.reason:  # else it would hang this process
        with LinuxKvm() as api:
            assert run_canary(api).works == proof.works
