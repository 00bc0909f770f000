"""Logs are cut at their beginning, and stay what they are at their end."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

from mica.host.processes import ResourceLimits, spawn
from mica.qemu.console import Consoles
from mica.qemu.logs import KEEP, LogKeeper, trim


def fill(file: Path, mebibytes: int) -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(f"{n:07d}\n".encode() for n in range(mebibytes * 131072))
    file.write_bytes(data)
    return data


def test_a_log_keeps_its_end_and_its_offsets(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "vm" / "console.log"
    data = fill(file, 5)
    assert trim(file) == len(data)
    status = file.stat()
    assert status.st_size == len(data)
    assert KEEP <= status.st_blocks * 512 <= KEEP + 8192
    kept = file.read_bytes()
    assert kept[-KEEP:] == data[-KEEP:]
    assert kept[: len(data) - KEEP - 4096].count(0) == len(data) - KEEP - 4096
    with file.open("ab") as stream:
        stream.write(b"goes on\n")
    assert trim(file) == len(data) + 8  # nothing to do


def test_small_and_absent_logs_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "vm" / "console.log"
    assert trim(file) == 0
    data = fill(file, 1)
    assert trim(file) == len(data)
    assert file.read_bytes() == data
    # A log with one byte far out, as one that was cut before: all it has fits.
    with file.open("r+b") as stream:
        stream.truncate(50 * KEEP)
    assert trim(file) == 50 * KEEP


async def test_what_was_cut_is_never_shown(tmp_path: Path) -> None:
    data = fill(tmp_path / "vm" / "console.log", 4)
    trim(tmp_path / "vm" / "console.log")
    consoles = Consoles(tmp_path)

    async def nowhere() -> None:
        """It does not run."""

    pieces = [piece async for piece in consoles.follow("vm", nowhere, 0)]
    first = pieces[0][0]
    assert len(data) - KEEP - 4096 <= first <= len(data) - KEEP
    assert b"".join(text for _, text in pieces) == data[first:]
    assert consoles.tail("vm", 10 * KEEP) == data[first:]
    assert consoles.tail("vm", 80) == data[-80:]


async def test_the_keeper_goes_round_and_survives_what_it_finds(tmp_path: Path) -> None:
    told: dict[str, int] = {}
    data = fill(tmp_path / "a" / "console.log", 3)
    fill(tmp_path / "b" / "qemu.log", 3)
    (tmp_path / "c" / "console.log").mkdir(parents=True)  # not a file
    (tmp_path / "d").write_text("not a directory")
    (tmp_path / "e").mkdir()
    os.mkfifo(tmp_path / "e" / "console.log")
    keeper = LogKeeper(tmp_path, told.__setitem__, period_s=0.01)
    async with asyncio.timeout(10), keeper.running():
        while set(told) != {"a", "b"}:
            await asyncio.sleep(0.01)
    assert told["a"] == len(data)
    assert (tmp_path / "a" / "console.log").stat().st_blocks * 512 < 2 * KEEP
    assert (tmp_path / "b" / "qemu.log").stat().st_blocks * 512 < 2 * KEEP
    assert {line.split(":")[0] for line in keeper.once()} == {"c", "d", "e"}


def test_a_limit_is_moved_along(tmp_path: Path) -> None:
    limits = ResourceLimits(file_size=1 << 20, raisable=True)
    with spawn(["sleep", "60"], limits=limits) as process:
        try:
            while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":  # prlimit becomes it
                pass
            assert resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[0] == 1 << 20
            process.raise_file_limit(1 << 19)
            assert resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[0] == 1 << 20
            process.raise_file_limit(1 << 30)
            assert resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[0] == 1 << 30
        finally:
            process.kill()
    process_is_gone = spawn(["true"])
    with process_is_gone:
        process_is_gone.kill()
        process_is_gone.raise_file_limit(1)
