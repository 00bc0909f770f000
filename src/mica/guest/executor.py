"""The commands of one guest: start them, find them again after a daemon has died, clean up after them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from mica.guest import outcome
from mica.guest.agent import AgentRefusedError, GuestAgent
from mica.guest.exec import GuestExec, OnChange
from mica.guest.patience import Patience
from mica.guest.plain import PlainExec
from mica.guest.runner import DIRECTORIES, WINDOW, Runner, Runners
from mica.guest.spool import DEFAULT_LIMIT, Spool
from mica.model.errors import Code, MicaError
from mica.model.exec import ExecRecord, ExecSpec, ExecState, check_exec
from mica.model.units import Bytes

REDUCED = "no shell in the guest: output comes at the end, and is lost if the daemon dies"


class GuestExecutor:
    """Commands in the guest behind ``agent``. ``close`` it when the VM or the daemon ends.

    ``directories`` are where Mica may keep files in the guest (its own directory there is mode 0700), ``window`` how
    many segments of 1 MiB a stream may have unread there, ``max_output`` what is kept of one exec on the host unless
    its start says otherwise.
    """

    def __init__(
        self,
        agent: GuestAgent,
        *,
        directories: Sequence[str] = DIRECTORIES,
        window: int = WINDOW,
        max_output: Bytes = DEFAULT_LIMIT,
        patience: Patience | None = None,
    ) -> None:
        self.agent = agent
        self.runners = Runners(agent, directories=directories, window=window)
        self._max_output = max_output
        self._patience = patience or Patience()

    async def prepare(self) -> None:
        """Make the first command as quick as the others; worth doing when the agent has become ready."""
        await self.runners.prepare()

    def restarted(self) -> None:
        """Another agent answers now: what waited for commands cannot be reached any more."""
        self.runners.forget()

    async def start(
        self,
        spec: ExecSpec,
        *,
        exec_id: str,
        vm_id: str,
        spool_dir: Path,
        on_change: OnChange,
        max_output: Bytes | None = None,
    ) -> GuestExec | PlainExec:
        """Prepare a command; it starts when what is returned is ``run``, at once. ``spool_dir`` is the exec's own.

        The record is given to ``on_change`` before the guest hears of the command, so that a daemon that dies in
        between finds either nothing or the command. Raises ``invalid``, ``agent-unavailable``, ``agent-failed``.
        """
        check_exec(spec)
        record = ExecRecord(id=exec_id, vm_id=vm_id, spec=spec, started_at=time.time())
        try:
            runner = await self.runners.acquire()
        except AgentRefusedError as refusal:
            if not _no_shell(refusal):
                raise
            return await self._plain(record, spool_dir, on_change, refusal)
        spool = Spool(spool_dir, limit=max_output or self._max_output)
        execution = GuestExec(self.runners, runner, record, spool, on_change, patience=self._patience, resumed=False)
        try:
            await on_change(execution.record)
        except BaseException:
            spool.close()
            self.runners.release(runner, reusable=False, closing=())
            raise
        return execution

    def resume(self, record: ExecRecord, spool_dir: Path, on_change: OnChange) -> GuestExec | PlainExec:
        """Take over a command that a former daemon had started; ``run`` what is returned."""
        spool = Spool(spool_dir, limit=self._max_output)
        if record.reduced:
            return PlainExec(self.agent, record, spool, on_change)
        runner = Runner(self.agent, record.guest_dir, record.guest_pid, record.sequence)
        return GuestExec(self.runners, runner, record, spool, on_change, patience=self._patience, resumed=True)

    async def sweep(self, keep: Sequence[ExecRecord]) -> int:
        """End what former daemons left in the guest, except the execs in ``keep``; returns how many runners."""
        return await self.runners.sweep([r.guest_dir for r in keep if r.guest_dir and not r.state.final])

    async def close(self) -> None:
        """End the cleaning up. Commands go on in the guest."""
        await self.runners.close()

    async def _plain(
        self, record: ExecRecord, spool_dir: Path, on_change: OnChange, refusal: AgentRefusedError
    ) -> PlainExec:
        spec = record.spec
        if spec.user is not None or spec.cwd is not None or spec.stdin:
            raise MicaError(
                Code.AGENT_FAILED,
                f"{self.agent.guest} has no /bin/sh: a command there can have no user, directory or input of its own",
                hint="leave out --user, --cwd and --stdin",
            ) from refusal
        record = replace(record, reduced=REDUCED)
        environment = [f"{name}={value}" for name, value in spec.env.items()] or None
        await on_change(record)
        try:
            pid = await self.agent.exec_raw(spec.argv[0], spec.argv[1:], env=environment)
        except AgentRefusedError as error:
            await on_change(replace(outcome.failed(record, error), ended_at=time.time()))
            raise
        record = replace(record, guest_pid=pid, pid=pid, state=ExecState.RUNNING)
        await on_change(record)
        return PlainExec(self.agent, record, Spool(spool_dir, limit=self._max_output), on_change)


def _no_shell(refusal: AgentRefusedError) -> bool:
    return refusal.command == "guest-exec" and ("Failed to execute" in refusal.desc or "/bin/sh" in refusal.desc)
