"""What both versions of control groups share: small files, and groups that end when their last process has."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from mica.host.processes import usage
from mica.model.errors import Code, MicaError, invalid
from mica.model.units import Bytes
from mica.model.views import UsageSource
from mica.model.vm import ProcessRef
from mica.ports.slices import SliceUsage

PERIOD_US = 100_000
"""The kernel's default period: a quota is this many microseconds per period for each processor."""
MIN_QUOTA_US = 1_000
_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.2


def write(path: Path, value: str) -> None:
    """Write one control file. Raises ``host-lacks`` naming it."""
    try:
        path.write_text(value, encoding="ascii")
    except OSError as error:
        raise MicaError(
            Code.HOST_LACKS,
            f"cannot write {value!r} to {path}: {error.strerror}",
            hint="mica doctor tells which control groups work here",
        ) from error


def number(path: Path) -> int | None:
    """The number in a file, ``None`` when it is not there or says ``max``."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def fields(path: Path) -> dict[str, int]:
    """A file of ``name value`` lines; empty when it is not there."""
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0].decode(): int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _read(path: Path) -> bytes:
    """A file of the kernel, empty when it cannot be read. Without codecs, as each VM's are read every few seconds."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""


def quota_us(cpus: float) -> int:
    """CPU time per period. The kernel takes no less than a millisecond."""
    return max(MIN_QUOTA_US, round(cpus * PERIOD_US))


def check_id(vm_id: str) -> str:
    """A VM's id becomes a directory's name, so it may be nothing else."""
    if not vm_id or vm_id.startswith(".") or "/" in vm_id or len(vm_id) > 128:
        raise invalid(f"{vm_id!r} cannot name a control group")
    return vm_id


def join(directories: Sequence[Path], pid: int) -> None:
    """Move a process into each group. Raises ``gone`` when it has ended, ``host-lacks`` when that is not allowed."""
    for directory in directories:
        try:
            (directory / "cgroup.procs").write_text(str(pid), encoding="ascii")
        except OSError as error:
            if error.errno == errno.ESRCH:
                raise MicaError(Code.GONE, f"process {pid} ended before it could be limited") from error
            raise MicaError(
                Code.HOST_LACKS,
                f"cannot put process {pid} into {directory}: {error.strerror}",
                hint="mica doctor tells which control groups work here",
            ) from error


def processes(directory: Path) -> list[int]:
    try:
        return [int(line) for line in (directory / "cgroup.procs").read_text(encoding="ascii").split()]
    except OSError:
        return []


def completed(counted: SliceUsage, process: ProcessRef | None) -> SliceUsage:
    """What no group counts is told of the process, as far as that lives: what is its own always."""
    seen = usage(process) if process is not None else None
    if seen is None:
        return counted
    if counted.cpu_s is not None and counted.memory is not None:
        return msgspec.structs.replace(counted, own=Bytes(seen.own))
    return SliceUsage(
        cpu_s=seen.cpu_seconds if counted.cpu_s is None else counted.cpu_s,
        memory=Bytes(seen.held) if counted.memory is None else counted.memory,
        oom_kills=counted.oom_kills,
        source=UsageSource.PROCESS,
        own=Bytes(seen.own),
    )


async def remove(directories: Sequence[Path], timeout_s: float) -> None:
    """Remove groups once they are empty; absent ones are no error. Raises ``in-use`` naming who is left.

    A process leaves its group when it is reaped, not when it is killed, and cgroup v1 signals neither: so try, at
    growing intervals.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = _FIRST_PAUSE_S
    left = list(directories)
    while True:
        left = [directory for directory in left if not _rmdir(directory)]
        if not left:
            return
        if time.monotonic() > deadline:
            pids = sorted({pid for directory in left for pid in processes(directory)})
            raise MicaError(
                Code.IN_USE,
                f"{left[0]} still has processes after {timeout_s:g} s: {', '.join(map(str, pids)) or 'none visible'}",
                retryable=True,
                details={"pids": pids},
            )
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)


def _rmdir(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise MicaError(Code.HOST_LACKS, f"cannot remove {directory}: {error.strerror}") from error
    return True


def refuse_below_use(limit: int, used: int, vm_id: str) -> None:
    """A ceiling below what cannot be given back would have the kernel kill the VM at once, so it is refused."""
    if used > limit:
        raise MicaError(
            Code.STATE_CONFLICT,
            f"{vm_id} uses {used} bytes of memory now; a limit of {limit} would end it",
            hint="balloon it or stop it first",
            details={"used": used, "limit": limit},
        )


def retire(directories: Iterable[Path]) -> None:
    """Remove groups that have no group and no process in them; those that have stay."""
    for directory in set(directories):
        with contextlib.suppress(OSError):
            directory.rmdir()
