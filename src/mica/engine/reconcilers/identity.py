"""Copied machines become wholly themselves while they are in use already: host name, keys, address, and the rest."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from mica.engine.definition import Env
from mica.model.identity import Identity
from mica.model.vm import AgentState, VmRuntime, VmState

if TYPE_CHECKING:
    from mica.engine.engine import Engine

replace = msgspec.structs.replace

# Guests that are changed at the same time: each takes a processor of its own for a moment.
AT_ONCE = 4


async def reconcile(env: Env, engine: Engine) -> str:
    gate = asyncio.Semaphore(AT_ONCE)

    async def change(vm_id: str, runtime: VmRuntime, who: Identity) -> None:
        async with gate:
            report = await env.identities.rest(vm_id, runtime, who)
        await env.records.statuses.update(
            vm_id, lambda s: replace(s, identity=(*s.identity, *report), becoming=None) if s.becoming == who else s
        )

    async with asyncio.TaskGroup() as group:
        for vm_id in engine.live():
            row = await env.records.statuses.get(vm_id)
            if row is None or row.value.becoming is None or row.value.runtime is None or engine.waiting(vm_id):
                continue
            seen = row.value.observed
            if seen.state is VmState.RUNNING and (seen.agent is AgentState.READY or not row.value.runtime.spec.agent):
                group.create_task(change(vm_id, row.value.runtime, row.value.becoming))
    return ""
