"""Files in and out of a guest that has much, little or lying programs: whole and verified, or not there at all."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mica.guest.copy import Copies
from mica.guest.digests import Digest
from mica.guest.guests import AgentGuests
from mica.model.errors import Code, MicaError
from mica.model.units import MIB
from mica.testing.agent_server import FakeAgent
from tests.unit.test_exec_sessions import VM, World

NEEDED = ("sh", "tar", "mktemp", "mkfifo", "tee", "cat", "dd", "mkdir", "rm", "cp", "mv", "sleep", "tail", "setsid")


class Guest(World):
    """A guest with just the programs that a test gives it."""

    def __init__(self, tmp_path: Path, server: FakeAgent) -> None:
        super().__init__(tmp_path, server)
        self.bin = tmp_path / "bin"
        self.bin.mkdir()
        self.dest = tmp_path / "dest"
        self.dest.mkdir()
        self.has(*NEEDED)
        shell = tmp_path / "shell"
        shell.write_text(f'#!/bin/sh\nPATH={self.bin}\nexec /bin/sh "$@"\n')
        shell.chmod(0o755)
        server.shell = str(shell)

    def has(self, *programs: str) -> None:
        for program in programs:
            found = shutil.which(program)
            assert found is not None
            (self.bin / program).symlink_to(found)

    def lies(self, program: str, text: str) -> None:
        """``program`` reads its input and prints ``text``."""
        file = self.bin / program
        file.write_text(f"#!/bin/sh\n[ $# -gt 0 ] || cat >/dev/null\necho '{text}'\n")
        file.chmod(0o755)

    @asynccontextmanager
    async def copies(self) -> AsyncIterator[Copies]:
        async with self.daemon() as (guests, sessions):
            assert isinstance(guests, AgentGuests)
            yield Copies(sessions, guests)
            assert sessions.of(VM) == []

    async def copy_in(self, copies: Copies, archive: bytes, size: int = 0) -> str:
        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(archive), 70_000):
                yield archive[start : start + 70_000]

        summary = await copies.copy_in(VM, "a", self.runtime, str(self.dest), pieces(), size=size)
        assert summary.bytes == len(archive)
        return summary.checked_by

    async def copy_out(self, copies: Copies, path: str) -> bytes:
        return b"".join([piece async for piece in copies.copy_out(VM, "a", self.runtime, path)])


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    async with FakeAgent(tmp_path / "agent") as server:
        yield Guest(tmp_path, server)


FILES = {"text": b"much the same " * 100_000, "noise": os.urandom(MIB + 7), "empty": b""}


def archive() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as opened:
        for name, data in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            opened.addfile(entry, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize(
    ("programs", "checked_by"),
    [
        (("sha256sum", "cksum", "gzip", "df"), "sha256sum"),
        (("cksum", "gzip"), "cksum"),
        (("gzip",), "gzip"),
        (("sha256sum",), "sha256sum"),
        ((), ""),
    ],
)
async def test_whole_with_whatever_the_guest_has(guest: Guest, programs: tuple[str, ...], checked_by: str) -> None:
    guest.has(*programs)
    async with guest.copies() as copies:
        assert await guest.copy_in(copies, archive(), size=sum(map(len, FILES.values()))) == checked_by
        assert {entry.name: entry.read_bytes() for entry in guest.dest.iterdir()} == FILES
        back = await guest.copy_out(copies, f"{guest.dest}/noise")
    with tarfile.open(fileobj=io.BytesIO(back)) as opened:
        member = opened.extractfile("noise")
        assert member is not None
        assert member.read() == FILES["noise"]


@pytest.mark.parametrize("program", ["sha256sum", "cksum"])
async def test_other_bytes_than_were_sent_are_refused(guest: Guest, program: str) -> None:
    guest.lies(program, "1234 5")
    (guest.dest / "there").write_bytes(b"before")
    async with guest.copies() as copies:
        with pytest.raises(MicaError, match="other bytes than were sent") as caught:
            await guest.copy_in(copies, archive())
        assert caught.value.code is Code.CORRUPT
        with pytest.raises(MicaError, match="other bytes arrived"):
            await guest.copy_out(copies, f"{guest.dest}/there")
    assert [entry.name for entry in guest.dest.iterdir()] == ["there"]


async def test_a_guest_without_space_is_not_filled(guest: Guest) -> None:
    guest.has("sha256sum")
    guest.lies("df", "/dev/vda1 4096 3072 1024 75% /")
    async with guest.copies() as copies:
        with pytest.raises(MicaError, match=r"needs 2 MiB in .*/dest of a, 1 MiB are free") as caught:
            await guest.copy_in(copies, archive(), size=2 * MIB)
        assert caught.value.code is Code.INSUFFICIENT_DISK
        assert not list(guest.dest.iterdir())
        await guest.copy_in(copies, archive(), size=MIB)


@pytest.mark.parametrize("words", ["rootfs 0 0 0 - /", "df: not found", "", "99999999999999999999999 1 1 1%"])
async def test_a_guest_that_cannot_say_how_much_space_it_has_is_tried(guest: Guest, words: str) -> None:
    guest.lies("df", words)
    async with guest.copies() as copies:
        await guest.copy_in(copies, archive(), size=2 * MIB)


async def test_a_disk_that_fills_up_on_the_way_is_told_as_that(guest: Guest) -> None:
    (guest.bin / "tar").unlink()
    guest.lies("tar", "")
    (guest.bin / "tar").write_text("#!/bin/sh\necho 'tar: write error: No space left on device' >&2\nexit 1\n")
    async with guest.copies() as copies:
        with pytest.raises(MicaError, match="the guest's disk is full") as caught:
            await guest.copy_in(copies, archive())
        assert caught.value.code is Code.INSUFFICIENT_DISK
    assert not list(guest.dest.iterdir())


async def test_what_is_not_there_is_named(guest: Guest) -> None:
    async with guest.copies() as copies:
        with pytest.raises(MicaError, match=r"there is no .*/none in the guest") as caught:
            await guest.copy_out(copies, f"{guest.dest}/none")
        assert caught.value.code is Code.NOT_FOUND
        guest.dest.rmdir()
        with pytest.raises(MicaError, match="there is no directory") as caught:
            await guest.copy_in(copies, archive())
        assert caught.value.code is Code.NOT_FOUND


@pytest.mark.parametrize("size", [0, 1, 255, 256, 70_000])
def test_checksums_are_those_of_the_programs(size: int) -> None:
    data = os.urandom(size)
    for program in ("sha256sum", "cksum"):
        digest = Digest(program)
        digest.update(data[:100])
        digest.update(data[100:])
        said = subprocess.run([program], input=data, capture_output=True, check=True).stdout.split()[0]
        assert digest.text() == said.decode()
