"""Memory is promised only to VMs that run or are about to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mica.engine.definition import Env
from mica.model.transitions import LIVE

if TYPE_CHECKING:
    from mica.engine.engine import Engine


async def reconcile(env: Env, engine: Engine) -> str:
    given_back = []
    for vm_id in (await env.records.read_ledger()).value.reserved:
        status = await env.records.statuses.get(vm_id)
        live = status is not None and status.value.observed.state in LIVE
        if not live and not engine.waiting(vm_id):
            await env.records.release(vm_id)
            given_back.append(vm_id[:8])
    return f"took back the memory of {', '.join(given_back)}" if given_back else ""
