"""Runners: shells that wait in the guest for commands. Started, found again, given commands, reused, ended.

One runner executes one command at a time. A command that ended quickly and wrote little leaves its runner as good as
new, and the next command finds it waiting; every other runner is ended after its command. At most ``MAX_IDLE`` wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import structlog

from mica.guest import script
from mica.guest.agent import AgentRefusedError, GuestAgent, Request
from mica.guest.log import CommandEvents, RunnerLog
from mica.guest.tail import Tail, open_tails
from mica.model.errors import Code, MicaError
from mica.model.units import KIB

DIRECTORIES = ("/run", "/tmp")  # noqa: S108 - in the guest; the directory made there is mode 0700 with a random name
WINDOW = 8
"""Segments of at most 1 MiB that a stream may have unread in the guest."""
MAX_IDLE = 2
MAX_REUSE = 500
START_TIMEOUT_S = 20.0
RETRY_S = (1.0, 4.0, 15.0, 60.0)
MIN_TYPICAL_S = 0.001
MAX_TYPICAL_S = 0.016
MAX_FIRST = 256 * KIB
"""A runner whose first segments hold more than this is not used again."""

_log = structlog.get_logger(__name__)


class Runner:
    """One runner. ``sequence`` is the number of the command it executes or executed last.

    ``out`` and ``err`` are the first segments of its streams, open from one command to the next.
    """

    def __init__(self, agent: GuestAgent, directory: str, pid: int, sequence: int = 0) -> None:
        self.agent = agent
        self.directory = directory
        self.pid = pid
        self.sequence = sequence
        self.log = RunnerLog(agent.guest)
        self.log.follow(sequence)
        self.events_tail = Tail(agent, self.path("l"))
        self.out = Tail(agent, self.path("o.0"))
        self.err = Tail(agent, self.path("e.0"))
        self._closing: list[int] = []
        self._door: int | None = None
        self._bell: int | None = None
        self._armed = 0
        self._arming = asyncio.Lock()

    def path(self, name: str) -> str:
        return f"{self.directory}/{name}"

    def take_log(self, answer: Any) -> bool:
        """Take the answer to a request of ``events_tail``; true if something has happened."""
        data, _ = self.events_tail.look(answer)
        self.events_tail.advance(len(data))
        return self.log.feed(data)

    def drop(self) -> None:
        """We do not know what the agent answered last: read on by offset."""
        self.events_tail.drop()

    def forget(self) -> None:
        """The agent has forgotten its handles."""
        for tail in (self.events_tail, self.out, self.err):
            tail.forget()
        self._door = self._bell = None
        self._closing.clear()

    async def arm(self, after: int, closing: Sequence[int] = ()) -> None:
        """Let it make ready for the command after command ``after``; close handles that are not needed any more.

        Opening the file for that command empties it, so it must not happen when that command has been written already.
        """
        async with self._arming:
            agent = self.agent
            requests: list[Request[Any]] = [agent.close_request(handle) for handle in closing]
            if self._door is None and self.sequence == after:
                if self._bell is None:
                    self._bell = await agent.file_open(self.path("c"), "r+")
                elif self._armed != after:
                    requests += [agent.write_request(self._bell, b"n\n"), agent.flush_request(self._bell)]
                requests.append(agent.open_request(self.path("x"), "w"))
                *_, self._door = _succeed(await agent.batch(requests), besides=len(closing))
                self._armed = after
            elif requests:
                await agent.batch(requests)

    async def submit(self, text: str, *, numbered: int) -> CommandEvents:
        """Give it its next command, whose shell is ``text`` and whose number must be ``sequence + 1``."""
        agent = self.agent
        assert numbered == self.sequence + 1
        await self.arm(self.sequence)
        self.sequence += 1
        events = self.log.follow(self.sequence)
        assert self._door is not None
        assert self._bell is not None
        door, self._door = self._door, None
        word = f"{self.sequence}\n".encode()
        _succeed(
            await agent.batch(
                [
                    agent.write_request(door, text.encode()),
                    agent.close_request(door),
                    agent.write_request(self._bell, word),
                    agent.flush_request(self._bell),
                ]
            )
        )
        return events

    async def alive(self) -> bool:
        """Whether its process is there, by its directory: another process may have its pid by now."""
        try:
            handle = await self.agent.file_open(f"/proc/{self.pid}/cmdline")
            read = await self.agent.file_read(handle, 16 * KIB)
            await self.agent.file_close(handle)
        except AgentRefusedError:
            return False
        return self.directory.rpartition("mica-")[2].encode() in read.buf_b64

    async def signal(self, signal: int, command_pid: int, started_ticks: str) -> tuple[int, str]:
        """Signal the command and what descends from it: how many took it, and the command's start time in ticks."""
        arguments = [str(signal), str(self.pid), str(command_pid), started_ticks]
        output = await self._run(script.KILL, arguments)
        *pids, last = output.split("\n")[:-1]
        return len(pids), last.removeprefix("start").strip()

    def leave(self, handles: Sequence[int]) -> None:
        """Handles to close when it is retired."""
        self._closing += handles

    async def retire(self) -> None:
        """End it, its pumps, its directory. What its command left running keeps running."""
        closing = [h for tail in (self.events_tail, self.out, self.err) for h in tail.leftovers()]
        closing += [*self._closing, *(h for h in (self._door, self._bell) if h is not None)]
        self.forget()
        if closing:
            await self.agent.batch([self.agent.close_request(handle) for handle in closing])
        await self._run(script.RETIRE, [self.directory])
        try:
            await self.agent.exec_wait(self.pid, timeout_s=5.0)
        except AgentRefusedError:
            return  # the agent was restarted since and does not know it

    async def _run(self, text: str, arguments: Sequence[str]) -> str:
        pid = await self.agent.exec_raw("/bin/sh", ["-c", text, "mica", *arguments], env=[f"PATH={script.PATH}"])
        status = await self.agent.exec_wait(pid, timeout_s=30.0)
        return status.out_data.decode("utf-8", "replace")


def _succeed(answers: Sequence[Any], *, besides: int = 0) -> Sequence[Any]:
    """The answers, if none is a refusal; the first ``besides`` may be."""
    for answer in answers[besides:]:
        if isinstance(answer, AgentRefusedError):
            raise answer
    return answers


class Runners:
    """The runners of one guest. ``directories`` are where they may live in the guest, in order of preference."""

    def __init__(self, agent: GuestAgent, *, directories: Sequence[str] = DIRECTORIES, window: int = WINDOW) -> None:
        self.agent = agent
        self.window = window
        self._directories = tuple(directories)
        self._idle: list[Runner] = []
        self._mark = secrets.token_hex(4)
        self._orphans: set[str] = set()
        self._preparing: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.typical_s = 0.002

    def learn(self, seconds: float, looks: int) -> None:
        """A command was found ended by look number ``looks``, that long after its start.

        Looking earlier than quick commands usually end only takes the guest's time, so the first look comes just when
        about half of them have: later after a look too early, earlier after one that found the end at once.
        """
        if looks == 1:
            self.typical_s = max(self.typical_s * 0.9, MIN_TYPICAL_S)
        else:
            self.typical_s = min(self.typical_s + (seconds - self.typical_s) / 4, MAX_TYPICAL_S)

    async def prepare(self) -> None:
        """Have one waiting, so that the first command is as quick as the others."""
        if self._idle or self._preparing is not None:
            return
        preparing = self._preparing = asyncio.get_running_loop().create_future()
        try:
            runner = await self._start()
            if len(self._idle) < MAX_IDLE:
                self._idle.append(runner)
            else:  # commands that could not wait for it have left theirs
                self.background(self._retire(runner))
        finally:
            self._preparing = None
            preparing.set_result(None)

    async def acquire(self) -> Runner:
        """A runner that waits for a command. Raises ``agent-failed`` where the guest cannot have one."""
        if not self._idle and self._preparing is not None:
            await asyncio.shield(self._preparing)  # sooner than another one would be there
        return self._idle.pop() if self._idle else await self._start()

    def release(self, runner: Runner, *, reusable: bool, closing: Sequence[int]) -> None:
        """The command has ended. What is not ``reusable`` is ended in the background; ``closing`` are handles."""
        small = runner.out.offset + runner.err.offset < MAX_FIRST and runner.sequence < MAX_REUSE
        if reusable and small and len(self._idle) < MAX_IDLE:
            self._idle.append(runner)
            self.background(self._quietly(runner.arm(runner.sequence, closing)))
        else:
            runner.leave(closing)
            self.background(self._retire(runner))

    async def _quietly(self, work: Coroutine[Any, Any, None]) -> None:
        """What fails here fails again, and aloud, when the runner is given its next command."""
        try:
            await work
        except MicaError as error:
            _log.debug("runner not made ready", guest=self.agent.guest, error=str(error))

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Clean up off the critical path; awaited in :meth:`close`."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _retire(self, runner: Runner) -> None:
        await self._patiently(runner.retire, runner.directory)

    async def _patiently(self, end: Callable[[], Awaitable[None]], name: str) -> None:
        for pause in RETRY_S:
            try:
                await end()
            except MicaError as error:
                # What never succeeds is left to the next sweep; a guest that is gone has taken it along.
                _log.info("runner not ended", guest=self.agent.guest, runner=name, error=str(error))
                if not error.retryable:
                    return
                await asyncio.sleep(pause)  # a freeze or a pause of the guest, whose end nobody signals
            else:
                return

    def forget(self) -> None:
        """The agent or the guest was restarted: what waits there is left to the next sweep."""
        self._orphans |= {runner.directory for runner in self._idle}
        self._idle.clear()

    async def settle(self) -> None:
        """Wait until what was released is cleaned up."""
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def close(self) -> None:
        """End the clean-up under way. Runners stay in the guest; :meth:`sweep` of the next daemon ends them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def sweep(self, keep: Sequence[str]) -> int:
        """End the runners of former daemons, except those in the directories ``keep``; returns how many there were.

        Those of this one, which come and go meanwhile, are told by the mark in their names.
        """
        own = tuple(f"{directory}/mica-{self._mark}" for directory in self._directories)
        kept = " ".join([*keep, *(runner.directory for runner in self._idle)])
        arguments = ["-c", script.SWEEP, "mica", kept, *self._directories]
        pid = await self.agent.exec_raw("/bin/sh", arguments, env=[f"PATH={script.PATH}"])
        status = await self.agent.exec_wait(pid, timeout_s=30.0)
        count = 0
        for line in status.out_data.decode("utf-8", "replace").splitlines():
            number, _, directory = line.partition(" ")
            if directory.startswith(own) and directory not in self._orphans:
                continue
            self._orphans.discard(directory)
            if number.isdigit() and directory.startswith(tuple(f"{d}/mica-" for d in self._directories)):
                runner = Runner(self.agent, directory, int(number))
                await self._end_command(runner)
                await self._retire(runner)
                count += 1
        return count

    async def _end_command(self, runner: Runner) -> None:
        """An exec that no daemon remembers: nobody will ever read its output, so it must not run on."""
        if not await runner.alive() or not await open_tails(self.agent, [runner.events_tail]):
            return
        log = b""
        while data := runner.events_tail.look(await self.agent.call(runner.events_tail.request()))[0]:
            runner.events_tail.advance(len(data))
            log += data
        lines = [line.split(b" ") for line in log.split(b"\n") if line[:2] in (b"a ", b"s ", b"x ")]
        armed = [line for line in lines if line[0] == b"a" and line[-1].isdigit()]
        if armed and lines[-1][0] == b"s":
            await runner.signal(9, int(armed[-1][-1]), "")

    async def _start(self) -> Runner:
        agent = self.agent
        token = self._mark + secrets.token_hex(6)
        arguments = ["-c", script.RUNNER, f"mica-{token}", str(self.window), token, *self._directories]
        environment = [f"PATH={script.PATH}", "HOME=/root"]
        pid: int | None = None  # not known yet, though the guest may have been asked
        try:
            try:
                pid = await agent.exec_raw("setsid", ["/bin/sh", *arguments], env=environment, capture=False)
            except AgentRefusedError as refusal:
                if "Failed to execute" not in refusal.desc and "No such file" not in refusal.desc:
                    raise
                pid = await agent.exec_raw("/bin/sh", arguments, env=environment, capture=False)
            async with asyncio.timeout(START_TIMEOUT_S):
                runner = Runner(agent, await self._find(pid, token), pid)
                await self._wait_ready(runner)
        except TimeoutError:
            self._abandon(pid, token)
            raise MicaError(
                Code.TIMEOUT,
                f"the shell that runs commands in {agent.guest} did not start within {START_TIMEOUT_S:g} s",
                hint="the guest is overloaded: try again",
                retryable=True,
            ) from None
        except BaseException as error:
            if pid is not None or not isinstance(error, AgentRefusedError):  # else there is none
                self._abandon(pid, token)
            raise
        return runner

    async def _wait_ready(self, runner: Runner) -> None:
        if not await open_tails(self.agent, [runner.events_tail]):
            raise self._no_directory()
        pause = 0.001
        while runner.log.runner_pid is None:
            runner.take_log(await self.agent.call(runner.events_tail.request()))
            await asyncio.sleep(pause)  # the agent has no way to tell
            pause = min(pause * 1.5, 0.02)
        runner.pid = runner.log.runner_pid

    def _abandon(self, pid: int | None, token: str) -> None:
        """It may come up yet, and nobody waits for it any more. The agent does what it is asked in order."""

        async def end() -> None:
            arguments = ["-c", script.ABANDON, "mica", token, *self._directories]
            ending = await self.agent.exec_raw("/bin/sh", arguments, env=[f"PATH={script.PATH}"])
            await self.agent.exec_wait(ending, timeout_s=30.0)
            if pid is not None:
                with contextlib.suppress(AgentRefusedError):  # the agent was restarted since and does not know it
                    await self.agent.exec_wait(pid, timeout_s=5.0)

        self.background(self._patiently(end, token))

    async def _find(self, pid: int, token: str) -> str:
        """Ask until the log is there: the agent has no way to tell."""
        candidates = [f"{directory}/mica-{token}" for directory in self._directories]
        requests: list[Request[Any]] = [self.agent.open_request(f"{candidate}/l") for candidate in candidates]
        pause = 0.005
        while True:
            *opened, status = await self.agent.batch([*requests, self.agent.status_request(pid)])
            for candidate, handle in zip(candidates, opened, strict=True):
                if not isinstance(handle, AgentRefusedError):
                    await self.agent.file_close(handle)
                    return candidate
                if not handle.absent_file:
                    raise await self.agent.explain(handle) from handle
            if isinstance(status, AgentRefusedError):
                raise status
            if status.exited:
                raise self._no_directory()
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.05)

    def _no_directory(self) -> MicaError:
        return MicaError(
            Code.AGENT_FAILED,
            f"{self.agent.guest} has no place for Mica's files: tried {', '.join(self._directories)}",
            hint="a directory there must be writable for root and have free space, and mkdir and mkfifo must exist",
        )
