"""Numbers for Prometheus (text format 0.0.4): few, cheap, and of bounded cardinality."""

from __future__ import annotations

from collections import Counter as Tally
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mica.api.facade import Facade
from mica.model.operation import Operation, OperationState
from mica.model.vm import VmState

PAGE = 1000
_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
# A change of a row takes milliseconds, the build of an image may take the better part of an hour.
_OPERATION_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


def resident_bytes() -> int:
    """Resident set of this process (VmRSS, proc(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


class Metrics:
    """One registry of its own, so that several daemons can live in one process."""

    MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self._registry}
        self._requests = Histogram(
            "mica_request_duration_seconds", "Requests", ["method", "route", "status"], buckets=_BUCKETS, **common
        )
        self._vms = Gauge("mica_vms", "VMs by state", ["state"], **common)
        self._operations = Gauge("mica_operations", "Operations that have not ended", ["verb", "state"], **common)
        self._ended = Histogram(
            "mica_operation_duration_seconds",
            "Operations that have ended, from the moment they began to run",
            ["verb", "outcome"],
            buckets=_OPERATION_BUCKETS,
            **common,
        )
        self._problems = Counter(
            "mica_operation_problems", "Operations that came to nothing, by why", ["verb", "code"], **common
        )
        self._resident = Gauge("mica_daemon_resident_bytes", "Resident memory of the daemon", **common)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request; ``route`` is its template, empty where no route matched."""
        self._requests.labels(method if route else "", route, f"{status // 100}xx").observe(seconds)

    def operation(self, ended: Operation) -> None:
        """Count an operation that has ended."""
        began = ended.created_at if ended.started_at is None else ended.started_at
        seconds = max(0.0, (began if ended.ended_at is None else ended.ended_at) - began)
        self._ended.labels(ended.verb, ended.state.value).observe(seconds)
        if ended.problem is not None:
            self._problems.labels(ended.verb, ended.problem.code.value).inc()

    async def render(self, engine: Facade) -> bytes:
        """The page, with the engine's numbers of now."""
        self._resident.set(resident_bytes())
        states = await self._vm_states(engine)
        for state in VmState:
            self._vms.labels(state).set(states[state])
        self._operations.clear()
        for (verb, what), count in (await self._active(engine)).items():
            self._operations.labels(verb, what).set(count)
        return generate_latest(self._registry)

    @staticmethod
    async def _vm_states(engine: Facade) -> Tally[VmState]:
        states: dict[str, VmState] = {}
        for trashed in (False, True):
            after = ""
            while True:
                page = await engine.vms(after=after, limit=PAGE, trashed=trashed)
                states.update({vm.id: vm.observed.state for vm in page.items})
                if not (after := page.next):
                    break
        return Tally(states.values())

    @staticmethod
    async def _active(engine: Facade) -> Tally[tuple[str, OperationState]]:
        tally: Tally[tuple[str, OperationState]] = Tally()
        after = ""
        while True:
            page = await engine.operations(after=after, limit=PAGE, active=True)
            tally.update((operation.verb, operation.state) for operation in page.items)
            if not (after := page.next):
                return tally
