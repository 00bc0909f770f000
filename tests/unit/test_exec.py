"""Commands in a guest, on a fake agent that runs real processes: what the shell in the guest does is what is tested."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from mica.guest.agent import GuestAgent
from mica.guest.exec import GuestExec
from mica.guest.executor import GuestExecutor
from mica.guest.patience import Patience
from mica.guest.plain import PlainExec
from mica.guest.spool import Stream
from mica.model.errors import Code, MicaError
from mica.model.exec import ExecRecord, ExecSpec, ExecState, check_exec
from mica.model.units import KIB, MIB, Bytes
from mica.testing.agent_server import FakeAgent, Misbehaviour


class World:
    """A guest, and daemons that come and go."""

    def __init__(self, tmp_path: Path, server: FakeAgent) -> None:
        self.tmp = tmp_path
        self.server = server
        self.guest = tmp_path / "run"
        self.guest.mkdir()
        self.records: list[ExecRecord] = []
        self.daemons: list[tuple[GuestAgent, GuestExecutor]] = []
        self.window = 8
        self.max_output = Bytes(64 * MIB)
        self.patience = Patience()
        self.number = 0

    def daemon(self) -> GuestExecutor:
        agent = GuestAgent(self.server.path, guest="vm 'a'", timeout_s=5.0)
        directories = (str(self.guest / "absent"), str(self.guest))
        executor = GuestExecutor(
            agent, directories=directories, window=self.window, max_output=self.max_output, patience=self.patience
        )
        self.daemons.append((agent, executor))
        return executor

    async def die(self) -> None:
        """The daemon is killed: nothing of it is asked to end in order."""
        agent, executor = self.daemons.pop()
        await executor.close()
        await agent.close()

    async def keep(self, record: ExecRecord) -> None:
        self.records.append(record)

    async def start(self, executor: GuestExecutor, *argv: str, **fields: object) -> GuestExec:
        self.number += 1
        execution = await executor.start(
            ExecSpec(argv=argv, **fields),  # type: ignore[arg-type]
            exec_id=f"e{self.number}",
            vm_id="v",
            spool_dir=self.tmp / f"spool{self.number}",
            on_change=self.keep,
        )
        assert isinstance(execution, GuestExec)
        return execution

    async def abandon(self, execution: GuestExec) -> None:
        """The daemon ends just when the guest has the command."""
        task = asyncio.create_task(execution.run())
        await execution.submitted()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def run(self, executor: GuestExecutor, *argv: str, **fields: object) -> tuple[ExecRecord, bytes, bytes]:
        execution = await self.start(executor, *argv, **fields)
        record = await asyncio.wait_for(execution.run(), 60)
        return record, await read(execution, Stream.STDOUT), await read(execution, Stream.STDERR)

    async def close(self) -> None:
        while self.daemons:
            await self.die()


async def read(execution: GuestExec | PlainExec, stream: Stream, offset: int = 0) -> bytes:
    return b"".join([piece async for piece in execution.follow(stream, offset)])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with FakeAgent(tmp_path / "qga.sock") as server:
        world = World(tmp_path, server)
        yield world
        await world.close()


def sh(text: str) -> tuple[str, ...]:
    return ("sh", "-c", text)


async def test_output_status_and_records(world: World) -> None:
    executor = world.daemon()
    record, out, err = await world.run(executor, *sh("echo out; echo err >&2; exit 7"))
    assert (record.state, record.exit_code, record.signal, out, err) == (ExecState.EXITED, 7, None, b"out\n", b"err\n")
    assert record.ended_at is not None
    assert record.started_at <= record.ended_at
    assert world.records[0].state is ExecState.STARTING
    assert world.records[0].guest_dir
    assert world.records[-1] == record


def test_users_see_nothing_of_how_a_command_is_run() -> None:
    record = ExecRecord(
        id="e", vm_id="v", spec=ExecSpec(argv=("true",)), guest_dir="/run/mica-1", guest_pid=7, pid=8, exit_code=0
    )
    shown = msgspec.json.encode(record.view())
    assert b'"exit_code":0' in shown
    assert not [word for word in (b"guest", b"pid", b"sequence", b'start"') if word in shown]


async def test_every_byte_arrives_and_nothing_else(world: World) -> None:
    executor = world.daemon()
    blob = world.tmp / "blob"
    blob.write_bytes(bytes(range(256)) * 64 + b"\0" * 100 + b"no newline at the end")
    record, out, err = await world.run(executor, "cat", str(blob))
    assert record.exit_code == 0
    assert out == blob.read_bytes()
    assert err == b""
    _, out, _ = await world.run(executor, *sh(r"printf '\000'"))
    assert out == b"\0"


async def test_a_quick_command_finds_the_runner_of_the_last(world: World) -> None:
    executor = world.daemon()
    for number in range(12):
        _, out, err = await world.run(executor, *sh(f"echo {number}; echo e{number} >&2"))
        assert (out, err) == (f"{number}\n".encode(), f"e{number}\n".encode())
        await executor.runners.settle()
    assert len({record.guest_dir for record in world.records}) == 1
    assert len(list(world.guest.iterdir())) == 1
    assert world.server.calls.count("guest-exec") == 1


async def test_words_reach_the_command_as_they_were(world: World) -> None:
    executor = world.daemon()
    words = ["", " ", "'", '"', "$HOME", "`id`", "a\nb", "*", "\\", "-n", "é\u2028", "--", "x" * 5000]
    _, out, _ = await world.run(executor, "printf", r"%s\0", *words)
    assert out.split(b"\0")[:-1] == [word.encode() for word in words]


async def test_environment_directory_and_defaults(world: World) -> None:
    executor = world.daemon()
    env = {"A": "it's\n$x", "B.C-d": "odd", "PATH": "/bin:/usr/bin"}
    _, out, _ = await world.run(executor, "env", env=env, cwd=str(world.tmp))
    lines = out.decode()
    assert "A=it's\n$x\n" in lines
    assert "B.C-d=odd\n" in lines
    assert "PATH=/bin:/usr/bin\n" in lines
    assert f"PWD={world.tmp}\n" in lines or (await world.run(executor, "pwd", cwd=str(world.tmp)))[1]
    for name in ("HOME", "USER", "LOGNAME", "SHELL"):
        assert f"{name}=" in lines
    assert "mica" not in lines.replace(str(world.tmp), "")
    _, out, _ = await world.run(executor, *sh("umask; ls -l /proc/self/fd"))
    assert out.startswith(b"0022")
    assert out.count(b" -> ") <= 4, out
    assert b"/dev/null" in out


@pytest.mark.parametrize(
    ("fields", "message", "exit_code"),
    [
        ({"argv": ("no-such-program-here",)}, "there is no program 'no-such-program-here'", 127),
        ({"argv": ("/etc/passwd",)}, "there is no program '/etc/passwd'", 127),
        ({"argv": ("true",), "cwd": "/no/such"}, "there is no directory '/no/such'", 126),
        ({"argv": ("true",), "user": "nobody-such"}, "there is no user 'nobody-such'", 126),
    ],
)
async def test_what_cannot_be_started_says_why(
    world: World, fields: dict[str, object], message: str, exit_code: int
) -> None:
    executor = world.daemon()
    argv = fields.pop("argv")
    assert isinstance(argv, tuple)
    record, _, _ = await world.run(executor, *argv, **fields)
    assert record.state is ExecState.FAILED
    assert record.error is not None
    assert message in record.error.message
    assert record.error.code is Code.NOT_FOUND
    assert record.exit_code == exit_code
    assert (await world.run(executor, "echo", "still works"))[1] == b"still works\n"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ExecSpec(argv=()), "there is no command"),
        (ExecSpec(argv=("",)), "there is no command"),
        (ExecSpec(argv=("a\0b",)), "NUL"),
        (ExecSpec(argv=("a", "\udc80")), "Unicode"),
        (ExecSpec(argv=("a" * 200_000,)), "at most"),
        (ExecSpec(argv=("a",), env={"A=B": "c"}), "environment variable"),
        (ExecSpec(argv=("a",), user="-x"), "not a user"),
        (ExecSpec(argv=("a",), user="a b"), "not a user"),
        (ExecSpec(argv=("a",), timeout_s=0), "time-out"),
    ],
)
def test_a_bad_spec_is_refused(spec: ExecSpec, message: str) -> None:
    with pytest.raises(MicaError, match=message) as caught:
        check_exec(spec)
    assert caught.value.code is Code.INVALID


@pytest.mark.root
async def test_user_and_groups(world: World) -> None:
    executor = world.daemon()
    world.guest.chmod(0o755)
    _, out, _ = await world.run(executor, *sh('id -u; id -g; echo "$USER $HOME"'), user="nobody")
    assert out == b"65534\n65534\nnobody /nonexistent\n"
    _, out, _ = await world.run(executor, *sh("id -u; id -g; id -G"), user="12345:54321")
    assert out == b"12345\n54321\n54321\n"
    _, out, _ = await world.run(executor, "id", "-u", user="65534")
    assert out == b"65534\n"


async def test_output_comes_while_the_command_runs(world: World) -> None:
    executor = world.daemon()
    execution = await world.start(executor, *sh("for i in 1 2 3 4; do date +%s%N; sleep 0.3; done"))
    task = asyncio.create_task(execution.run())
    delays, lines = [], b""
    async for piece in execution.follow(Stream.STDOUT):
        delays.append(time.time() - int(piece.split()[-1]) / 1e9)
        lines += piece
    assert lines.count(b"\n") == 4
    assert sorted(delays)[1] < 0.12, delays
    assert (await task).exit_code == 0
    assert [r.state for r in world.records] == [ExecState.STARTING, ExecState.RUNNING, ExecState.EXITED]


async def test_much_output_through_a_small_window(world: World) -> None:
    world.window = 2
    executor = world.daemon()
    size = 9 * MIB
    command = f"head -c {size} /dev/urandom | tee {world.tmp}/copy; echo done >&2"
    execution = await world.start(executor, *sh(command))
    task = asyncio.create_task(execution.run())
    most = 0
    while not task.done():
        held = sum(f.stat().st_size for d in world.guest.iterdir() for f in d.glob("o?.*") if f.exists())
        most = max(most, held)
        await asyncio.sleep(0.005)
    record = await task
    assert record.exit_code == 0
    assert record.error is None
    assert hash_of(await read(execution, Stream.STDOUT)) == hash_of((world.tmp / "copy").read_bytes())
    assert await read(execution, Stream.STDERR) == b"done\n"
    assert most <= 4 * MIB
    await executor.runners.settle()
    assert list(world.guest.iterdir()) == []
    assert world.server.open_handles == 0


def hash_of(data: bytes) -> str:
    return f"{len(data)} {hashlib.sha256(data).hexdigest()}"


async def test_watchers_begin_anywhere_and_do_not_wait_for_each_other(world: World) -> None:
    executor = world.daemon()
    execution = await world.start(executor, *sh("echo one; sleep 0.2; echo two"))
    task = asyncio.create_task(execution.run())
    slow = execution.follow(Stream.STDOUT)
    assert await anext(slow) == b"one\n"
    assert await asyncio.gather(*(read(execution, Stream.STDOUT, n) for n in (0, 4, 6))) == [
        b"one\ntwo\n",
        b"two\n",
        b"o\n",
    ]
    await task
    assert b"".join([piece async for piece in slow]) == b"two\n"
    with pytest.raises(MicaError, match="offset 9"):
        await read(execution, Stream.STDOUT, 9)


async def test_stdin(world: World) -> None:
    executor = world.daemon()
    execution = await world.start(executor, "cat", stdin=True)
    task = asyncio.create_task(execution.run())
    watch = execution.follow(Stream.STDOUT)
    await execution.write_stdin(b"hello\n")
    assert await asyncio.wait_for(anext(watch), 5) == b"hello\n"
    await execution.write_stdin(b"\0\xff")
    assert await asyncio.wait_for(anext(watch), 5) == b"\0\xff"
    await execution.close_stdin()
    await execution.close_stdin()
    record = await asyncio.wait_for(task, 10)
    assert record.exit_code == 0
    with pytest.raises(MicaError, match="input"):
        await execution.write_stdin(b"late")
    await executor.runners.settle()
    assert list(world.guest.iterdir()) == []


async def test_much_stdin_to_a_slow_reader_stays_bounded_in_the_guest(world: World) -> None:
    executor = world.daemon()
    execution = await world.start(executor, *sh("sleep 0.5; sha256sum | cut -c1-64"), stdin=True)
    task = asyncio.create_task(execution.run())
    data = os.urandom(12 * MIB)
    most = 0

    async def watch() -> None:
        nonlocal most
        while not task.done():
            held = 0
            for file in [f for d in world.guest.iterdir() for f in d.glob("in.*")]:
                with contextlib.suppress(FileNotFoundError):  # it was read just now
                    held += file.stat().st_size
            most = max(most, held)
            await asyncio.sleep(0.01)

    watcher = asyncio.create_task(watch())
    for start in range(0, len(data), 3 * MIB):
        await execution.write_stdin(data[start : start + 3 * MIB])
    await execution.close_stdin()
    await asyncio.wait_for(task, 30)
    await watcher
    assert (await read(execution, Stream.STDOUT)).strip().decode() == hashlib.sha256(data).hexdigest()
    assert most <= 7 * MIB


async def test_a_command_that_does_not_read_its_input_ends_all_the_same(world: World) -> None:
    executor = world.daemon()
    execution = await world.start(executor, "true", stdin=True)
    task = asyncio.create_task(execution.run())
    with pytest.raises(MicaError) as caught:
        await execution.write_stdin(b"x" * 100 * MIB)
    assert caught.value.code is Code.STATE_CONFLICT
    assert (await asyncio.wait_for(task, 10)).exit_code == 0


async def test_no_stdin_means_dev_null(world: World) -> None:
    executor = world.daemon()
    execution = await world.start(executor, "cat")
    with pytest.raises(MicaError, match="without standard input"):
        await execution.write_stdin(b"x")
    assert (await asyncio.wait_for(execution.run(), 10)).exit_code == 0


async def test_time_out_ends_the_command_and_its_children(world: World) -> None:
    executor = world.daemon()
    marker = f"3{os.getpid()}.5"
    record, out, _ = await world.run(executor, *sh(f"echo begun; sleep {marker} & sleep {marker}"), timeout_s=0.5)
    assert record.state is ExecState.KILLED
    assert record.error is not None
    assert record.error.code is Code.TIMEOUT
    assert record.signal == signal.SIGTERM
    assert out == b"begun\n"
    assert not processes(marker)


async def test_what_ignores_sigterm_gets_sigkill(world: World) -> None:
    world.patience = Patience(grace_s=0.3)
    executor = world.daemon()
    marker = f"4{os.getpid()}.5"
    command = f"trap '' TERM; (setsid sh -c 'trap \"\" TERM; sleep {marker}' &) ; while :; do sleep {marker}; done"
    execution = await world.start(executor, *sh(command))
    task = asyncio.create_task(execution.run())
    await asyncio.sleep(0.5)
    await execution.stop()
    record = await asyncio.wait_for(task, 20)
    assert (record.state, record.signal) == (ExecState.KILLED, signal.SIGKILL)
    left = processes(marker)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(left) <= 1, "only what left the session and its parent may remain"


def processes(marker: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


async def test_a_signal_reaches_the_command_and_only_that(world: World) -> None:
    executor = world.daemon()
    execution = await world.start(
        executor, *sh("trap 'echo got; exit 3' INT; echo ready; while :; do sleep 0.05; done")
    )
    other = await world.start(executor, *sh("sleep 1; echo other"))
    task, other_task = asyncio.create_task(execution.run()), asyncio.create_task(other.run())
    watch = execution.follow(Stream.STDOUT)
    assert await anext(watch) == b"ready\n"
    await execution.kill(signal.SIGINT)
    record = await asyncio.wait_for(task, 10)
    assert (record.state, record.exit_code) == (ExecState.EXITED, 3)
    assert b"".join([piece async for piece in watch]) == b"got\n"
    await asyncio.wait_for(other_task, 10)
    assert await read(other, Stream.STDOUT) == b"other\n"


async def test_a_child_in_the_background_does_not_hold_the_exec_open(world: World) -> None:
    executor = world.daemon()
    marker = f"5{os.getpid()}.5"
    record, out, _ = await world.run(executor, *sh(f"sleep {marker} & echo started"))
    assert (record.state, record.exit_code, out) == (ExecState.EXITED, 0, b"started\n")
    await executor.runners.settle()
    left = processes(marker)
    assert len(left) == 1, "what a command leaves running keeps running"
    os.kill(left[0], signal.SIGKILL)
    assert (await world.run(executor, "echo", "next"))[1] == b"next\n"


async def test_many_at_once(world: World) -> None:
    executor = world.daemon()
    results = await asyncio.gather(*(world.run(executor, *sh(f"sleep 0.{n}; echo {n}")) for n in range(8)))
    assert [out for _, out, _ in results] == [f"{n}\n".encode() for n in range(8)]
    await executor.runners.settle()
    assert len(list(world.guest.iterdir())) == 2


@pytest.mark.parametrize("moments", [[0.0], [0.05], [0.3], [0.1, 0.1, 0.1, 0.1, 0.1]])
async def test_a_new_daemon_goes_on_with_the_next_byte(world: World, moments: list[float]) -> None:
    world.window = 2
    size = 6 * MIB
    source = world.tmp / "source"
    source.write_bytes(os.urandom(size))
    command = f"cat {source}; sleep 0.3; echo end; echo error >&2; exit 5"
    execution = await world.start(world.daemon(), *sh(command))
    for moment in moments:
        task = asyncio.create_task(execution.run())
        await execution.submitted()
        await asyncio.sleep(moment)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await world.die()
        resumed = world.daemon().resume(world.records[-1], world.tmp / "spool1", world.keep)
        assert isinstance(resumed, GuestExec)
        execution = resumed
    record = await asyncio.wait_for(execution.run(), 60)
    assert (record.state, record.exit_code) == (ExecState.EXITED, 5)
    assert hash_of(await read(execution, Stream.STDOUT)) == hash_of(source.read_bytes() + b"end\n")
    assert await read(execution, Stream.STDERR) == b"error\n"


async def test_what_ended_while_no_daemon_was_there(world: World) -> None:
    execution = await world.start(world.daemon(), *sh("echo out; sleep 0.2; echo more; exit 9"))
    await world.abandon(execution)
    await world.die()
    await asyncio.sleep(0.6)
    resumed = world.daemon().resume(world.records[-1], world.tmp / "spool1", world.keep)
    record = await asyncio.wait_for(resumed.run(), 10)
    assert (record.state, record.exit_code) == (ExecState.EXITED, 9)
    assert await read(resumed, Stream.STDOUT) == b"out\nmore\n"
    assert execution.record.state is ExecState.STARTING


async def test_stdin_goes_on_with_a_new_daemon(world: World) -> None:
    execution = await world.start(world.daemon(), "cat", stdin=True)
    task = asyncio.create_task(execution.run())
    await execution.write_stdin(b"first ")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await world.die()
    resumed = world.daemon().resume(world.records[-1], world.tmp / "spool1", world.keep)
    task = asyncio.create_task(resumed.run())
    await resumed.write_stdin(b"second")
    await resumed.close_stdin()
    await asyncio.wait_for(task, 10)
    assert await read(resumed, Stream.STDOUT) == b"first second"


async def test_a_restarted_guest_is_told_from_a_silent_one(world: World) -> None:
    execution = await world.start(world.daemon(), *sh("echo kept; sleep 60"))
    task = asyncio.create_task(execution.run())
    assert await anext(execution.follow(Stream.STDOUT)) == b"kept\n"
    await world.server.restart()
    for directory in world.guest.iterdir():
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
    record = await asyncio.wait_for(task, 20)
    assert record.state is ExecState.LOST
    assert record.error is not None
    assert "restarted" in record.error.message
    assert await read(execution, Stream.STDOUT) == b"kept\n"


async def test_a_killed_runner_means_lost(world: World) -> None:
    world.patience = Patience(alive_s=0.3)
    execution = await world.start(world.daemon(), *sh("sleep 60"))
    task = asyncio.create_task(execution.run())
    await asyncio.sleep(0.3)
    await world.server.restart()
    record = await asyncio.wait_for(task, 20)
    assert record.state is ExecState.LOST


async def test_an_agent_that_was_restarted_alone_loses_nothing(world: World) -> None:
    execution = await world.start(world.daemon(), *sh("echo one; sleep 0.5; echo two"))
    task = asyncio.create_task(execution.run())
    assert await anext(execution.follow(Stream.STDOUT)) == b"one\n"
    world.server.forget()
    world.server.drop_connections()
    record = await asyncio.wait_for(task, 20)
    assert (record.state, record.exit_code) == (ExecState.EXITED, 0)
    assert await read(execution, Stream.STDOUT) == b"one\ntwo\n"


async def test_the_next_command_after_an_agents_restart_gets_a_new_runner(world: World) -> None:
    executor = world.daemon()
    await world.run(executor, "true")
    await executor.runners.settle()
    world.server.forget()
    assert (await world.run(executor, "echo", "x"))[1] == b"x\n"


async def test_the_owner_may_know_that_the_guest_is_gone(world: World) -> None:
    execution = await world.start(world.daemon(), "sleep", "60")
    task = asyncio.create_task(execution.run())
    await asyncio.sleep(0.1)
    execution.lose("the VM was stopped")
    record = await asyncio.wait_for(task, 5)
    assert record.state is ExecState.LOST
    assert record.error is not None
    assert "the VM was stopped" in record.error.message


async def test_a_freeze_is_waited_out_and_a_start_refused(world: World) -> None:
    executor = world.daemon()
    execution = await world.start(executor, *sh("sleep 0.3; echo after"))
    task = asyncio.create_task(execution.run())
    await asyncio.sleep(0.1)
    world.server.frozen = True
    with pytest.raises(MicaError, match="frozen"):
        await world.start(executor, "true")
    await asyncio.sleep(0.6)
    assert not task.done()
    world.server.frozen = False
    record = await asyncio.wait_for(task, 10)
    assert record.exit_code == 0
    assert await read(execution, Stream.STDOUT) == b"after\n"


async def test_an_agent_that_is_silent_for_a_while(world: World) -> None:
    world.daemon()
    agent, executor = world.daemons[-1]
    agent.timeout_s = 0.3
    execution = await world.start(executor, *sh("sleep 0.2; echo after"))
    task = asyncio.create_task(execution.run())
    await asyncio.sleep(0.05)
    world.server.misbehave("guest-file-read", Misbehaviour.HANG)
    await asyncio.sleep(1.0)
    world.server.misbehave("guest-file-read", None)
    record = await asyncio.wait_for(task, 20)
    assert record.exit_code == 0
    assert await read(execution, Stream.STDOUT) == b"after\n"


@pytest.mark.parametrize("how", [Misbehaviour.WRONG_TYPE, Misbehaviour.NOT_JSON, Misbehaviour.NEVER_ENDING_LINE])
async def test_a_lying_agent_fails_the_exec_and_nothing_else(world: World, how: Misbehaviour) -> None:
    executor = world.daemon()
    execution = await world.start(executor, *sh("sleep 0.3"))
    world.server.misbehave("guest-file-read", how)
    record = await asyncio.wait_for(execution.run(), 20)
    assert record.state is ExecState.FAILED
    assert record.error is not None
    assert record.error.code is Code.AGENT_FAILED
    world.server.misbehave("guest-file-read", None)
    assert (await world.run(executor, "echo", "x"))[1] == b"x\n"


async def test_a_forged_log_fails_the_exec(world: World) -> None:
    execution = await world.start(world.daemon(), *sh("sleep 60"))
    task = asyncio.create_task(execution.run())
    await asyncio.sleep(0.2)
    with (Path(world.records[-1].guest_dir) / "l").open("ab") as log:
        log.write(b"x 1 999999\n")
    record = await asyncio.wait_for(task, 20)
    assert record.state is ExecState.FAILED
    assert record.error is not None
    assert "tampered" in record.error.message


async def test_too_much_output_ends_the_command_and_says_so(world: World) -> None:
    world.max_output = Bytes(300 * KIB)
    record, out, _ = await world.run(world.daemon(), "yes")
    assert record.state is ExecState.FAILED
    assert record.error is not None
    assert record.error.code is Code.TOO_LARGE
    assert "300 KiB" in record.error.message
    assert 0 < len(out) <= 300 * KIB


async def test_a_policy_that_forbids_exec_is_named(world: World) -> None:
    world.server.policy = frozenset({"guest-exec"})
    with pytest.raises(MicaError, match="forbids guest-exec"):
        await world.start(world.daemon(), "true")


async def test_no_place_in_the_guest(world: World) -> None:
    world.guest.rmdir()
    with pytest.raises(MicaError, match="no place for Mica's files") as caught:
        await world.start(world.daemon(), "true")
    assert caught.value.code is Code.AGENT_FAILED
    world.guest.mkdir()


async def test_a_guest_without_a_shell_runs_plain_commands(world: World) -> None:
    world.server._sh = False
    world.server.hidden = frozenset({"setsid"})
    executor = world.daemon()
    execution = await executor.start(
        ExecSpec(argv=("printf", "a%s", "b")),
        exec_id="p",
        vm_id="v",
        spool_dir=world.tmp / "plain",
        on_change=world.keep,
    )
    assert isinstance(execution, PlainExec)
    record = await asyncio.wait_for(execution.run(), 10)
    assert (record.state, record.exit_code) == (ExecState.EXITED, 0)
    assert "no shell" in record.reduced
    assert await read(execution, Stream.STDOUT) == b"ab"
    with pytest.raises(MicaError, match="no /bin/sh"):
        await world.start(executor, "true", user="nobody")


async def test_sweep_ends_what_no_daemon_remembers(world: World) -> None:
    executor = world.daemon()
    marker = f"6{os.getpid()}.5"
    kept = await world.start(executor, *sh("sleep 0.5; echo kept"))
    kept_record = world.records[-1]
    await world.abandon(kept)
    await world.abandon(await world.start(executor, "sleep", marker))
    await executor.prepare()
    await asyncio.sleep(0.2)
    await world.die()
    executor = world.daemon()
    assert await executor.sweep([kept_record]) == 2
    assert not processes(marker)
    assert [str(p) for p in world.guest.iterdir()] == [kept_record.guest_dir]
    resumed = executor.resume(kept_record, world.tmp / "spool1", world.keep)
    await asyncio.wait_for(resumed.run(), 10)
    assert await read(resumed, Stream.STDOUT) == b"kept\n"
    assert kept.record.id == kept_record.id


async def test_what_the_guest_never_heard_of_is_lost(world: World) -> None:
    world.patience = Patience(alive_s=0.2, start_s=0.3)
    await world.start(world.daemon(), "true")
    await world.die()
    resumed = world.daemon().resume(world.records[-1], world.tmp / "spool1", world.keep)
    record = await asyncio.wait_for(resumed.run(), 10)
    assert record.state is ExecState.LOST
    assert record.error is not None
    assert "never started" in record.error.message


async def test_an_agent_that_went_between_two_commands_fails_the_second(world: World) -> None:
    executor = world.daemon()
    await world.run(executor, "true")
    await executor.runners.settle()
    world.daemons[-1][0].port_closed()
    record, _, _ = await world.run(executor, "true")
    assert record.state is ExecState.FAILED
    assert record.error is not None
    assert record.error.code is Code.AGENT_UNAVAILABLE


async def test_what_is_to_stop_while_the_agent_is_gone_for_good_is_lost(world: World) -> None:
    world.patience = Patience(give_up_s=0.3)
    executor = world.daemon()
    execution = await world.start(executor, "sleep", "60")
    task = asyncio.create_task(execution.run())
    await asyncio.sleep(0.2)
    world.daemons[-1][0].port_closed()
    await execution.stop()
    record = await asyncio.wait_for(task, 10)
    assert record.state is ExecState.LOST
    assert record.error is not None
    assert "does not answer" in record.error.message


async def test_a_start_that_fails_or_is_cancelled_leaves_nothing_in_the_guest(world: World) -> None:
    executor = world.daemon()

    async def broken(record: ExecRecord) -> None:
        raise MicaError(Code.INTERNAL, "the store is gone")

    with pytest.raises(MicaError, match="the store is gone"):
        await executor.start(
            ExecSpec(argv=("true",)), exec_id="b", vm_id="v", spool_dir=world.tmp / "b", on_change=broken
        )
    for moment in (0.0, 0.01, 0.03):
        task = asyncio.create_task(world.start(executor, "true"))
        await asyncio.sleep(moment)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await executor.runners.settle()
    assert len(list(world.guest.iterdir())) <= 1
    assert (await world.run(executor, "echo", "x"))[1] == b"x\n"


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
@pytest.mark.parametrize("session", [True, False])
async def test_every_shell_does_the_same(world: World, shell: str, session: bool) -> None:
    """Called as ``sh``, as guests have them; and in a guest that has no setsid."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    (world.tmp / "bin").mkdir()
    (world.tmp / "bin" / "sh").symlink_to(program)
    world.server.shell = str(world.tmp / "bin" / "sh")
    if not session:
        world.server.hidden = frozenset({"setsid"})
    world.window = 2
    executor = world.daemon()
    for number in range(5):
        _, out, err = await world.run(executor, *sh(f"printf 'a\\000%s' {number}; echo e >&2"), env={"X.Y": "z"})
        assert (out, err) == (f"a\0{number}".encode(), b"e\n")
        await executor.runners.settle()
    assert len({record.guest_dir for record in world.records}) == 1
    size = 5 * MIB
    _, out, _ = await world.run(executor, *sh(f"head -c {size} /dev/urandom | tee {world.tmp}/copy"))
    assert hash_of(out) == hash_of((world.tmp / "copy").read_bytes())
    execution = await world.start(executor, "sha256sum", stdin=True)
    task = asyncio.create_task(execution.run())
    data = os.urandom(2 * MIB + 1)
    await execution.write_stdin(data)
    await execution.close_stdin()
    assert (await asyncio.wait_for(task, 20)).exit_code == 0
    assert (await read(execution, Stream.STDOUT)).split()[0].decode() == hashlib.sha256(data).hexdigest()
    marker = f"7{os.getpid()}.5"
    record, _, _ = await world.run(executor, *sh(f"sleep {marker} & sleep {marker}"), timeout_s=0.4)
    assert record.state is ExecState.KILLED
    assert not processes(marker)
    record, _, _ = await world.run(executor, "no-such-program")
    assert record.state is ExecState.FAILED
    await executor.runners.settle()
    assert len(list(world.guest.iterdir())) <= 2
