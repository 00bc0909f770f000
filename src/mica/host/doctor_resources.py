"""Memory, processors, guest RAM, and the disk."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mica.host.doctor_base import Patient
from mica.host.sealed import try_seals
from mica.model.doctor import Finding, Status
from mica.model.units import GIB, MIB, format_size

LITTLE_MEMORY = 1 * GIB
LITTLE_DISK = 4 * GIB
NO_DISK = 256 * MIB
_TRIAL_BYTES = 1 * MIB


async def memory(patient: Patient) -> Sequence[Finding]:
    facts = patient.facts
    limit = "" if facts.memory_limit is None else f", limited by control groups to {format_size(facts.memory_limit)}"
    swap = f"; swap {format_size(facts.swap_total)}" if facts.swap_total else "; no swap"
    proof = f"{format_size(facts.memory_available)} available of {format_size(facts.memory_host)}{limit}{swap}"
    if facts.memory_available >= LITTLE_MEMORY:
        return [Finding(id="memory", title="Memory", status=Status.OK, proof=proof)]
    return [
        Finding(
            id="memory",
            title="Memory",
            status=Status.DEGRADED,
            proof=proof,
            costs=f"below {format_size(LITTLE_MEMORY)} only a small VM or two fit; other starts are refused",
            fix_note="stop what else uses memory here, or give this machine more",
        )
    ]


async def processors(patient: Patient) -> Sequence[Finding]:
    facts = patient.facts
    quota = "" if facts.cpu_quota is None else f", a quota of {facts.cpu_quota:g} of them"
    proof = f"this process may run on {facts.cpus} processors of {os.cpu_count() or facts.cpus}{quota}"
    if facts.processors >= 2:
        return [Finding(id="cpus", title="Processors", status=Status.OK, proof=proof)]
    return [
        Finding(
            id="cpus",
            title="Processors",
            status=Status.DEGRADED,
            proof=proof,
            costs="a guest and the daemon share less than two processors, so both are slow",
        )
    ]


async def guest_ram(patient: Patient) -> Sequence[Finding]:
    """Guest RAM is memory without a path that can be sealed: it was made, mapped, sealed, and held."""
    del patient
    title = "Guest memory"
    try:
        try_seals(_TRIAL_BYTES)
    except OSError as error:
        return [
            Finding(
                id="guest-ram",
                title=title,
                status=Status.MISSING,
                proof=f"sealed memory could not be had: {error.strerror}",
                costs="no virtual machine can start: its memory is such a file, and forks of it share it",
                fix_note="use Linux 5.1 or later, and let the daemon use memfd_create",
            )
        ]
    proof = "memory was made, mapped and sealed; a private mapping and a discard left it as it was"
    return [Finding(id="guest-ram", title=title, status=Status.OK, proof=proof)]


def _existing(path: Path) -> Path:
    return next((part for part in (path, *path.parents) if part.is_dir()), Path("/"))


async def disk(patient: Patient) -> Sequence[Finding]:
    """Room below MICA_HOME, and a file that is written and reaches the disk."""
    home = patient.examination.home
    directory = _existing(home)
    stat = os.statvfs(directory)
    free, total = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    where = f"{home}: {format_size(free)} free of {format_size(total)}"
    try:
        begun = time.monotonic()
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(os.urandom(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
        took = time.monotonic() - begun
    except OSError as error:
        return [
            Finding(
                id="disk",
                title="Disk",
                status=Status.MISSING,
                proof=f"{where}; a file could not be written: {error.strerror}",
                costs="Mica cannot keep anything",
                fix_note="set MICA_HOME to a directory of yours on a disk with room",
            )
        ]
    proof = f"{where}; 1 MiB was written and synced in {took * 1000:.0f} ms"
    if free >= LITTLE_DISK:
        return [Finding(id="disk", title="Disk", status=Status.OK, proof=proof)]
    return [
        Finding(
            id="disk",
            title="Disk",
            status=Status.MISSING if free < NO_DISK else Status.DEGRADED,
            proof=proof,
            costs=f"below {format_size(LITTLE_DISK)} there is room for small images only",
            fix_note="make room, or set MICA_HOME to a directory on a larger disk",
        )
    ]
