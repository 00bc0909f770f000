"""Parts of snapshots that nothing needs any more are removed, and snapshots that only were for a while."""

from __future__ import annotations

from mica.engine.definition import Env
from mica.engine.snapshots import forget_passing, sweep


async def reconcile(env: Env) -> str:
    await forget_passing(env)
    return await sweep(env)
