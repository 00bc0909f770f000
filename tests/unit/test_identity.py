"""A copied guest becomes another one: what it is told, what its answers mean, and guests that lie or cannot.

Nothing here may run for real: the shell of the fake guest is a stand-in that records and answers.
"""

from __future__ import annotations

import asyncio
import errno
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from mica.guest import first_program, identity_scripts
from mica.guest.guests import AgentGuests
from mica.guest.identity import MAX_WHY, UNREACHABLE, AgentIdentities
from mica.model.identity import FIRST, REST, Identity, IdentityItem, Report, Trait
from mica.model.units import MIB, Bytes
from mica.model.vm import ProcessRef, VmRuntime, VmSpec
from mica.testing.agent_server import FakeAgent, Misbehaviour

VM = "0f1e2d3c-0000-4000-8000-000000000001"
OLD, NEW = "52:54:00:12:34:56", "52:54:00:aa:bb:cc"
WHO = Identity(id=VM, parent_id="p", hostname="twin", macs={OLD: NEW})
NOW = 1_700_000_000.25


def why(report: Report, what: Trait) -> tuple[bool, str]:
    (item,) = [item for item in report if item.what is what]
    return item.done, item.why


class Guest:
    """A fake guest whose shell answers with the files ``answer.N``, the last one again and again, and exit statuses."""

    def __init__(self, directory: Path, server: FakeAgent, *, agent: bool = True) -> None:
        self.directory, self.server = directory, server
        self.runtime = VmRuntime(
            process=ProcessRef(1, 1, "boot"),
            spec=VmSpec(cpus=1, memory=Bytes(128 * MIB), agent=agent),
            run_dir=str(directory),
            accelerator="tcg",
            started_at=0.0,
        )
        shell = directory / "shell"
        shell.write_text(
            f"#!/bin/sh\ncd {directory}\nn=0\nwhile [ -e words.$n ]; do n=$((n + 1)); done\n"
            "printf '%s\\0' \"$@\" >words.$n\ncat >stdin.$n\n"
            "while [ ! -e answer.$n ]; do n=$((n - 1)); done\ncat answer.$n\ncat error >&2\nexit $(cat status)\n"
        )
        shell.chmod(0o700)
        server.shell = str(shell)
        self.says(b"")

    def says(self, *answers: bytes, status: int = 0, error: bytes = b"") -> None:
        for number, answer in enumerate(answers):
            (self.directory / f"answer.{number}").write_bytes(answer)
        (self.directory / "status").write_text(str(status))
        (self.directory / "error").write_bytes(error)

    def was_told(self, number: int) -> list[str]:
        return (self.directory / f"words.{number}").read_text().split("\0")[:-1]

    def was_given(self, number: int) -> bytes:
        return (self.directory / f"stdin.{number}").read_bytes()

    @property
    def runs(self) -> int:
        return len(list(self.directory.glob("words.*")))


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    async with FakeAgent(tmp_path / "agent") as server:
        yield Guest(tmp_path, server)


@pytest.fixture
async def identities() -> AsyncIterator[AgentIdentities]:
    guests = AgentGuests()
    yield AgentIdentities(guests, now=lambda: NOW, first_timeout_s=5.0)
    await guests.close()


# ── the program ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(shutil.which("as") is None or shutil.which("ld") is None, reason="GNU binutils are not installed")
def test_the_bytes_are_those_of_the_instructions_beside_them(tmp_path: Path) -> None:
    listing = Path(first_program.__file__).with_name("first_program.lst").read_text().splitlines()
    lines = [line for line in listing if line and not line.startswith("#")]
    source = [".intel_syntax noprefix", *(line.partition("|")[2] if "|" in line else line for line in lines)]
    (tmp_path / "p.s").write_text("\n".join(source) + "\n")
    subprocess.run(["as", "--64", "-o", tmp_path / "p.o", tmp_path / "p.s"], check=True)
    link: list[str | Path] = [
        "ld",
        "-Ttext=0",
        "-e",
        "0",
        "--oformat",
        "binary",
        "-o",
        tmp_path / "p.bin",
        tmp_path / "p.o",
    ]
    subprocess.run(link, check=True)
    assert (tmp_path / "p.bin").read_bytes() == first_program.code()


def test_the_shell_writes_the_very_program() -> None:
    for shell in ("sh", "busybox"):
        if (path := shutil.which(shell)) is not None:
            command: list[str] = [path, *([] if shell == "sh" else ["sh"]), "-c", f"printf '{first_program.octal()}'"]
            assert subprocess.run(command, capture_output=True, check=True).stdout == first_program.program()


@pytest.fixture
def executable() -> Iterator[Path]:
    """The program in a directory that belongs to nobody, who may neither set clocks nor addresses."""
    directory = Path(tempfile.mkdtemp())
    try:
        path = directory / "program"
        path.write_bytes(first_program.program())
        path.chmod(0o755)
        directory.chmod(0o755)
        if os.geteuid() == 0:
            os.chown(directory, 65534, 65534)
        yield path
    finally:
        shutil.rmtree(directory)


def run_as_nobody(executable: Path, *words: str, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    user = 65534 if os.geteuid() == 0 else None
    groups: list[int] | None = [] if user else None
    command = [str(executable), *words]
    return subprocess.run(
        command, input=stdin, capture_output=True, check=False, user=user, group=user, extra_groups=groups
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="it is a program for x86-64")
def test_it_removes_itself_and_tells_what_the_kernel_said(executable: Path) -> None:
    stdin = first_program.standard_input(bytes(64), NOW, [NEW, NEW])
    done = run_as_nobody(executable, "no-such-interface-has-this-name", "", stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    assert first_program.results(done.stdout, 2) == [errno.EPERM] * 4
    assert not executable.exists()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="it is a program for x86-64")
def test_it_does_nothing_with_too_little_input_or_too_many_arguments(executable: Path) -> None:
    whole = first_program.standard_input(bytes(64), NOW, [NEW])
    assert run_as_nobody(executable, "x", stdin=whole[:-1]).returncode == 1
    assert run_as_nobody(executable, *["x"] * 33, stdin=whole * 20).returncode == 1
    assert executable.exists()


def test_its_input_is_what_the_kernel_takes() -> None:
    data = first_program.standard_input(bytes(range(64)), 1_700_000_000.25, [NEW])
    assert struct.unpack_from("<II", data) == (512, 64)
    assert data[8:72] == bytes(range(64))
    assert struct.unpack_from("<qq", data, 72) == (1_700_000_000, 250_000_000)
    assert data[88:] == bytes.fromhex("525400aabbcc0000")
    with pytest.raises(ValueError, match="64"):
        first_program.standard_input(b"", 0.0, [])


# ── the scripts ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("macs", [{}, {OLD: NEW}, {OLD: NEW, "52:54:00:00:00:01": "52:54:00:00:00:02"}])
@pytest.mark.parametrize("shell", ["sh", "bash", "busybox"])
def test_every_shell_can_read_them(macs: dict[str, str], shell: str) -> None:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed")
    who = Identity(id=VM, hostname="twin", macs=macs)
    steps = identity_scripts.rest(who)
    assert tuple(step.what for step in steps) == REST
    texts = [identity_scripts.first(macs, "ab"), identity_scripts.fallback(macs, NOW)]
    texts += [text for step in steps for text in (step.script, identity_scripts.bounded(step))]
    for text in texts:
        assert not [word for word in text.split() if word.startswith("@") and word.endswith("@")]
        words = [path, *(["sh"] if shell == "busybox" else []), "-n", "-c", text]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), text


@pytest.mark.parametrize("bad", [{"hostname": "a b"}, {"hostname": "$(x)"}, {"id": "'"}, {"macs": {OLD: "x"}}])
def test_nothing_gets_into_a_script_that_does_not_fit(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not fit"):
        Identity(**{"id": VM, **bad})  # type: ignore[arg-type]
    macs = {f"52:54:00:00:00:{n:02x}": NEW for n in range(33)}
    with pytest.raises(ValueError, match="33 NICs"):
        Identity(id=VM, macs=macs)


# ── before anything else ──────────────────────────────────────────────────────────────────────────────────────────


async def test_one_command_does_it(guest: Guest, identities: AgentIdentities) -> None:
    guest.says(b"M\0\0\0")
    report = await identities.first(VM, guest.runtime, WHO)
    assert report == tuple(IdentityItem(trait, True) for trait in FIRST)
    option, script = guest.was_told(0)
    assert option == "-c"
    assert f"{OLD} | {NEW}" in script
    given = guest.was_given(0)
    assert given == first_program.standard_input(given[8:72], NOW, [NEW])
    assert given[8:72].hex() not in script
    assert guest.runs == 1
    await identities.first(VM, guest.runtime, WHO)
    assert guest.was_given(1)[8:72] != given[8:72]


async def test_what_the_kernel_refused_is_said(guest: Guest, identities: AgentIdentities) -> None:
    guest.says(bytes([77, errno.EPERM, 0, errno.ENODEV]))
    report = await identities.first(VM, guest.runtime, WHO)
    assert why(report, Trait.RANDOM) == (False, "Operation not permitted")
    assert why(report, Trait.CLOCK) == (True, "")
    assert why(report, Trait.MAC) == (False, f"{NEW}: No such device")


async def test_a_guest_that_executes_no_files_uses_what_it_has(guest: Guest, identities: AgentIdentities) -> None:
    guest.says(b"", b"F 0 0 1")
    report = await identities.first(VM, guest.runtime, WHO)
    assert why(report, Trait.RANDOM) == (True, "")
    assert why(report, Trait.MAC) == (False, f"{NEW}: no program in the guest can do it")
    assert "perl" in guest.was_told(1)[1]
    assert guest.was_given(1)[8:72] != guest.was_given(0)[8:72]


@pytest.mark.parametrize(
    "answer", [b"", b"M", b"M" * 40, b"F 0", b"F x y z", b"F 1 1 1111", b"\xff" * 30_000, b"\n \n"]
)
async def test_nonsense_is_not_believed(guest: Guest, identities: AgentIdentities, answer: bytes) -> None:
    guest.says(answer, status=3, error=b"first\n\x1b[31mlast\x07\n\n")
    report = await identities.first(VM, guest.runtime, WHO)
    assert [item.what for item in report] == list(FIRST)
    assert {(item.done, item.why) for item in report} == {
        (False, "the guest could not run what Mica gave it ([31mlast)")
    }


async def test_an_answer_without_end_is_cut_off(guest: Guest, identities: AgentIdentities) -> None:
    guest.says(b"M" * 200_000)
    report = await identities.first(VM, guest.runtime, WHO)
    assert why(report, Trait.MAC)[0] is False
    assert "larger" in why(report, Trait.RANDOM)[1]


@pytest.mark.parametrize("how", list(Misbehaviour))
@pytest.mark.parametrize("command", ["guest-exec", "guest-exec-status"])
async def test_a_broken_agent_is_a_report(guest: Guest, command: str, how: Misbehaviour) -> None:
    guests = AgentGuests()
    guest.says(b"M\0\0\0")
    guest.server.misbehave(command, how)
    report = await AgentIdentities(guests, first_timeout_s=0.5).first(VM, guest.runtime, WHO)
    assert tuple(item.what for item in report) == FIRST
    assert all(item.done or item.why for item in report)
    assert why(report, Trait.RANDOM)[0] is why(report, Trait.MAC)[0] is (how is Misbehaviour.UNASKED)
    await guests.close()


async def test_a_guest_that_is_frozen_thaws(guest: Guest, identities: AgentIdentities) -> None:
    guest.says(b"M\0\0\0")
    guest.server.frozen = True
    assert all(item.done for item in await identities.first(VM, guest.runtime, WHO))
    assert not guest.server.frozen


async def test_where_commands_are_forbidden_the_clock_is_set(guest: Guest, identities: AgentIdentities) -> None:
    guest.server.policy = frozenset({"guest-exec"})
    report = await identities.first(VM, guest.runtime, WHO)
    assert why(report, Trait.CLOCK) == (True, "")
    assert why(report, Trait.RANDOM)[0] is False
    assert "policy" in why(report, Trait.RANDOM)[1]
    guest.server.policy = frozenset({"guest-exec", "guest-set-time"})
    assert not any(item.done for item in await identities.first(VM, guest.runtime, WHO))


async def test_without_an_agent_nothing_is_done(tmp_path: Path, guest: Guest) -> None:
    guests = AgentGuests()
    identities = AgentIdentities(guests, first_timeout_s=0.3)
    none = msgspec.structs.replace(guest.runtime, spec=msgspec.structs.replace(guest.runtime.spec, agent=False))
    gone = msgspec.structs.replace(guest.runtime, run_dir=str(tmp_path / "gone"))
    for vm_id, runtime in (("a", none), ("b", gone)):
        first, rest = await identities.first(vm_id, runtime, WHO), await identities.rest(vm_id, runtime, WHO)
        assert tuple(item.what for item in first) == FIRST
        assert tuple(item.what for item in rest) == (*REST, Trait.PROGRAMS, Trait.FIRMWARE)
        assert not any(item.done for item in (*first, *rest))
        assert all(item.why for item in (*first, *rest))
    guest.server.close_port()
    async with asyncio.timeout(5):
        silent = await identities.first(VM, guest.runtime, WHO)
    assert not any(item.done for item in silent)
    await guests.close()


# ── afterwards ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_rest_is_done_step_by_step(guest: Guest, identities: AgentIdentities) -> None:
    guest.says(b"noise\nrenewed by systemd-networkd\n")
    report = await identities.rest(VM, guest.runtime, WHO)
    assert tuple(item.what for item in report) == (*REST, Trait.PROGRAMS, Trait.FIRMWARE)
    assert report[len(REST) :] == UNREACHABLE
    assert {(i.done, i.why) for i in report[: len(REST)]} == {(True, "renewed by systemd-networkd")}
    assert guest.was_told(0)[2:] == ["mica", "twin"]
    assert guest.was_told(1)[2:] == ["mica", VM.replace("-", "")]
    assert guest.was_told(4)[2:] == ["mica", VM, "p"]


@pytest.mark.parametrize(
    ("status", "out", "error", "expected"),
    [
        (1, b"the keys stay\n", b"x\n", "the keys stay"),
        (2, b"", b"sh: cannot create /etc/hostname: Read-only file system\n", "Read-only"),
        (5, b"", b"", "exit status 5"),
        (124, b"", b"", "did not end within"),
        (1, b"a" * 10_000, b"", "a" * MAX_WHY),
        (1, "ünïcode \u202e \x1b]0;x\x07".encode(), b"", "ünïcode"),
    ],
)
async def test_what_fails_says_why(
    guest: Guest, identities: AgentIdentities, status: int, out: bytes, error: bytes, expected: str
) -> None:
    guest.says(out, status=status, error=error)
    for item in (await identities.rest(VM, guest.runtime, WHO))[: len(REST)]:
        assert not item.done
        assert expected in item.why
        assert len(item.why) <= MAX_WHY
        assert item.why.isprintable()


async def test_one_step_that_fails_holds_up_no_other(guest: Guest, identities: AgentIdentities) -> None:
    guest.says(b"", b"a" * 200_000, b"")  # the second answer is too large
    report = await identities.rest(VM, guest.runtime, WHO)
    assert [item.done for item in report[: len(REST)]] == [True, False, True, True, True, True]
    guest.server.misbehave("guest-exec", Misbehaviour.HANG_UP)
    report = await identities.rest(VM, guest.runtime, WHO)
    assert not any(item.done for item in report)
    assert tuple(item.what for item in report) == (*REST, Trait.PROGRAMS, Trait.FIRMWARE)
