"""Recent use of the running VMs, sampled into memory: what lists show and what admission judges idleness by."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mica.engine.admission import Candidate
from mica.engine.definition import Ports
from mica.engine.records import Ledger
from mica.model.errors import MicaError
from mica.model.units import Bytes
from mica.model.views import UsageSource, VmUsage
from mica.model.vm import ProcessRef, VmStatus

# Below this share of one processor a VM counts as idle. A quiet Linux guest under TCG uses 1 to 3 %.
IDLE_CPU = 0.05


@dataclass
class _Sample:
    name: str
    at: float
    cpu_s: float | None
    memory: int | None
    source: UsageSource
    own: int | None
    process: ProcessRef
    cpu: float | None = None
    busy_at: float = 0.0


class UsageSampler:
    """Call :meth:`sample` every few seconds; everything else reads what it saw."""

    def __init__(self, env: Ports) -> None:
        self._env = env
        self._samples: dict[str, _Sample] = {}

    async def sample(self, running: dict[str, tuple[str, VmStatus]]) -> None:
        """Look at the VMs given as id → (name, status) and forget all others."""
        now = self._env.clock.monotonic()
        for gone in self._samples.keys() - running.keys():
            del self._samples[gone]
        for vm_id, (name, status) in running.items():
            if status.runtime is None:
                continue
            try:
                usage = await self._env.slices.usage(status.runtime.slice, status.runtime.process)
            except MicaError:
                continue  # it has just ended; its actor will say so
            last = self._samples.get(vm_id)
            fresh = _Sample(
                name, now, usage.cpu_s, usage.memory, usage.source, usage.own, status.runtime.process, busy_at=now
            )
            if (
                last is not None
                and last.source is usage.source
                and last.cpu_s is not None
                and usage.cpu_s is not None
                and now > last.at
            ):
                fresh.cpu = max(0.0, (usage.cpu_s - last.cpu_s) / (now - last.at))
                fresh.busy_at = now if fresh.cpu > IDLE_CPU else last.busy_at
            self._samples[vm_id] = fresh

    def usage(self, vm_id: str) -> VmUsage:
        seen = self._samples.get(vm_id)
        if seen is None:
            return VmUsage()
        memory = None if seen.memory is None else Bytes(seen.memory)
        own = None if seen.own is None else Bytes(seen.own)
        return VmUsage(cpu=seen.cpu, cpu_s=seen.cpu_s, memory=memory, own=own, source=seen.source)

    def own(self, vm_id: str, process: ProcessRef) -> Bytes | None:
        seen = self._samples.get(vm_id)
        return None if seen is None or seen.own is None or seen.process != process else Bytes(seen.own)

    def busy(self, vm_ids: Collection[str]) -> float:
        seen = (self._samples.get(vm_id) for vm_id in vm_ids)
        return sum(1.0 if sample is None or sample.cpu is None else sample.cpu for sample in seen)

    def candidates(self, ledger: Ledger) -> list[Candidate]:
        """Running VMs that could make room for another. Those not seen yet have no name."""
        now = self._env.clock.monotonic()
        out = []
        for vm_id, reserved in ledger.reserved.items():
            seen = self._samples.get(vm_id)
            total = reserved.total
            if seen is None:
                # Started a moment ago or not seen yet: what it was promised counts as untouched.
                out.append(Candidate(vm_id, "", total, Bytes(0)))
                continue
            idle = now - seen.busy_at
            # Its control group may be charged for memory that it shares, and does not give back.
            touched = seen.own if reserved.image else seen.memory
            used = Bytes(min(touched or 0, total))
            out.append(Candidate(vm_id, seen.name, total, used, idle if idle > 60 else None))
        return out
