"""``mica`` as a process: exit statuses, streams, Ctrl-C, terminals."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mica.model.operation import OperationState
from mica.model.views import VmCreate
from tests.unit.client_fixtures import Engine, Served, served

DEADLINE_S = 30.0


@pytest.fixture
def api() -> Iterator[Served]:
    with served() as running:
        yield running


def environment(api: Served) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "MICA_URL": api.url, "TERM": "xterm", "COLUMNS": "100"}


COMMAND = [sys.executable, "-m", "mica"]


def mica(api: Served, *argv: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(
        [*COMMAND, *argv], env=environment(api), capture_output=True, timeout=DEADLINE_S, check=False, **options
    )


@contextmanager
def started(api: Served, *argv: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*COMMAND, *argv],
        env=environment(api),
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )
    try:
        with process:
            yield process
            process.wait(timeout=DEADLINE_S)
    finally:
        process.kill()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def create(api: Served, name: str, *, start: bool = False) -> str:
    return api.call(api.engine._vm_create("", VmCreate(name=name, start=start), None))[0]


def jobs(api: Served, verb: str) -> list[Any]:
    return [job for job in api.engine.jobs.values() if job.verb == verb]


def test_the_guests_status_and_streams_are_ours(api: Served) -> None:
    create(api, "web", start=True)
    ended = mica(api, "vm", "exec", "web", "--", "both")
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, b"out", b"err")
    assert mica(api, "vm", "exec", "web", "--", "cat", stdin=b"piped in").stdout == b"piped in"
    document = json.loads(mica(api, "vm", "exec", "web", "--json", "--", "both").stdout)
    assert document == {"vm": "web", "exit_code": 3, "stdout": "out", "stderr": "err"}
    missing = mica(api, "vm", "exec", "web", "--", "nonesuch")
    assert (missing.returncode, b"there is no program nonesuch" in missing.stderr) == (17, True)


def test_what_exec_sends(api: Served) -> None:
    create(api, "web", start=True)
    mica(api, "vm", "exec", "web", "--user", "www", "-e", "A=1", "--cwd", "/srv", "--timeout", "2m", "--", "both", "-l")
    (record,) = api.engine.commands.values()
    spec = record.spec
    assert (spec.argv, spec.user, spec.env, spec.cwd, spec.timeout_s) == (
        ("both", "-l"),
        "www",
        {"A": "1"},
        "/srv",
        120,
    )
    assert not spec.stdin


def test_run_with_a_command(api: Served) -> None:
    ready(api)
    ended = mica(api, "run", "micro", "--name", "one", "--", "both")
    assert (ended.returncode, ended.stdout) == (3, b"out")
    assert ended.stderr.endswith(b"err")
    assert [view.name for view in api.engine.machines.values()] == ["one"]
    ended = mica(api, "run", "micro", "--rm", "--name", "two", "--", "yes", "3")
    assert (ended.returncode, ended.stdout) == (0, b"yyy")
    assert [view.name for view in api.engine.machines.values()] == ["one"]


def test_run_without_a_command_leaves_it_running(api: Served) -> None:
    ended = mica(api, "run", "micro", "--name", "one")
    assert ended.returncode == 0
    assert ended.stdout.startswith(b"one is running")
    assert json.loads(mica(api, "run", "micro", "--name", "two", "--json").stdout)["name"] == "two"


def ready(api: Served) -> None:
    """Let the guests' agents answer from the start."""
    import msgspec

    from mica.model.vm import AgentState

    engine, put = api.engine, api.engine._put

    async def answering(view: Any) -> Any:
        agent = msgspec.structs.replace(view.observed, agent=AgentState.READY)
        return await put(msgspec.structs.replace(view, observed=agent))

    engine._put = answering  # type: ignore[method-assign]


def test_ctrl_c_cancels_what_is_being_created(api: Served) -> None:
    with started(api, "vm", "create", "--name", "slow") as process:
        until(lambda: jobs(api, "vm.create"))
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert jobs(api, "vm.create")[0].state is OperationState.CANCELLED


def test_a_second_ctrl_c_leaves_at_once_and_says_what_goes_on(api: Served) -> None:
    assert isinstance(api.engine, Engine)
    api.engine.stubborn = True
    with started(api, "vm", "create", "--name", "slow") as process:
        until(lambda: jobs(api, "vm.create"))
        process.send_signal(signal.SIGINT)
        until(lambda: jobs(api, "vm.create")[0].cancel_requested)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert b"vm.create slow goes on" in err
    assert jobs(api, "vm.create")[0].id.encode() in err
    assert b"Traceback" not in err


def test_ctrl_c_leaves_a_stop_going(api: Served) -> None:
    create(api, "slow", start=True)
    with started(api, "vm", "stop", "slow") as process:
        until(lambda: jobs(api, "vm.stop"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert not jobs(api, "vm.stop")[0].cancel_requested
    assert b"vm.stop slow goes on" in err


def test_sigterm_leaves_without_cancelling(api: Served) -> None:
    with started(api, "vm", "create", "--name", "slow") as process:
        until(lambda: jobs(api, "vm.create"))
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert not jobs(api, "vm.create")[0].cancel_requested


def test_ctrl_c_is_passed_on_to_the_guests_command(api: Served) -> None:
    create(api, "web", start=True)
    with started(api, "vm", "exec", "web", "--", "sleep", "99") as process:
        until(lambda: api.engine.commands and api.engine.watchers >= 2)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert [record.signal for record in api.engine.commands.values()] == [signal.SIGINT]


def test_a_reader_that_has_gone_is_no_error(api: Served) -> None:
    create(api, "web", start=True)
    with started(api, "vm", "exec", "web", "--", "yes", "1000000") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
    assert process.returncode == 141
    assert b"Traceback" not in err


def test_long_work_tells_its_progress_in_lines(api: Served) -> None:
    with started(api, "vm", "create", "--name", "slow") as process:
        until(lambda: jobs(api, "vm.create"))
        assert process.stderr is not None
        line = process.stderr.readline()
        api.call(api.engine.finish(jobs(api, "vm.create")[0].id))
    assert b"create slow" in line
    assert b"\x1b" not in line


class Keyboard:
    """A pseudo-terminal with ``mica`` in it."""

    def __init__(self, api: Served, *argv: str) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [*COMMAND, *argv], env=environment(api), stdin=self.slave, stdout=self.slave, stderr=self.slave
        )
        self.seen = b""

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def expect(self, text: bytes) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.slave)
        os.close(self.master)


@pytest.fixture
def keyboard(api: Served) -> Iterator[Callable[..., Keyboard]]:
    made: list[Keyboard] = []

    def make(*argv: str) -> Keyboard:
        made.append(Keyboard(api, *argv))
        return made[-1]

    yield make
    for item in made:
        item.close()


def is_raw(keyboard: Keyboard) -> bool:
    local = termios.tcgetattr(keyboard.slave)[3]
    return not local & (termios.ICANON | termios.ECHO | termios.ISIG)


def test_the_console_in_a_terminal(api: Served, keyboard: Callable[..., Keyboard]) -> None:
    vm = create(api, "web", start=True)
    api.call(api.engine.print(vm, b"Debian login: "))
    first, second = keyboard("vm", "console", "web"), keyboard("vm", "console", "web")
    for watcher in (first, second):
        watcher.expect(b"Ctrl-] q leaves")
        watcher.expect(b"Debian login: ")
        assert is_raw(watcher)
    first.type(b"root\x03")
    first.expect(b"ROOT\x03")  # Ctrl-C is the guest's
    second.expect(b"ROOT\x03")
    first.type(b"\x1d?")
    first.expect(b"\r\nmica: Ctrl-] q leaves")
    first.type(b"\x1d\x1d")
    until(lambda: bytes(api.engine.typed[vm]).endswith(b"\x1d"))
    first.type(b"\x1dq")
    assert first.process.wait(timeout=DEADLINE_S) == 0
    assert termios.tcgetattr(first.slave) == first.before
    assert second.process.poll() is None
    assert bytes(api.engine.typed[vm]) == b"root\x03\x1d"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_restored_when_the_console_is_ended(
    api: Served, keyboard: Callable[..., Keyboard], signum: int
) -> None:
    vm = create(api, "web", start=True)
    api.call(api.engine.print(vm, b"login: "))
    watcher = keyboard("vm", "console", "web")
    watcher.expect(b"login: ")
    assert is_raw(watcher)
    watcher.process.send_signal(signum)
    assert watcher.process.wait(timeout=DEADLINE_S) == 128 + signum
    assert termios.tcgetattr(watcher.slave) == watcher.before


def test_the_terminal_is_restored_when_the_console_refuses(api: Served, keyboard: Callable[..., Keyboard]) -> None:
    create(api, "web")
    watcher = keyboard("vm", "console", "web")
    watcher.expect(b"Ctrl-] q leaves")
    until(lambda: is_raw(watcher))
    watcher.type(b"x")
    watcher.expect(b"does not run")
    assert watcher.process.wait(timeout=DEADLINE_S) == 6
    assert termios.tcgetattr(watcher.slave) == watcher.before


def test_a_script_may_type_into_the_console(api: Served) -> None:
    create(api, "web", start=True)
    with started(api, "vm", "console", "web", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"echo\n")
        process.stdin.close()
        assert process.stdout is not None
        assert process.stdout.read(5) == b"ECHO\n"
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130


def test_a_bar_on_a_terminal(api: Served, keyboard: Callable[..., Keyboard]) -> None:
    window = keyboard("vm", "create", "--name", "slow")
    window.expect(b"create slow")
    api.call(api.engine.finish(jobs(api, "vm.create")[0].id))
    window.expect(b"slow is stopped")
    assert window.process.wait(timeout=DEADLINE_S) == 0
