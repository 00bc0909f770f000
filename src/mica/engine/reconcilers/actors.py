"""Actors without a machine and without work are let go."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mica.engine.engine import Engine


async def reconcile(engine: Engine) -> str:
    await engine.retire_idle()
    return ""
