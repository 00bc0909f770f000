"""What the engine needs to give a VM its share of the host and no more."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from mica.model.units import Bytes
from mica.model.views import UsageSource
from mica.model.vm import ProcessRef


class SliceLimits(msgspec.Struct, frozen=True):
    """Ceilings: ``cpus`` in host processors, ``memory`` in bytes; ``None`` is no ceiling."""

    cpus: float | None
    memory: Bytes | None


class SliceUsage(msgspec.Struct, frozen=True):
    """``None`` where the host cannot tell. ``source`` is the group's only if all of it is the group's. ``own`` is what
    the machine's process has for itself, in memory or in swap: pages of files that it shares with others left out."""

    cpu_s: float | None
    memory: Bytes | None
    oom_kills: int = 0
    source: UsageSource = UsageSource.CGROUP
    own: Bytes | None = None


class Slices(Protocol):
    """Control groups, whichever kind the host has. All verbs are idempotent; a handle is plain JSON."""

    async def create(self, vm_id: str, limits: SliceLimits) -> dict[str, Any]: ...

    async def update(self, handle: dict[str, Any], limits: SliceLimits) -> None: ...

    async def usage(self, handle: dict[str, Any], process: ProcessRef | None = None) -> SliceUsage:
        """What the slice uses; what no group counts here is told of ``process``. Raises ``gone``."""

    async def remove(self, handle: dict[str, Any]) -> None:
        """Remove it once it is empty. Raises ``in-use`` when a process stays in it beyond a deadline."""

    def present(self) -> dict[str, dict[str, Any]]:
        """VM id → handle of every slice there is, for the reaper."""
