"""Programs that are asked something: their answers, their ends, and nothing of them left."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from mica.host.programs import ask
from mica.model.errors import Code, MicaError


def _python(body: str) -> list[str]:
    return [sys.executable, "-c", body]


async def test_the_answer_has_everything() -> None:
    body = "import sys; sys.stdout.write(sys.stdin.read().upper()); sys.stderr.write('a\\nb\\n'); sys.exit(3)"
    answer = await ask(_python(body), stdin=b"hello", timeout_s=20)
    assert (answer.status, answer.text, answer.last_words) == (3, "HELLO", "b")


async def test_a_program_that_does_not_read_its_input_is_no_error() -> None:
    assert (await ask(_python("print(1)"), stdin=b"x" * 1_000_000, timeout_s=20)).out == b"1\n"


async def test_a_signal_is_a_status() -> None:
    assert (await ask(_python("import os; os.kill(os.getpid(), 9)"), timeout_s=20)).status == -9


async def test_nothing_of_our_environment_is_seen() -> None:
    os.environ["MICA_TEST_SECRET"] = "1"
    try:
        answer = await ask(_python("import os; print('MICA_TEST_SECRET' in os.environ)"), timeout_s=20)
    finally:
        del os.environ["MICA_TEST_SECRET"]
    assert answer.text == "False\n"


async def test_the_deadline_kills_the_children_too_and_keeps_what_was_said(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    body = (
        "import os, signal\nprint('began', flush=True)\nchild = os.fork()\n"
        f"if child: open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child}}')\nwhile True: signal.pause()\n"
    )
    with pytest.raises(MicaError, match="did not end within 1 s") as caught:
        await ask(_python(body), timeout_s=1.0)
    assert caught.value.code is Code.TIMEOUT
    assert caught.value.details["said"] == "began\n"
    for pid in pids.read_text().split():
        status = Path(f"/proc/{pid}/status")
        assert not status.exists() or "State:\tZ" in status.read_text(), "a zombie is its new parent's to reap"


async def test_a_flood_is_cut_off() -> None:
    with pytest.raises(MicaError, match="wrote more than 1000 bytes") as caught:
        await ask(_python("while True: print('x' * 1000)"), timeout_s=20, max_output=1000)
    assert caught.value.code is Code.COMMAND_FAILED


async def test_what_cannot_be_executed(tmp_path: Path) -> None:
    with pytest.raises(MicaError, match="cannot be executed: No such file") as caught:
        await ask([str(tmp_path / "absent")], timeout_s=20)
    assert caught.value.code is Code.HOST_LACKS


async def test_cancelling_twice_still_kills(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    body = (
        f"import os, signal\npipe = os.open({str(pipe)!r}, os.O_WRONLY)\nos.write(pipe, b'%d' % os.getpid())\n"
        "os.close(pipe)\nsignal.pause()\n"
    )
    task = asyncio.create_task(ask(_python(body), timeout_s=20))
    pid = await asyncio.to_thread(pipe.read_text)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path(f"/proc/{pid}").exists()
