"""Gives a copied machine an identity of its own, over the guest agent."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Sequence

import structlog

from mica.guest import first_program, identity_scripts
from mica.guest.agent import GuestAgent
from mica.guest.guests import AgentGuests
from mica.guest.replies import ExecStatus
from mica.guest.script import PATH
from mica.model.errors import Code, MicaError
from mica.model.identity import FIRST, REST, Identity, IdentityItem, Report, Trait, undone
from mica.model.units import KIB
from mica.model.vm import VmRuntime

FIRST_TIMEOUT_S = 15.0
MAX_REPLY = 64 * KIB
MAX_WHY = 200

# Quick looks take the time of the guest that one waits for.
_QUICK = (0.004, 0.02)
_SLOW = (0.02, 0.5)
_SPARE_S = 10.0

_log = structlog.get_logger()

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
    """Implements :class:`mica.ports.identity.Identities`; ``now`` is Unix time in seconds."""

    def __init__(
        self, guests: AgentGuests, *, now: Callable[[], float] = time.time, first_timeout_s: float = FIRST_TIMEOUT_S
    ) -> None:
        self._guests = guests
        self._now = now
        self._first_timeout_s = first_timeout_s

    def _agent(self, vm_id: str, runtime: VmRuntime) -> GuestAgent:
        return self._guests.agent(vm_id, f"VM {vm_id[:8]}", runtime)

    # ── before anything else ──────────────────────────────────────────────────────────────────────────────────────

    async def first(self, vm_id: str, runtime: VmRuntime, identity: Identity) -> Report:
        if not runtime.spec.agent:
            return undone(FIRST, "the VM has no agent port")
        try:
            async with asyncio.timeout(self._first_timeout_s):
                return await self._first(self._agent(vm_id, runtime), identity)
        except TimeoutError:
            why = f"the guest did not answer within {self._first_timeout_s:g} s"
        except MicaError as error:
            why = error.message
        _log.warning("a copied guest did not become another one", vm=vm_id, error=why)
        return undone(FIRST, why)

    async def _first(self, agent: GuestAgent, identity: Identity) -> Report:
        await agent.wait_ready(self._first_timeout_s)
        script = identity_scripts.first(identity.macs, secrets.token_hex(8))
        try:
            status = await self._feed(agent, identity, script)
        except MicaError as error:
            if error.details.get("frozen"):  # copied in the middle of a snapshot that had quiesced it
                await agent.fsthaw()
                status = await self._feed(agent, identity, script)
            elif error.code is Code.AGENT_FAILED:
                return await self._without_exec(agent, error.message)
            else:
                raise
        codes = first_program.results(status.out_data, len(identity.macs))
        if codes is not None:
            return _judge(identity, [os.strerror(code) if code else "" for code in codes])
        status = await self._feed(agent, identity, identity_scripts.fallback(identity.macs, self._now()))
        codes = identity_scripts.fallback_results(status.out_data, len(identity.macs))
        if codes is not None:
            return _judge(identity, ["no program in the guest can do it" if code else "" for code in codes])
        said = _last_line(status.err_data) or f"exit status {status.exitcode}"
        return undone(FIRST, f"the guest could not run what Mica gave it ({said})")

    async def _feed(self, agent: GuestAgent, identity: Identity, script: str) -> ExecStatus:
        """The agent may write the words of a command into the guest's log, so the seed is not among them."""
        seed = secrets.token_bytes(first_program.SEED_SIZE)
        stdin = first_program.standard_input(seed, self._now(), list(identity.macs.values()))
        return await _execute(agent, ["-c", script], stdin, self._first_timeout_s, _QUICK)

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


def _judge(identity: Identity, reasons: list[str]) -> Report:
    """``reasons``: why not, or empty, for the generator, the clock and each NIC."""
    random, clock, *macs = reasons
    wrong = [f"{new}: {why}" for new, why in zip(identity.macs.values(), macs, strict=True) if why]
    return (
        IdentityItem(Trait.RANDOM, not random, random),
        IdentityItem(Trait.CLOCK, not clock, clock),
        IdentityItem(Trait.MAC, not wrong, "; ".join(wrong)[:MAX_WHY]),
    )
