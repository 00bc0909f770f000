"""What guests say of themselves (name, system, addresses), asked when the agent is there and again now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mica.engine.definition import Env
from mica.model.errors import MicaError
from mica.model.vm import AgentState, VmState, VmStatus
from mica.ports.guests import GuestFacts

if TYPE_CHECKING:
    from mica.engine.engine import Engine

replace = msgspec.structs.replace

# A guest of which all is known is asked again after so long, when it was asked last by this daemon; one whose address
# is not known yet is asked every round. Seconds.
AGAIN_S = 30.0


class AskGuests:
    """One for each engine. Remembers only when it asked: a daemon that forgets that asks once more."""

    def __init__(self, env: Env, engine: Engine) -> None:
        self._env = env
        self._engine = engine
        self._asked: dict[str, float] = {}

    async def reconcile(self) -> str:
        live = self._engine.live()
        for gone in self._asked.keys() - live:
            del self._asked[gone]
        for vm_id in live:
            row = await self._env.records.statuses.get(vm_id)
            if row is not None and self._is_due(vm_id, row.value):
                await self._ask(vm_id, row.value)
        return ""

    def _is_due(self, vm_id: str, status: VmStatus) -> bool:
        seen, runtime = status.observed, status.runtime
        if seen.state is not VmState.RUNNING or seen.agent is not AgentState.READY or runtime is None:
            return False
        if self._engine.waiting(vm_id):
            return False
        known = seen.os and (seen.addresses or not runtime.nics)
        return not known or self._asked.get(vm_id, -AGAIN_S) + AGAIN_S <= self._env.clock.monotonic()

    async def _ask(self, vm_id: str, status: VmStatus) -> None:
        assert status.runtime is not None
        self._asked[vm_id] = self._env.clock.monotonic()
        try:
            facts = await self._env.guests.facts(vm_id, status.runtime)
        except MicaError:
            return  # the agent's state is seen and shown already, and it is asked again
        await self._env.records.statuses.update(vm_id, lambda s: _with(s, facts), durable=False)


def _with(status: VmStatus, facts: GuestFacts) -> VmStatus:
    if status.observed.state is not VmState.RUNNING:
        return status
    return replace(
        status,
        observed=replace(status.observed, hostname=facts.hostname, os=facts.os, addresses=facts.addresses),
    )
