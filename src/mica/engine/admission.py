"""May this start, and if not: exactly what would make it start. Pure: numbers in, an error or nothing out."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mica.engine.records import Ledger, Reservation
from mica.model.errors import Code, MicaError
from mica.model.units import MIB, Bytes, format_duration, format_size
from mica.model.vm import MIN_MEMORY, VmSpec
from mica.ports.host import Capacity


class Candidate(msgspec.Struct, frozen=True):
    """A running VM that could make room. ``memory`` is what it gives back when it stops; ``idle_s`` how long it has
    used next to no processor time, ``None`` when that is not known. ``used`` is what it has touched so far."""

    vm_id: str
    name: str
    memory: Bytes
    used: Bytes
    idle_s: float | None = None


class Room(msgspec.Struct, frozen=True):
    """What is left for VMs, in bytes: by promises, and by what the host has free now."""

    promised: int
    free: int

    @property
    def least(self) -> int:
        return min(self.promised, self.free)


def room(capacity: Capacity, ledger: Ledger, running: Sequence[Candidate], reserve: int) -> Room:
    """Bytes that one more VM could take."""
    reserved = sum(r.ram + r.overhead for r in ledger.reserved.values())
    used = {c.vm_id: c.used for c in running}
    # What running VMs were promised and have not touched yet is not free, though the host counts it as free.
    untouched = sum(max(0, r.ram + r.overhead - used.get(v, 0)) for v, r in ledger.reserved.items())
    return Room(capacity.memory - reserve - reserved, capacity.available - reserve - untouched)


def with_room(capacity: Capacity, used: int) -> Capacity:
    """``capacity`` as it is once a VM that uses so many bytes now has ended."""
    return msgspec.structs.replace(capacity, available=Bytes(capacity.available + used))


def _stoppable(candidates: Sequence[Candidate], missing: int) -> tuple[Candidate, ...]:
    """The fewest VMs, longest idle first, whose stop frees ``missing`` bytes; empty when all together do not."""
    chosen: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-(c.idle_s or 0.0), -c.memory)):
        if missing <= 0:
            break
        chosen.append(candidate)
        missing -= candidate.memory
    return tuple(chosen) if missing <= 0 else ()


def _ways_out(name: str, spec: VmSpec, least: int, need: Reservation, candidates: Sequence[Candidate]) -> list[str]:
    out = []
    fits = (least - need.overhead) // MIB * MIB
    if fits >= MIN_MEMORY:
        out.append(f"it would start with {format_size(fits)} (`mica vm set {name} --memory {fits // MIB}M`)")
    stop = _stoppable(candidates, need.ram + need.overhead - least)
    if stop:
        each = ", ".join(
            f"{c.name} ({format_size(c.memory)}" + (f", idle {format_duration(c.idle_s)})" if c.idle_s else ")")
            for c in stop
        )
        out.append(f"stopping {each} would make it fit")
    out.append("`--overcommit` insists")
    return out


def admit(
    name: str,
    spec: VmSpec,
    need: Reservation,
    capacity: Capacity,
    ledger: Ledger,
    running: Sequence[Candidate],
    *,
    reserve: int,
    overcommit: bool = False,
) -> None:
    """Raises ``insufficient-memory`` with the numbers and the ways out, ``insufficient-cpu`` beyond the host's."""
    if spec.cpus > capacity.cpus and not overcommit:
        raise MicaError(
            Code.INSUFFICIENT_CPU,
            f"{name} has {spec.cpus} vCPUs and this host has {capacity.cpus} processors",
            hint=f"give it at most {capacity.cpus} (`--cpus {capacity.cpus}`); `--overcommit` insists",
            details={"vcpus": spec.cpus, "cpus": capacity.cpus},
        )
    left = room(capacity, ledger, running, reserve)
    wanted = need.ram + need.overhead
    if overcommit or (wanted <= left.promised and wanted <= left.free):
        return
    least = max(0, left.least)
    ways = _ways_out(name, spec, least, need, running)
    raise MicaError(
        Code.INSUFFICIENT_MEMORY,
        f"{name} needs {format_size(wanted)} ({format_size(need.ram)} of RAM, {format_size(need.overhead)} for QEMU); "
        f"{format_size(least)} of {format_size(capacity.memory)} is free for VMs "
        f"({format_size(reserve)} is kept for the host)",
        hint="; ".join(ways),
        details={
            "need": wanted,
            "free": least,
            "reserve": reserve,
            "memory": capacity.memory,
            "candidates": [msgspec.to_builtins(c) for c in running],
        },
    )
