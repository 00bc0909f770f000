"""Gives a copied machine an identity of its own, over the guest agent."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
import structlog

from mica.guest import first_program, identity_scripts
from mica.guest.agent import AgentRefusedError, GuestAgent
from mica.guest.guests import AgentGuests
from mica.guest.replies import ExecStatus
from mica.guest.script import PATH
from mica.model.errors import Code, MicaError
from mica.model.identity import FIRST, REST, Identity, IdentityItem, Report, Trait, undone
from mica.model.units import KIB
from mica.model.vm import VmRuntime

FIRST_TIMEOUT_S = 15.0
SETTLE_S = 2.0
ROOM = "/run/mica.identity"
MAX_REPLY = 64 * KIB
MAX_WHY = 200

# Quick looks take the time of the guest that one waits for.
_QUICK = (0.004, 0.02)
_SLOW = (0.02, 0.5)
_ASKED_PAUSE_S = 0.003
_SPARE_S = 10.0
_WAITING_TIMEOUT_S = 1.0
_ANSWERS = 100 * first_program.ANSWER_SIZE
_PREPARE_TIMEOUT_S = 5.0

_log = structlog.get_logger()


class _Waiting(msgspec.Struct, frozen=True):
    """The agent's handles of what the program that waits in a guest reads from and writes to."""

    orders: int
    answers: int


UNREACHABLE: Report = (
    IdentityItem(
        Trait.PROGRAMS, False, "programs that had seeded random generators of their own go on with the same numbers"
    ),
    IdentityItem(
        Trait.FIRMWARE, False, "the UUID that the firmware tells stays the original's until the guest is restarted"
    ),
)
"""What no one can change while the guest runs."""


class AgentIdentities:
    """Implements :class:`mica.ports.identity.Identities`.

    ``now`` is Unix time in seconds, ``room`` the directory in guests where a program waits to be copied, ``settle_s``
    how long after their agents have come up guests are prepared: whoever waited for them is not held up.
    """

    def __init__(
        self,
        guests: AgentGuests,
        *,
        now: Callable[[], float] = time.time,
        first_timeout_s: float = FIRST_TIMEOUT_S,
        room: str = ROOM,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._settle_s = settle_s
        self._room = room
        self._guests = guests
        self._now = now
        self._first_timeout_s = first_timeout_s
        self._group: asyncio.TaskGroup | None = None
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._waiting: dict[str, _Waiting] = {}
        guests.on_open(self._opened)
        guests.on_forget(self._forget)

    def _agent(self, vm_id: str, runtime: VmRuntime) -> GuestAgent:
        return self._guests.agent(vm_id, "", runtime)

    # ── before there is a copy ────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def running(self) -> AsyncIterator[AgentIdentities]:
        """Within it, guests are prepared some time after their agents have come up, in the background."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                for vm_id, runtime in self._guests.open_ports().items():
                    self._opened(vm_id, runtime)
                yield self
            finally:
                self._group = None
                for task in self._preparing.values():
                    task.cancel()

    def _opened(self, vm_id: str, runtime: VmRuntime) -> None:
        self._waiting.pop(vm_id, None)
        if self._group is not None:
            if vm_id in self._preparing:
                self._preparing.pop(vm_id).cancel()
            self._preparing[vm_id] = self._group.create_task(self._prepare_later(vm_id, runtime), name=f"copy {vm_id}")

    async def _forget(self, vm_id: str) -> None:
        self._waiting.pop(vm_id, None)
        if vm_id in self._preparing:
            self._preparing.pop(vm_id).cancel()

    async def _prepare_later(self, vm_id: str, runtime: VmRuntime) -> None:
        await asyncio.sleep(self._settle_s)
        try:
            await self.prepare(vm_id, runtime)
        except Exception:  # noqa: BLE001 - the root of this task: one guest must not take the others along
            _log.exception("a guest was not prepared to be copied", vm=vm_id)
        finally:
            if self._preparing.get(vm_id) is asyncio.current_task():
                del self._preparing[vm_id]

    async def prepare(self, vm_id: str, runtime: VmRuntime) -> bool:
        if vm_id in self._waiting or not runtime.spec.agent:
            return vm_id in self._waiting
        agent = self._agent(vm_id, runtime)
        script = identity_scripts.prepare(self._room, secrets.token_hex(4))
        try:
            async with asyncio.timeout(_PREPARE_TIMEOUT_S):
                status = await _execute(agent, ["-c", script], None, _PREPARE_TIMEOUT_S, _QUICK)
                waiting = await self._open(agent) if status.exitcode == 0 else None
        except (MicaError, TimeoutError) as error:  # its copies take the longer way
            _log.info("a guest is not prepared to be copied", vm=vm_id, error=str(error))
            return False
        if waiting is not None:
            self._waiting[vm_id] = waiting
        return waiting is not None

    async def _open(self, agent: GuestAgent) -> _Waiting | None:
        """A FIFO that nobody reads from is refused."""
        requests = [agent.open_request(f"{self._room}/in", "w"), agent.open_request(f"{self._room}/out", "r")]
        opened = await agent.batch(requests)
        handles = [handle for handle in opened if not isinstance(handle, AgentRefusedError)]
        if len(handles) == len(opened):
            return _Waiting(*handles)
        if handles:
            await agent.batch([agent.close_request(handle) for handle in handles])
        return None

    # ── before anything else ──────────────────────────────────────────────────────────────────────────────────────

    async def first(self, vm_id: str, runtime: VmRuntime, identity: Identity) -> Report:
        if not runtime.spec.agent:
            return undone(FIRST, "the VM has no agent port")
        try:
            async with asyncio.timeout(self._first_timeout_s):
                return await self._first(vm_id, self._agent(vm_id, runtime), identity)
        except TimeoutError:
            why = f"the guest did not answer within {self._first_timeout_s:g} s"
        except MicaError as error:
            why = error.message
        _log.warning("a copied guest did not become another one", vm=vm_id, error=why)
        return undone(FIRST, why)

    async def _first(self, vm_id: str, agent: GuestAgent, identity: Identity) -> Report:
        await agent.wait_ready(self._first_timeout_s)
        codes = await self._ask_waiting(vm_id, agent, identity)
        try:
            if codes is None:
                codes = await self._start(agent, identity)
            if codes is None or first_program.NOT_FOUND in codes[2:]:
                codes = await self._fall_back(agent, identity, codes)
        except MicaError as error:
            if error.code is not Code.AGENT_FAILED:
                raise
            return await self._without_exec(agent, error.message)
        return _judge(identity, codes)

    async def _ask_waiting(self, vm_id: str, agent: GuestAgent, identity: Identity) -> list[int] | None:
        """The agent of a copy has its original's handles, so what was opened there need not be opened here.

        They are refused where the original was copied before it was prepared, or its agent was restarted since: an
        agent never gives a number twice.
        """
        waiting = self._waiting.get(vm_id) or self._waiting.get(identity.parent_id)
        codes = await self._ask(agent, waiting, identity) if waiting is not None else None
        if codes is None:
            waiting = await self._open(agent)
            codes = await self._ask(agent, waiting, identity) if waiting is not None else None
        if codes and waiting is not None:
            self._waiting[vm_id] = waiting
        else:  # a guest that went back may give such a number to another file yet
            self._waiting.pop(vm_id, None)
        return codes or None

    def _order(self, mark: bytes, identity: Identity) -> bytes:
        return first_program.order(mark, secrets.token_bytes(first_program.SEED_SIZE), self._now(), identity.macs)

    async def _ask(self, agent: GuestAgent, waiting: _Waiting, identity: Identity) -> list[int] | None:
        """By the program that waits there: no process is started.

        ``None``: these handles are refused; empty: it did not answer.
        """
        mark = secrets.token_bytes(first_program.MARK_SIZE)
        write = agent.write_request(waiting.orders, self._order(mark, identity))
        read = agent.read_request(waiting.answers, _ANSWERS)
        *written, answer = await agent.batch([write, agent.flush_request(waiting.orders), read])
        said = b""
        deadline = asyncio.get_running_loop().time() + _WAITING_TIMEOUT_S
        pause = _ASKED_PAUSE_S
        while not any(isinstance(reply, AgentRefusedError) for reply in (*written, answer)):
            said += agent.check_read(answer, _ANSWERS).buf_b64
            codes = first_program.results(said, mark, len(identity.macs))
            if codes is not None:
                return codes
            if len(said) >= _ANSWERS or asyncio.get_running_loop().time() > deadline:
                return []
            await asyncio.sleep(pause)  # the agent has no way to tell
            pause = min(pause * 1.2, _QUICK[1])
            (answer,) = await agent.batch([read])
        return None

    async def _start(self, agent: GuestAgent, identity: Identity) -> list[int] | None:
        script = identity_scripts.first(secrets.token_hex(8))
        mark = secrets.token_bytes(first_program.MARK_SIZE)
        try:
            status = await self._feed(agent, mark, identity, script)
        except MicaError as error:
            if not error.details.get("frozen"):
                raise
            await agent.fsthaw()  # copied in the middle of a snapshot that had quiesced it
            status = await self._feed(agent, mark, identity, script)
        return first_program.results(status.out_data, mark, len(identity.macs))

    async def _fall_back(self, agent: GuestAgent, identity: Identity, codes: list[int] | None) -> list[int]:
        """By what the guest has: all of it, or NICs that the program did not find."""
        script = identity_scripts.fallback(identity.macs, self._now())
        status = await self._feed(agent, bytes(first_program.MARK_SIZE), identity, script)
        others = identity_scripts.fallback_results(status.out_data, len(identity.macs))
        if others is None and codes is None:
            said = _last_line(status.err_data) or f"exit status {status.exitcode}"
            raise MicaError(Code.AGENT_FAILED, f"the guest could not run what Mica gave it ({said})")
        others = [0 if code == 0 else first_program.NOT_FOUND for code in others or ()]
        if codes is None or not others:
            return codes or others
        return [other if code == first_program.NOT_FOUND else code for code, other in zip(codes, others, strict=True)]

    async def _feed(self, agent: GuestAgent, mark: bytes, identity: Identity, script: str) -> ExecStatus:
        """The agent may write the words of a command into the guest's log, so the seed is not among them."""
        return await _execute(agent, ["-c", script], self._order(mark, identity), self._first_timeout_s, _QUICK)

    async def _without_exec(self, agent: GuestAgent, why: str) -> Report:
        """A guest that forbids commands may let its clock be set."""
        try:
            await agent.set_time(self._now())
        except MicaError as error:
            _log.info("the clock of a copied guest was not set", guest=agent.guest, error=error.message)
            return undone(FIRST, why)
        return tuple(IdentityItem(Trait.CLOCK, True) if i.what is Trait.CLOCK else i for i in undone(FIRST, why))

    # ── afterwards ────────────────────────────────────────────────────────────────────────────────────────────────

    async def rest(self, vm_id: str, runtime: VmRuntime, identity: Identity) -> Report:
        if not runtime.spec.agent:
            return (*undone(REST, "the VM has no agent port"), *UNREACHABLE)
        agent = self._agent(vm_id, runtime)
        items: list[IdentityItem] = []
        for step in identity_scripts.rest(identity):
            try:
                items.append(await self._step(agent, step))
            except MicaError as error:
                items.append(IdentityItem(step.what, False, error.message))
                if error.code is Code.AGENT_UNAVAILABLE:
                    items += undone(REST[len(items) :], error.message)
                    break
        for item in items:
            if not item.done:
                _log.warning("a copied guest kept something", vm=vm_id, what=str(item.what), why=item.why)
        return (*items, *UNREACHABLE)

    async def _step(self, agent: GuestAgent, step: identity_scripts.Step) -> IdentityItem:
        words = ["-c", identity_scripts.bounded(step), "mica", *step.arguments]
        status = await _execute(agent, words, None, step.timeout_s + _SPARE_S, _SLOW)
        if status.exitcode == 0:
            return IdentityItem(step.what, True, _last_line(status.out_data))
        why = _last_line(status.out_data) or _last_line(status.err_data)
        if status.exitcode in identity_scripts.TIMED_OUT or status.signal is not None:
            why = f"it did not end within {step.timeout_s:g} s" + (f" ({why})" if why else "")
        return IdentityItem(step.what, False, why or f"it failed with exit status {status.exitcode}")


async def _execute(
    agent: GuestAgent, words: Sequence[str], stdin: bytes | None, timeout_s: float, pauses: tuple[float, float]
) -> ExecStatus:
    """Run /bin/sh with ``words``. ``pauses`` are the first and the longest between two looks, in seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    pid = await agent.exec_raw("/bin/sh", words, env=[f"PATH={PATH}", "LC_ALL=C", "HOME=/root"], stdin=stdin)
    pause, longest = pauses
    while True:
        await asyncio.sleep(pause)  # the agent has no way to tell
        status = await agent.call(agent.status_request(pid, limit=MAX_REPLY))
        if status.exited:
            return status
        if loop.time() > deadline:
            raise MicaError(Code.TIMEOUT, f"process {pid} in {agent.guest} did not end within {timeout_s:g} s")
        pause = min(pause * 1.5, longest)


def _last_line(output: bytes) -> str:
    """What a script said last, fit to be shown: bounded, and without control characters."""
    lines = [line for line in output[-4096:].decode("utf-8", "replace").splitlines() if line.strip()]
    return "".join(c for c in lines[-1] if c.isprintable()).strip()[:MAX_WHY] if lines else ""


def _judge(identity: Identity, codes: list[int]) -> Report:
    """``codes``: 0, an errno, or ``NOT_FOUND``, for the generator, the clock and each NIC."""
    random, clock = ("" if code == 0 else _reason(code, "no program there can do it") for code in codes[:2])
    pairs = zip(identity.macs.items(), codes[2:], strict=True)
    wrong = [f"{new}: {_reason(code, f'no NIC that can be changed has {old}')}" for (old, new), code in pairs if code]
    return (
        IdentityItem(Trait.RANDOM, not random, random),
        IdentityItem(Trait.CLOCK, not clock, clock),
        IdentityItem(Trait.MAC, not wrong, "; ".join(wrong)[:MAX_WHY]),
    )


def _reason(code: int, not_found: str) -> str:
    return not_found if code == first_program.NOT_FOUND else os.strerror(code)
