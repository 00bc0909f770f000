"""Programs are run with a deadline, tell their last words, and are never left behind."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from mica.images.commands import CommandError, Commands
from mica.images.files import disk_full_is_said
from mica.model.errors import Code, MicaError


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


async def gone(pid: int) -> None:
    """Wait until a process that is not our child has ended (it may stay a zombie of whoever adopted it)."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state in "ZX":
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"process {pid} is still there")


async def test_lines_come_as_they_are_said() -> None:
    out: list[str] = []
    err: list[str] = []
    await Commands().run(
        sh("echo one; printf 'half\\rwhole\\n'; echo two >&2; printf last"),
        timeout_s=10,
        stdout=out.append,
        stderr=err.append,
    )
    assert out == ["one", "half", "whole", "last"]
    assert err == ["two"]


async def test_output_goes_to_a_file_byte_by_byte(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        await Commands().run(sh("printf 'a\\0b'"), timeout_s=10, stdout=file)
    assert (tmp_path / "out").read_bytes() == b"a\0b"


async def test_a_failure_tells_program_status_and_last_words() -> None:
    with pytest.raises(CommandError) as caught:
        await Commands().run(sh("for i in $(seq 50); do echo word $i >&2; done; exit 7"), timeout_s=10)
    assert caught.value.code is Code.COMMAND_FAILED
    assert "sh failed with status 7" in caught.value.message
    assert caught.value.message.endswith("word 50")
    assert "word 3;" not in caught.value.message


async def test_an_endless_line_takes_no_endless_memory() -> None:
    err: list[str] = []
    await Commands().run(
        sh("head -c 3000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo end >&2"), timeout_s=30, stderr=err.append
    )
    assert err[-1] == "end"
    assert max(map(len, err)) <= 2000


async def test_a_signal_is_told() -> None:
    with pytest.raises(CommandError, match="killed by signal 9"):
        await Commands().run(sh("kill -9 $$"), timeout_s=10)


async def test_a_missing_program_names_its_package(tmp_path: Path) -> None:
    commands = Commands({"PATH": str(tmp_path)})
    with pytest.raises(MicaError) as caught:
        await commands.run(["qemu-img", "info"], timeout_s=10)
    assert caught.value.code is Code.HOST_LACKS
    assert caught.value.hint == "apt-get install qemu-utils"


async def test_the_deadline_ends_the_whole_group() -> None:
    pids: list[str] = []
    start = time.monotonic()
    with pytest.raises(MicaError) as caught:
        await Commands().run(sh("sleep 100 & echo $!; echo waiting >&2; wait"), timeout_s=0.5, stdout=pids.append)
    assert caught.value.code is Code.TIMEOUT
    assert "waiting" in caught.value.message
    assert time.monotonic() - start < 10
    await gone(int(pids[0]))


async def test_cancelling_ends_the_whole_group() -> None:
    pids: list[str] = []
    begun = asyncio.Event()

    def see(line: str) -> None:
        pids.append(line)
        begun.set()

    task = asyncio.create_task(Commands().run(sh("sleep 100 & echo $!; wait"), timeout_s=60, stdout=see))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(int(pids[0]))


async def test_a_program_may_clean_up_when_cancelled(tmp_path: Path) -> None:
    begun = asyncio.Event()
    script = f"trap 'echo clean > {tmp_path}/cleaned; exit' TERM; echo ready; while :; do sleep 0.05; done"
    task = asyncio.create_task(Commands().run(sh(script), timeout_s=60, stdout=lambda line: begun.set()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (tmp_path / "cleaned").read_text() == "clean\n"


async def test_a_straggler_does_not_hold_us_up() -> None:
    start = time.monotonic()
    pids: list[str] = []
    await Commands().run(sh("sleep 100 & echo $!"), timeout_s=30, stdout=pids.append)
    assert time.monotonic() - start < 10
    await gone(int(pids[0]))


async def test_a_program_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    code = (
        "import asyncio; from mica.images.commands import Commands;"
        "asyncio.run(Commands().run(['sh', '-c', 'echo $$; exec sleep 100'], timeout_s=60,"
        " stdout=lambda line: print(line, flush=True)))"
    )
    starter = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        stdout=asyncio.subprocess.PIPE,
    )
    assert starter.stdout is not None
    pid = int(await starter.stdout.readline())
    starter.kill()
    await starter.communicate()
    await gone(pid)


async def test_the_environment_is_ours_alone() -> None:
    lines: list[str] = []
    await Commands({"http_proxy": "http://proxy:3128"}).run(["env"], timeout_s=10, stdout=lines.append)
    names = {line.partition("=")[0] for line in lines}
    assert names == {"PATH", "LC_ALL", "HOME", "http_proxy"}


async def test_a_full_disk_met_by_a_program_is_said_as_such(tmp_path: Path) -> None:
    with pytest.raises(MicaError) as caught, disk_full_is_said(tmp_path, "building the image x"):
        await Commands().run(sh("cat /etc/passwd > /dev/full"), timeout_s=10)
    assert caught.value.code is Code.INSUFFICIENT_DISK
