"""Ended operations, idempotency keys and the change log are kept for a while, not for ever."""

from __future__ import annotations

from mica.engine.definition import Env
from mica.engine.records import Draft

KEYS_S = 86400.0
CHANGES = 100_000
BATCH = 500


async def reconcile(env: Env) -> str:
    now = env.clock.now()
    old = [
        id_
        for id_, o in (await env.records.operations.scan()).items()
        if o.value.state.ended and (o.value.ended_at or now) < now - env.policy.operation_retention_s
    ][:BATCH]
    keys = [id_ for id_, k in (await env.records.keys.scan()).items() if k.value.at < now - KEYS_S][:BATCH]
    draft = Draft()
    for id_ in old:
        draft.delete(env.records.operations, id_)
    for id_ in keys:
        draft.delete(env.records.keys, id_)
    if old or keys:
        await env.records.commit(draft, durable=False)
    await env.records.store.compact(CHANGES)
    return f"forgot {len(old)} operations" if old else ""
