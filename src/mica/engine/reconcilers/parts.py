"""Parts of snapshots that nothing needs any more are removed, and moments at which forks began."""

from __future__ import annotations

from mica.engine.definition import Env
from mica.engine.snapshots import forget_fork_points, sweep


async def reconcile(env: Env) -> str:
    await forget_fork_points(env)
    return await sweep(env)
