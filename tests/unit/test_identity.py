"""A copied guest becomes another one: what it is told, what its answers mean, and guests that lie or cannot.

Nothing here may run for real: the shell of the fake guest is a stand-in that records and answers.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from mica.guest import first_program, identity_scripts
from mica.guest.guests import AgentGuests
from mica.guest.identity import MAX_WHY, UNREACHABLE, AgentIdentities
from mica.model.identity import FIRST, MAX_NICS, REST, Identity, IdentityItem, Report, Trait
from mica.model.units import MIB, Bytes
from mica.model.vm import ProcessRef, VmRuntime, VmSpec
from mica.testing.agent_server import FakeAgent, Misbehaviour
from tests.integration.world import wait_for

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
            "[ -e marked.$n ] && dd if=stdin.$n bs=1 skip=4 count=4 2>/dev/null\n"
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

    def answers(self, *codes: int) -> None:
        """As the program does from now on: for the generator, the clock and NICs."""
        self.says(bytes(codes).ljust(2 + MAX_NICS, b"\xff"))
        for number in range(self.runs, self.runs + 2):
            (self.directory / f"marked.{number}").touch()

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
async def identities(tmp_path: Path) -> AsyncIterator[AgentIdentities]:
    guests = AgentGuests()
    yield AgentIdentities(guests, now=lambda: NOW, first_timeout_s=5.0, room=str(tmp_path / "room"))
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


def run_as_nobody(executable: Path, *, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    user = 65534 if os.geteuid() == 0 else None
    return subprocess.run([str(executable)], input=stdin, capture_output=True, check=False, user=user, group=user)


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="it is a program for x86-64")
REFUSED = b"mark" + bytes([errno.EPERM, errno.EPERM] + [first_program.NOT_FOUND] * MAX_NICS)


def order(mark: bytes = b"mark") -> bytes:
    return first_program.order(mark, bytes(64), NOW, {OLD: NEW})


@needs_x86
def test_it_removes_itself_and_tells_what_the_kernel_said(executable: Path) -> None:
    done = run_as_nobody(executable, stdin=order())
    assert (done.returncode, done.stdout, done.stderr) == (0, REFUSED, b"")
    assert not executable.exists()


@needs_x86
@pytest.mark.parametrize("wrong", [b"", order()[:-1], order() + b"x", b"x" * len(order())])
def test_it_does_nothing_without_an_order(executable: Path, wrong: bytes) -> None:
    done = run_as_nobody(executable, stdin=wrong)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


@needs_x86
def test_it_waits_for_the_next_order(executable: Path, tmp_path: Path) -> None:
    with waiting(executable, tmp_path / "room") as room, (room / "out").open("rb") as out:
        with (room / "in").open("wb", buffering=0) as orders:
            for mark in (b"one.", b"two."):
                orders.write(b"nonsense that is read as one piece")
                wait_for("its taking what it was given", lambda: pending(orders.fileno()) == 0)
                orders.write(order(mark))
                answer = wait_for("an answer", lambda: out.read(first_program.ANSWER_SIZE))
                assert answer == mark + REFUSED[4:]
        assert not executable.exists()


def pending(fifo: int) -> int:
    count = bytearray(4)
    fcntl.ioctl(fifo, termios.FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


@contextmanager
def waiting(executable: Path, room: Path) -> Iterator[Path]:
    """The program waits in a room, as nobody."""
    room.mkdir()
    os.mkfifo(room / "in")
    user = 65534 if os.geteuid() == 0 else None
    with (room / "out").open("ab") as out:
        orders = os.open(room / "in", os.O_RDWR)
        process = subprocess.Popen([str(executable), "wait"], stdin=orders, stdout=out, user=user, group=user)
        os.close(orders)
    try:
        yield room
    finally:
        process.kill()
        process.wait()


def test_its_order_is_what_the_kernel_takes() -> None:
    data = first_program.order(b"mark", bytes(range(64)), NOW, {OLD: NEW})
    assert data[:8] == b"idtymark"
    assert struct.unpack_from("<II", data, 8) == (512, 64)
    assert data[16:80] == bytes(range(64))
    assert struct.unpack_from("<qq", data, 80) == (1_700_000_000, 250_000_000)
    assert data[96:112] == bytes.fromhex("5254001234560000525400aabbcc0000")
    assert len(data) == 96 + 16 * MAX_NICS
    with pytest.raises(ValueError, match="64"):
        first_program.order(b"mark", b"", 0.0, {})


def test_answers_to_others_are_passed_over() -> None:
    mine = b"mine" + bytes(2 + MAX_NICS)
    assert first_program.results(REFUSED + mine, b"mine", 1) == [0, 0, 0]
    assert first_program.results(REFUSED + mine[:-1], b"mine", 1) is None


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
    texts = [identity_scripts.first("ab"), identity_scripts.prepare("/run/x y", "ab")]
    texts.append(identity_scripts.fallback(macs, NOW))
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
    guest.answers(0, 0, 0)
    report = await identities.first(VM, guest.runtime, WHO)
    assert report == tuple(IdentityItem(trait, True) for trait in FIRST)
    option, script = guest.was_told(0)
    assert option == "-c"
    given = guest.was_given(0)
    assert given == first_program.order(given[4:8], given[16:80], NOW, WHO.macs)
    assert given[16:80].hex() not in script
    assert guest.runs == 1
    await identities.first(VM, guest.runtime, WHO)
    assert guest.was_given(1)[16:80] != given[16:80]


async def test_what_the_kernel_refused_is_said(guest: Guest, identities: AgentIdentities) -> None:
    guest.answers(errno.EPERM, 0, errno.EBUSY)
    report = await identities.first(VM, guest.runtime, WHO)
    assert why(report, Trait.RANDOM) == (False, "Operation not permitted")
    assert why(report, Trait.CLOCK) == (True, "")
    assert why(report, Trait.MAC) == (False, f"{NEW}: Device or resource busy")


async def test_a_guest_that_executes_no_files_uses_what_it_has(guest: Guest, identities: AgentIdentities) -> None:
    guest.says(b"", b"F 0 0 1")
    report = await identities.first(VM, guest.runtime, WHO)
    assert why(report, Trait.RANDOM) == (True, "")
    assert why(report, Trait.MAC) == (False, f"{NEW}: no NIC that can be changed has {OLD}")
    assert "perl" in guest.was_told(1)[1]
    assert f"{OLD} | {NEW}" in guest.was_told(1)[1]
    assert guest.was_given(1)[16:80] != guest.was_given(0)[16:80]


@pytest.mark.parametrize(("said", "done"), [(b"F 0 0 0", True), (b"F 0 0 1", False), (b"what?", False)])
async def test_a_nic_that_the_program_does_not_find_is_looked_for(
    guest: Guest, identities: AgentIdentities, said: bytes, done: bool
) -> None:
    guest.answers(errno.EPERM, 0)
    (guest.directory / "marked.1").unlink()
    (guest.directory / "answer.1").write_bytes(said)
    report = await identities.first(VM, guest.runtime, WHO)
    assert why(report, Trait.MAC)[0] is done
    assert why(report, Trait.RANDOM) == (False, "Operation not permitted")


@needs_x86
async def test_a_prepared_guest_and_its_copies_start_no_process(
    guest: Guest, identities: AgentIdentities, executable: Path, tmp_path: Path
) -> None:
    assert not await identities.prepare(VM, guest.runtime)
    with waiting(executable, tmp_path / "room"):
        assert await identities.prepare(VM, guest.runtime)
        runs, opened = guest.runs, guest.server.open_handles
        # A copy's agent has the handles of its original's: here it is the same one.
        copy = Identity(id="copy", parent_id=VM)
        for who in (copy, copy, Identity(id="copy-of-a-copy", parent_id="copy")):
            report = await identities.first(who.id, guest.runtime, who)
            assert why(report, Trait.RANDOM) == (False, "Operation not permitted")
        assert (guest.runs, guest.server.open_handles) == (runs, opened)
        assert await identities.prepare("copy", guest.runtime)
        guest.server.forget()  # as in a copy that was made before its original was prepared
        await identities.first("another", guest.runtime, Identity(id="another", parent_id=VM))
        assert guest.runs == runs
    guest.answers(0, 0)
    report = await identities.first("orphan", guest.runtime, Identity(id="orphan", parent_id=VM))
    assert (guest.runs, why(report, Trait.RANDOM)[0]) == (runs + 1, True)


async def test_a_program_that_waits_and_does_not_answer_is_not_waited_for(
    guest: Guest, identities: AgentIdentities, tmp_path: Path
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    os.mkfifo(room / "in")
    (room / "out").write_bytes(REFUSED)  # of an order before
    reader = os.open(room / "in", os.O_RDWR)
    try:
        assert await identities.prepare(VM, guest.runtime)
        guest.answers(0, 0, 0)
        report = await identities.first(VM, guest.runtime, WHO)
    finally:
        os.close(reader)
    assert all(item.done for item in report)


async def test_guests_are_prepared_when_their_agents_have_come_up(guest: Guest) -> None:
    guests = AgentGuests()
    identities = AgentIdentities(guests, room=str(guest.directory / "room"), settle_s=0.01)
    async with identities.running():
        guests.port_changed(VM, guest.runtime, opened=True)
        async with asyncio.timeout(20):
            while not guest.runs:
                await asyncio.sleep(0.01)
        assert "mkfifo" in guest.was_told(0)[1]
        guests.port_changed("b", guest.runtime, opened=True)
    await guests.close()


@pytest.mark.parametrize(
    "answer", [b"", b"M", b"M" * 38, b"F 0", b"F x y z", b"F 1 1 1111", b"\xff" * 30_000, b"\n \n"]
)
async def test_nonsense_is_not_believed(guest: Guest, identities: AgentIdentities, answer: bytes) -> None:
    guest.says(answer, status=3, error=b"first\n\x1b[31mlast\x07\n\n")
    report = await identities.first(VM, guest.runtime, WHO)
    assert [item.what for item in report] == list(FIRST)
    expected = (False, "the guest could not run what Mica gave it ([31mlast)")
    assert (why(report, Trait.RANDOM), why(report, Trait.MAC)) == (expected, expected)


async def test_an_answer_without_end_is_cut_off(guest: Guest, identities: AgentIdentities) -> None:
    guest.says(b"M" * 200_000)
    report = await identities.first(VM, guest.runtime, WHO)
    assert why(report, Trait.MAC)[0] is False
    assert "larger" in why(report, Trait.RANDOM)[1]


@pytest.mark.parametrize("how", list(Misbehaviour))
@pytest.mark.parametrize("command", ["guest-exec", "guest-exec-status"])
async def test_a_broken_agent_is_a_report(guest: Guest, command: str, how: Misbehaviour) -> None:
    guests = AgentGuests()
    guest.answers(0, 0, 0)
    guest.server.misbehave(command, how)
    report = await AgentIdentities(guests, first_timeout_s=0.5, room=str(guest.directory / "room")).first(
        VM, guest.runtime, WHO
    )
    assert tuple(item.what for item in report) == FIRST
    assert all(item.done or item.why for item in report)
    assert why(report, Trait.RANDOM)[0] is why(report, Trait.MAC)[0] is (how is Misbehaviour.UNASKED)
    await guests.close()


async def test_a_guest_that_is_frozen_thaws(guest: Guest, identities: AgentIdentities) -> None:
    guest.answers(0, 0, 0)
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
    identities = AgentIdentities(guests, first_timeout_s=0.3, room=str(tmp_path / "room"))
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
