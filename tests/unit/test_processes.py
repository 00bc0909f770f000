"""Real, short-lived processes: the facts under test are the kernel's."""

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

from mica.host.processes import (
    ExitStatus,
    LiveProcess,
    ResourceLimits,
    boot_id,
    find,
    reference,
    spawn,
    usage,
)
from mica.model.errors import Code, MicaError
from mica.model.vm import ProcessRef


@pytest.fixture
def sleeper() -> Iterator[LiveProcess]:
    with spawn(["sleep", "60"]) as process:
        yield process
        process.kill()


async def test_exit_code_and_signal_of_a_child_are_known() -> None:
    with spawn([sys.executable, "-c", "raise SystemExit(7)"]) as process:
        assert await process.wait_exit(10) == ExitStatus(code=7)
        assert process.exit_status == ExitStatus(code=7)
        assert not process.alive
    with spawn(["sleep", "60"]) as process:
        assert process.alive
        assert process.exit_status is None
        assert process.kill(signal.SIGTERM)
        assert await process.wait_exit(10) == ExitStatus(signal=signal.SIGTERM)
        assert not process.kill()


async def test_many_waiters_are_all_released(sleeper: LiveProcess) -> None:
    async with asyncio.TaskGroup() as group:
        waiters = [group.create_task(sleeper.wait_exit(10)) for _ in range(5)]
        await asyncio.sleep(0)
        sleeper.kill()
    assert {waiter.result() for waiter in waiters} == {ExitStatus(signal=signal.SIGKILL)}


async def test_waiting_has_a_deadline_and_can_be_repeated(sleeper: LiveProcess) -> None:
    with pytest.raises(MicaError) as caught:
        await sleeper.wait_exit(0.01)
    assert caught.value.code is Code.TIMEOUT
    assert str(sleeper.pid) in caught.value.message
    sleeper.kill()
    assert (await sleeper.wait_exit(10)).signal == signal.SIGKILL


async def test_closing_releases_waiters_and_leaves_the_process_alone(sleeper: LiveProcess) -> None:
    other = find(sleeper.ref)
    assert other is not None
    async with asyncio.TaskGroup() as group:
        waiter = group.create_task(other.wait_exit())
        await asyncio.sleep(0)
        other.close()
        other.close()
    assert waiter.result() == ExitStatus()
    assert sleeper.alive


async def test_terminate_escalates_to_kill(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = f"import signal,time,pathlib; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(ready)!r}).touch()\n"
    with spawn([sys.executable, "-c", code + "time.sleep(60)"]) as process:
        while not ready.exists():
            assert process.alive
            await asyncio.sleep(0.01)
        assert await process.terminate(grace_s=0.05) == ExitStatus(signal=signal.SIGKILL)
    with spawn(["sleep", "60"]) as process:
        assert await process.terminate(grace_s=10) == ExitStatus(signal=signal.SIGTERM)


def test_a_stale_reference_finds_nobody(sleeper: LiveProcess) -> None:
    ref = sleeper.ref
    assert find(msgspec.structs.replace(ref, start_ticks=ref.start_ticks - 1)) is None  # the pid is another's now
    assert find(msgspec.structs.replace(ref, boot_id="00000000-0000-0000-0000-000000000000")) is None
    assert find(ProcessRef(2**22 + 1, 1, boot_id())) is None
    assert find(ProcessRef(-1, 1, boot_id())) is None
    again = find(ref)
    assert again is not None
    again.close()


async def test_a_zombie_counts_as_dead() -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    try:
        ref = reference(child)
        assert ref is not None
        pidfd = os.pidfd_open(child)
        try:
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)  # ended, and left unreaped
        finally:
            os.close(pidfd)
        assert reference(child) == ref  # still visible
        assert usage(ref) is None
        assert find(ref) is None  # finding reaps it, being its parent
    finally:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


async def test_the_exit_status_of_a_stranger_is_unknown(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import subprocess,pathlib; p=subprocess.Popen(['sleep','60'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(p.pid)); p.returncode=0"
    )
    with spawn([sys.executable, "-c", code]) as parent:
        assert await parent.wait_exit(10) == ExitStatus(code=0)
    ref = reference(int(note.read_text()))
    assert ref is not None
    stranger = find(ref)  # it outlived its starter
    assert stranger is not None
    with stranger:
        assert stranger.kill(signal.SIGKILL)
        assert await stranger.wait_exit(10) == ExitStatus()


async def test_session_output_umask_and_environment(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import os,sys; print(os.getsid(0)==os.getpid(), sorted(os.environ), oct(os.umask(0))); sys.stderr.write('err')"
    )
    with spawn([sys.executable, "-I", "-c", code], stdout=log, stderr=log, cwd=tmp_path) as process:
        assert (await process.wait_exit(10)).code == 0
    text = log.read_text()
    assert "True ['LC_ALL', 'PATH'] 0o77" in text
    assert "err" in text
    assert log.stat().st_mode & 0o777 == 0o600
    with spawn(["echo", "more"], stdout=log) as process:
        await process.wait_exit(10)
    assert log.read_text().startswith(text[:4])
    assert log.read_text().endswith("more\n")


async def test_descriptors_are_passed_and_no_other_leaks(tmp_path: Path) -> None:
    wanted, unwanted = os.pipe()
    os.set_inheritable(unwanted, True)
    try:
        with spawn(["ls", "/proc/self/fd"], stdout=tmp_path / "fds", pass_fds=[wanted]) as process:
            await process.wait_exit(10)
        fds = {int(line) for line in (tmp_path / "fds").read_text().split()}
        assert wanted in fds
        assert unwanted not in fds
    finally:
        os.close(wanted)
        os.close(unwanted)


@pytest.mark.parametrize("restore", [True, False])
async def test_limits_hold_and_sigxfsz_can_stay_ignored(tmp_path: Path, restore: bool) -> None:
    code = (
        "import resource as r, sys\n"
        "print(r.getrlimit(r.RLIMIT_FSIZE), r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_CORE), flush=True)"
    )
    limits = ResourceLimits(file_size=4096, open_files=99, core=0)
    log = tmp_path / "log"
    with spawn([sys.executable, "-c", code], stdout=log, limits=limits) as process:
        pid = process.pid
        assert (await process.wait_exit(10)).code == 0
    assert pid == process.pid
    assert log.read_text().strip() == "(4096, 4096) (99, 99) (0, 0)"
    big = tmp_path / "big"
    argv = ["dd", "if=/dev/zero", f"of={big}", "bs=1k", "count=8"]
    with spawn(argv, limits=limits, restore_signals=restore) as process:
        status = await process.wait_exit(10)
    assert status == (ExitStatus(signal=signal.SIGXFSZ) if restore else ExitStatus(code=1))
    assert big.stat().st_size == 4096


def test_a_missing_program_is_named() -> None:
    with pytest.raises(MicaError) as caught:
        spawn(["no-such-program-anywhere"])
    assert caught.value.code is Code.HOST_LACKS
    assert "no-such-program-anywhere" in caught.value.message


def test_a_program_that_cannot_run_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    with pytest.raises(MicaError) as caught:
        spawn([str(broken)])
    assert caught.value.code is Code.COMMAND_FAILED
    assert str(broken) in caught.value.message


async def test_usage_counts_processor_time_and_memory(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = (
        "import pathlib,time\nb=bytearray(32<<20)\nend=time.process_time()+0.2\n"
        f"while time.process_time()<end: pass\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)"
    )
    with spawn([sys.executable, "-c", code]) as process:
        try:
            while not ready.exists():
                assert process.alive
                await asyncio.sleep(0.01)
            used = usage(process.ref, pss=True)
            assert used is not None
            assert 0.15 <= used.cpu_seconds < 5
            assert 32 << 20 <= used.rss < 200 << 20
            assert used.pss is not None
            assert 32 << 20 <= used.pss <= used.rss + (1 << 20)
            # What is merely mapped (the interpreter, its libraries) is not held.
            assert 32 << 20 <= used.held < used.rss
            plain = usage(process.ref)
            assert plain is not None
            assert plain.pss is None
        finally:
            process.kill()
        await process.wait_exit(10)
    assert usage(process.ref) is None


def test_starting_is_quick() -> None:
    """Against the cost of a bare posix_spawn of the same program in the same run; generous, for a busy machine."""

    def best(start: object) -> float:
        times = []
        for _ in range(10):
            begin = time.perf_counter()
            assert callable(start)
            start()
            times.append(time.perf_counter() - begin)
        return min(times)

    def bare() -> None:
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)

    def ours() -> None:
        with spawn(["/bin/true"]) as process:
            os.waitid(os.P_PIDFD, process._pidfd, os.WEXITED | os.WNOWAIT)

    assert best(ours) < best(bare) * 5 + 0.005


async def test_of_a_private_mapping_only_pages_that_were_written_are_ones_own(tmp_path: Path) -> None:
    """As a fork maps a RAM image: 64 MiB are there, all of it is read, and 16 MiB are written."""
    ready = tmp_path / "ready"
    code = (
        "import mmap,os,pathlib,time\nf=os.memfd_create('ram')\nos.ftruncate(f,64<<20)\n"
        "s=mmap.mmap(f,64<<20)\nfor i in range(64): s[i<<20:(i+1)<<20]=b'x'*(1<<20)\ns.close()\n"
        "m=mmap.mmap(f,64<<20,mmap.MAP_PRIVATE)\nn=sum(m[i] for i in range(0,64<<20,4096))\n"
        "for i in range(0,16<<20,4096): m[i]=1\n"
        f"pathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)"
    )
    with spawn([sys.executable, "-c", code]) as process:
        try:
            while not ready.exists():
                assert process.alive
                await asyncio.sleep(0.01)
            used = usage(process.ref)
        finally:
            process.kill()
        await process.wait_exit(10)
    assert used is not None
    assert 16 << 20 <= used.own < 48 << 20
    assert used.held >= 64 << 20
