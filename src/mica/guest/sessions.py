"""The commands in all guests of one daemon: started, followed, found again after a daemon died, forgotten in time."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from mica.guest import outcome
from mica.guest.exec import GuestExec
from mica.guest.executor import GuestExecutor
from mica.guest.guests import AgentGuests
from mica.guest.plain import PlainExec
from mica.guest.runner import DIRECTORIES
from mica.guest.spool import Spool, Stream
from mica.model.errors import Code, MicaError, not_found
from mica.model.exec import ExecRecord, ExecSpec
from mica.model.units import Bytes
from mica.model.vm import VmRuntime
from mica.ports.clock import Clock
from mica.ports.execs import ExecRecords

log = structlog.get_logger()

# Ended commands, and their output, are kept for each VM: so many, the newest. Older ones are removed several at a time,
# because whoever starts a command waits for it.
KEPT = 50
REMOVED_TOGETHER = 10
# In the environment of commands that carry a copy: without the client that feeds it, a copy is ended, not taken over.
COPY_MARK = "MICA_COPY"
VM_ENDED = "the VM ended while the command ran"
# A guest whose agent takes longer to answer is made ready when somebody starts a command there.
READY_TIMEOUT_S = 60.0


@dataclass
class _Active:
    execution: GuestExec | PlainExec
    task: asyncio.Task[ExecRecord]


class ExecSessions:
    """Use within :meth:`running`. ``spool_dir`` holds the output of commands, ``DIR/<vm>/<exec>/``.

    ``directories`` are where Mica may keep files in guests.
    """

    def __init__(
        self,
        guests: AgentGuests,
        records: ExecRecords,
        spool_dir: Path,
        clock: Clock,
        *,
        directories: Sequence[str] = DIRECTORIES,
    ) -> None:
        self._directories = directories
        self._guests = guests
        self._records = records
        self._spool_dir = spool_dir
        self._clock = clock
        self._known: dict[str, ExecRecord] = {}
        self._active: dict[str, _Active] = {}
        self._executors: dict[str, GuestExecutor] = {}
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._unprepared: set[str] = set()
        # One guest after the other: nobody waits for it, and it takes processor time from those somebody waits for.
        self._one_by_one = asyncio.Lock()
        self._group: asyncio.TaskGroup | None = None
        guests.on_open(self._agent_started)
        guests.on_forget(self._vm_ended)
        guests.on_erase(self._vm_erased)

    @asynccontextmanager
    async def running(self, live: dict[str, tuple[str, VmRuntime]]) -> AsyncIterator[ExecSessions]:
        """Take over what earlier daemons started in the VMs of ``live`` (id → name and runtime), then serve."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                await self._recover(live)
                for vm_id, runtime in self._guests.open_ports().items():
                    self._agent_started(vm_id, runtime)
                yield self
            finally:
                self._group = None
                for task in self._preparing.values():
                    task.cancel()
                for active in self._active.values():
                    active.task.cancel()
                for executor in self._executors.values():
                    await executor.close()

    async def _recover(self, live: dict[str, tuple[str, VmRuntime]]) -> None:
        for record in await self._records.all():
            self._known[record.id] = record
            if record.state.final:
                continue
            if record.vm_id in live:
                name, runtime = live[record.vm_id]
                executor = self._executor(record.vm_id, name, runtime)
                execution = executor.resume(record, self._directory(record), self._save)
                self._follow(execution)
                if COPY_MARK in record.spec.env:
                    await execution.stop()
            else:
                ended = outcome.lost(record, VM_ENDED)
                await self._save(msgspec.structs.replace(ended, ended_at=self._clock.now()))

    def _executor(self, vm_id: str, name: str, runtime: VmRuntime) -> GuestExecutor:
        agent = self._guests.agent(vm_id, name, runtime)
        known = self._executors.get(vm_id)
        if known is None:
            known = self._executors[vm_id] = GuestExecutor(agent, directories=self._directories)
        return known

    def _agent_started(self, vm_id: str, runtime: VmRuntime) -> None:
        if self._group is not None:
            executor = self._executor(vm_id, "", runtime)
            executor.restarted()
            self._prepare_soon(vm_id, executor)

    def _prepare_soon(self, vm_id: str, executor: GuestExecutor) -> None:
        """Make a guest ready for commands, in the background."""
        assert self._group is not None
        if vm_id in self._preparing:
            self._preparing.pop(vm_id).cancel()
        self._unprepared.discard(vm_id)
        task = self._group.create_task(self._prepare(vm_id, executor), name=f"prepare {vm_id}")
        self._preparing[vm_id] = task

    async def _prepare(self, vm_id: str, executor: GuestExecutor) -> None:
        """One runner waits for the first command; those of former daemons that no command needs are ended."""
        try:
            await executor.agent.wait_ready(READY_TIMEOUT_S)
            async with self._one_by_one:
                await executor.prepare()
                swept = await executor.sweep([r for r in self._known.values() if r.vm_id == vm_id])
                if swept:
                    log.info("ended what former daemons left in a guest", vm=vm_id, runners=swept)
        except MicaError as error:
            # A guest that cannot do it says so to whoever starts a command there.
            log.info("a guest is not ready for commands", vm=vm_id, error=error.message)
            if error.retryable:
                self._unprepared.add(vm_id)
        except Exception:  # the root of this task: one guest must not take the others along
            log.exception("a guest was not made ready for commands", vm=vm_id)
        finally:
            if self._preparing.get(vm_id) is asyncio.current_task():
                del self._preparing[vm_id]

    def _directory(self, record: ExecRecord) -> Path:
        return self._spool_dir / record.vm_id / record.id

    async def _save(self, record: ExecRecord) -> None:
        self._known[record.id] = record
        await self._records.save(record)

    def _follow(self, execution: GuestExec | PlainExec) -> None:
        assert self._group is not None
        exec_id = execution.record.id
        task = self._group.create_task(self._run(execution), name=f"exec {exec_id}")
        self._active[exec_id] = _Active(execution, task)

    async def _run(self, execution: GuestExec | PlainExec) -> ExecRecord:
        try:
            return await execution.run()
        except MicaError as error:
            log.warning("a command in a guest was given up", exec=execution.record.id, error=error.message)
            await self._save(
                msgspec.structs.replace(outcome.failed(execution.record, error), ended_at=self._clock.now())
            )
        except Exception as error:  # the root of this task: one command must not take the others along
            log.exception("a command in a guest was given up", exec=execution.record.id)
            fault = MicaError(Code.INTERNAL, f"a fault in Mica ({type(error).__name__})", hint="`mica daemon log`")
            await self._save(
                msgspec.structs.replace(outcome.failed(execution.record, fault), ended_at=self._clock.now())
            )
        finally:
            if self._known[execution.record.id].state.final:
                del self._active[execution.record.id]
        return self._known[execution.record.id]

    # ── what the API does ─────────────────────────────────────────────────────────────────────────────────────────

    async def start(
        self, vm_id: str, name: str, runtime: VmRuntime, spec: ExecSpec, *, max_output: Bytes | None = None
    ) -> ExecRecord:
        """Start a command. Raises ``invalid``, ``agent-unavailable``, ``agent-failed``.

        ``max_output`` bounds what is kept of its output on the host; beyond that it is ended with ``too-large``.
        """
        exec_id = str(uuid.uuid4())
        execution = await self._executor(vm_id, name, runtime).start(
            spec,
            exec_id=exec_id,
            vm_id=vm_id,
            spool_dir=self._spool_dir / vm_id / exec_id,
            on_change=self._save,
            max_output=max_output,
        )
        self._follow(execution)
        if vm_id in self._unprepared:
            self._prepare_soon(vm_id, self._executor(vm_id, name, runtime))
        await self._prune(vm_id)
        return execution.record

    def of(self, vm_id: str) -> list[ExecRecord]:
        """Newest first."""
        mine = [r for r in self._known.values() if r.vm_id == vm_id]
        return sorted(mine, key=lambda r: -r.started_at)

    def get(self, vm_id: str, exec_id: str) -> ExecRecord:
        record = self._known.get(exec_id)
        if record is None or record.vm_id != vm_id:
            raise not_found("command", exec_id, hint=f"the newest {KEPT} of a VM are kept")
        return record

    async def wait(self, vm_id: str, exec_id: str) -> ExecRecord:
        """The record once the command has ended."""
        self.get(vm_id, exec_id)
        active = self._active.get(exec_id)
        if active is not None:
            await asyncio.wait({active.task})
        return self.get(vm_id, exec_id)

    def follow(self, vm_id: str, exec_id: str, stream: str, offset: int) -> AsyncIterator[bytes]:
        """Output from ``offset`` on, ending with the command."""
        record = self.get(vm_id, exec_id)
        active = self._active.get(exec_id)
        if active is not None:
            return active.execution.follow(Stream(stream), offset)
        return Spool(self._directory(record), finished=True).follow(Stream(stream), offset)

    async def stdin(self, vm_id: str, exec_id: str, data: bytes | None) -> None:
        execution = self._running(vm_id, exec_id)
        if data is None:
            await execution.close_stdin()
        else:
            await execution.write_stdin(data)

    async def discard(self, vm_id: str, exec_id: str) -> None:
        """End a command if it still runs, and forget it and its output."""
        active = self._active.get(exec_id)
        if active is not None:
            await active.execution.stop()
            await asyncio.wait({active.task}, timeout=30.0)
        await self._forget([self.get(vm_id, exec_id)])

    async def kill(self, vm_id: str, exec_id: str, signal: int) -> None:
        await self._running(vm_id, exec_id).kill(signal)

    def _running(self, vm_id: str, exec_id: str) -> GuestExec | PlainExec:
        self.get(vm_id, exec_id)
        active = self._active.get(exec_id)
        if active is None:
            raise MicaError(Code.STATE_CONFLICT, f"the command {exec_id[:8]} has ended", hint="start another one")
        return active.execution

    # ── forgetting ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _vm_ended(self, vm_id: str) -> None:
        mine = [a for a in self._active.values() if a.execution.record.vm_id == vm_id]
        for active in mine:
            active.execution.lose(VM_ENDED)
        if mine:
            await asyncio.wait({active.task for active in mine}, timeout=10.0)
        self._unprepared.discard(vm_id)
        if vm_id in self._preparing:
            self._preparing.pop(vm_id).cancel()
        executor = self._executors.pop(vm_id, None)
        if executor is not None:
            await executor.close()

    async def _vm_erased(self, vm_id: str) -> None:
        await self._forget([r for r in self._known.values() if r.vm_id == vm_id])
        directory = self._spool_dir / vm_id
        if directory.exists():
            await asyncio.to_thread(shutil.rmtree, directory)

    async def _prune(self, vm_id: str) -> None:
        older = [r for r in self.of(vm_id)[KEPT:] if r.state.final]
        if len(older) >= REMOVED_TOGETHER:
            await self._forget(older)

    async def _forget(self, records: list[ExecRecord]) -> None:
        if not records:
            return
        await self._records.remove([r.id for r in records])
        for record in records:
            self._known.pop(record.id, None)
            directory = self._directory(record)
            if directory.exists():
                await asyncio.to_thread(shutil.rmtree, directory)
