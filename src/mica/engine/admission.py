"""May this start, and if not: exactly what would make it start. Pure: numbers in, an error or nothing out.

A machine with RAM of its own is promised all of it. One that shares a RAM image with its relatives is promised what it
has for itself so far, and a reserve for what it may come to write: together they may be promised less than they could
take (mica.engine.promises keeps the promise ahead of what is taken).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


class Shared(msgspec.Struct, frozen=True):
    """RAM images that machines share, each counted once, in bytes: those in memory now (``resident``), and those that
    somebody who was admitted will have read into it (``missing``)."""

    resident: int = 0
    missing: int = 0


NOTHING_SHARED = Shared()

# What a machine that shares its RAM may write before its promise has followed: one part of its RAM in so many, and at
# least so many bytes.
RESERVE_PART = 4
LEAST_RESERVE = 64 * MIB


def reserve_of(ram: int) -> int:
    """Bytes that a machine with so much RAM, which it shares, is promised beyond what it has for itself."""
    return min(ram, max(LEAST_RESERVE, ram // RESERVE_PART))


def promise(ram: int, overhead: int, image: str = "", own: int = 0) -> Reservation:
    """What a machine is promised. ``image`` is the RAM image that it shares, empty when its RAM is its own; ``own`` are
    the bytes that its process has for itself: pages of the image that it has written, and QEMU's own memory."""
    if not image:
        return Reservation(Bytes(ram), Bytes(overhead))
    dirtied = max(0, own - overhead)
    return Reservation(Bytes(min(ram, dirtied + reserve_of(ram))), Bytes(overhead), image)


def followed(held: Reservation | None, due: Reservation, ram: int) -> Reservation:
    """The promise to write: the one that is ``held`` unless it differs from ``due`` by a real amount."""
    close = held is not None and (held.image, held.overhead) == (due.image, due.overhead)
    if held is not None and close and held.ram <= ram and abs(held.ram - due.ram) < reserve_of(ram) // 4:
        return held
    return due


class Room(msgspec.Struct, frozen=True):
    """What is left for VMs, in bytes: by promises, and by what the host has free now."""

    promised: int
    free: int

    @property
    def least(self) -> int:
        return min(self.promised, self.free)


def room(
    capacity: Capacity, ledger: Ledger, running: Sequence[Candidate], reserve: int, shared: Shared = NOTHING_SHARED
) -> Room:
    """Bytes that one more VM could take. Below 0 when VMs that share RAM have come to take more than there is."""
    reserved = sum(r.total for r in ledger.reserved.values()) + shared.resident + shared.missing
    used = {c.vm_id: c.used for c in running}
    # What running VMs were promised and have not touched yet is not free, though the host counts it as free.
    untouched = sum(max(0, r.total - used.get(v, 0)) for v, r in ledger.reserved.items()) + shared.missing
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


class Ways(msgspec.Struct, frozen=True):
    """How whoever asked can have it otherwise. ``change`` comes before the options that make the VM smaller, ``None``
    where its size is given by the memory that it goes on with; ``insist`` is a sentence."""

    change: str | None = ""
    insist: str = "`--overcommit` insists"


USUAL = Ways()


def _shrinkable(ledger: Ledger, candidates: Sequence[Candidate], missing: int) -> tuple[Candidate, int] | None:
    """The VM that has touched least of what it was promised, when that is enough, and the RAM in MiB that it keeps.
    What one uses that was not looked at yet is not known."""
    best = max(
        # One that shares its memory was promised little more than it uses, and boots with all of it.
        (c for c in candidates if (held := ledger.reserved.get(c.vm_id)) and not held.image and c.used),
        key=lambda c: int(c.memory) - int(c.used),
        default=None,
    )
    if best is None:
        return None
    left = (ledger.reserved[best.vm_id].ram - missing) // MIB
    return (best, left) if left * MIB >= max(MIN_MEMORY, best.used) else None


def _ways_out(most: int, missing: int, ledger: Ledger, candidates: Sequence[Candidate], ways: Ways) -> Iterator[str]:
    fits = most // MIB
    if fits * MIB >= MIN_MEMORY and ways.change is not None:
        yield f"it would start with {format_size(Bytes(fits * MIB))} (`{ways.change}--memory {fits}M`)"
    if stop := _stoppable(candidates, missing):
        each = ", ".join(
            f"{c.name} ({format_size(c.memory)}" + (f", idle {format_duration(c.idle_s)})" if c.idle_s else ")")
            for c in stop
        )
        yield f"stopping {each} would make it fit"
    if shrink := _shrinkable(ledger, candidates, missing):
        other, left = shrink
        touched = f"{format_size(other.used)} of {format_size(other.memory)} touched"
        yield (
            f"less memory for {other.name} ({touched}) would make it fit: "
            f"`mica vm set {other.name} --memory {left}M` and a restart of it"
        )
    yield ways.insist


def _of_ram(spec: VmSpec, need: Reservation) -> str:
    if not need.image:
        return f"{format_size(need.ram)} of RAM"
    return f"{format_size(need.ram)} for what it may write of its {format_size(spec.memory)} of RAM"


def admit(
    name: str,
    spec: VmSpec,
    need: Reservation,
    capacity: Capacity,
    ledger: Ledger,
    running: Sequence[Candidate],
    *,
    reserve: int,
    shared: Shared = NOTHING_SHARED,
    overcommit: bool = False,
    ways: Ways = USUAL,
) -> None:
    """Raises ``insufficient-memory`` with the numbers and the ways out, ``insufficient-cpu`` beyond the host's."""
    if spec.cpus > capacity.cpus and not overcommit:
        raise MicaError(
            Code.INSUFFICIENT_CPU,
            f"{name} has {spec.cpus} vCPUs and this host has {capacity.cpus} processors",
            hint=f"give it at most {capacity.cpus} (`{ways.change}--cpus {capacity.cpus}`); {ways.insist}"
            if ways.change is not None
            else ways.insist,
            details={"vcpus": spec.cpus, "cpus": capacity.cpus},
        )
    left = room(capacity, ledger, running, reserve, shared)
    wanted = need.total
    if overcommit or (wanted <= left.promised and wanted <= left.free):
        return
    least = max(0, left.least)
    raise MicaError(
        Code.INSUFFICIENT_MEMORY,
        f"{name} needs {format_size(wanted)} ({_of_ram(spec, need)}, {format_size(need.overhead)} for QEMU); "
        f"{format_size(least)} of {format_size(capacity.memory)} is free for VMs "
        f"({format_size(reserve)} is kept for the host)",
        hint="; ".join(_ways_out(least - need.overhead, wanted - least, ledger, running, ways)),
        details={
            "need": wanted,
            "free": least,
            "reserve": reserve,
            "shared": shared.resident + shared.missing,
            "memory": capacity.memory,
            "candidates": [msgspec.to_builtins(c) for c in running],
        },
    )
