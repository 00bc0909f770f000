"""Guests whose file systems may still be frozen, though the snapshot that wanted that is over, are asked to thaw."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mica.engine.definition import Env
from mica.engine.operations.quiescing import let_go
from mica.model.vm import VmState

if TYPE_CHECKING:
    from mica.engine.engine import Engine


async def reconcile(env: Env, engine: Engine) -> str:
    owed = []
    for vm_id, row in (await env.records.statuses.scan()).items():
        under_way = {operation.id for operation in engine.waiting(vm_id)}
        if row.value.frozen and row.value.frozen not in under_way and row.value.observed.state is VmState.RUNNING:
            owed.append(vm_id)
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(let_go(env, vm_id)) for vm_id in owed]
    thawed = sum(task.result() for task in asked)
    return f"thawed the file systems of {thawed} guests" if thawed else ""
