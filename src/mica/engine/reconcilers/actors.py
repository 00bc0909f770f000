"""Every machine is looked at now and then, in case an event was missed or a look failed; idle actors are let go."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mica.engine.engine import Engine


async def reconcile(engine: Engine) -> str:
    # In this order: who is about to look is not idle.
    await engine.retire_idle()
    engine.look_at_all()
    return ""
