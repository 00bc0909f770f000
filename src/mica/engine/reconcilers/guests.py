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

# Facts are asked for again every so many rounds; a guest whose address is not known yet is asked every round.
EVERY = 15


async def reconcile(env: Env, engine: Engine) -> str:
    engine.round += 1
    for vm_id in engine.live():
        row = await env.records.statuses.get(vm_id)
        if row is None or row.value.runtime is None:
            continue
        seen = row.value.observed
        if seen.state is not VmState.RUNNING or seen.agent is not AgentState.READY or engine.waiting(vm_id):
            continue
        # Spread over the rounds, so that many VMs are not asked all at once.
        due = (engine.round + hash(vm_id)) % EVERY == 0
        if not due and seen.os and (seen.addresses or not row.value.runtime.nics):
            continue
        try:
            facts = await env.guests.facts(vm_id, row.value.runtime)
        except MicaError:
            continue  # the agent's state is seen and shown already; the next round asks again
        await env.records.statuses.update(vm_id, lambda s, facts=facts: _with(s, facts), durable=False)  # type: ignore[misc]
    return ""


def _with(status: VmStatus, facts: GuestFacts) -> VmStatus:
    if status.observed.state is not VmState.RUNNING:
        return status
    return replace(
        status,
        observed=replace(status.observed, hostname=facts.hostname, os=facts.os, addresses=facts.addresses),
    )
