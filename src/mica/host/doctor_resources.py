"""Memory, processors, the file system of guest RAM, and the disk."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mica.host.doctor_base import Patient
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
    """The file system that holds guest RAM: its kind, its room, and a page that is mapped and written."""
    directory, ram_dir = _existing(patient.examination.ram_dir), patient.examination.ram_dir
    stat = os.statvfs(directory)
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    in_memory = _in_memory(patient, directory)
    title = "Guest memory"
    where = f"{ram_dir} on {'a tmpfs' if in_memory else 'a disk'}: {format_size(free)} free of {format_size(total)}"
    try:
        _map_trial(directory)
    except OSError as error:
        return [
            Finding(
                id="guest-ram",
                title=title,
                status=Status.MISSING,
                proof=f"{where}; a shared mapping could not be written: {error.strerror}",
                costs="no virtual machine can start: its memory is a file there",
                fix_note="set ram_dir to a directory on a file system in memory that may be written",
            )
        ]
    proof = f"{where}; a shared mapping was written and read back"
    if not in_memory:
        return [
            Finding(
                id="guest-ram",
                title=title,
                status=Status.DEGRADED,
                proof=proof,
                costs="guest memory is written to a disk, which makes VMs slow",
                fix_note="set ram_dir to a directory on a tmpfs, such as /dev/shm",
            )
        ]
    wanted = patient.facts.memory_total // 2
    if total >= wanted * 9 // 10:
        return [Finding(id="guest-ram", title=title, status=Status.OK, proof=proof)]
    point = _mount_point(patient, directory)
    return [
        Finding(
            id="guest-ram",
            title=title,
            status=Status.DEGRADED,
            proof=proof,
            costs=f"all VMs together have at most {format_size(free)} of memory, though this host could give more",
            fix=patient.fixes.command("mount", "-o", f"remount,size={wanted // MIB}m", point),
            fix_note="until the next boot; in a container, give it a larger --shm-size",
        )
    ]


def _map_trial(directory: Path) -> None:
    """What a VM's memory is: a file, mapped shared, written through the mapping. Raises ``OSError``."""
    with tempfile.TemporaryFile(dir=directory) as file:
        # Room is taken first: writing to a mapping of a file that cannot grow would kill this process with SIGBUS.
        os.posix_fallocate(file.fileno(), 0, _TRIAL_BYTES)
        with mmap.mmap(file.fileno(), _TRIAL_BYTES) as mapping:
            mapping[-8:] = b"mica-ram"
            if os.pread(file.fileno(), 8, _TRIAL_BYTES - 8) != b"mica-ram":
                raise OSError(0, "the file does not hold what was written to the mapping")


def _mounts(patient: Patient) -> dict[str, str]:
    """Mount point → kind of file system; of several at one point the last is the one that is seen."""
    out = {}
    for line in (patient.text("proc/self/mountinfo") or "").splitlines():
        head, _, tail = line.partition(" - ")
        fields, rest = head.split(), tail.split()
        if len(fields) >= 5 and rest:
            out[fields[4]] = rest[0]
    return out


def _mount_point(patient: Patient, directory: Path) -> str:
    mounts = _mounts(patient)
    real = directory.resolve()
    return next((str(part) for part in (real, *real.parents) if str(part) in mounts), "/")


def _in_memory(patient: Patient, directory: Path) -> bool:
    return _mounts(patient).get(_mount_point(patient, directory)) in ("tmpfs", "ramfs", "hugetlbfs")


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
