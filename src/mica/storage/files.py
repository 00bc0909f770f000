"""Files that appear whole or not at all, on file systems that may be full."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from mica.model.errors import Code, MicaError
from mica.model.units import GIB, Bytes, format_size

# ioctl_ficlone(2): _IOW(0x94, 9, int).
_FICLONE: Final = 0x40049409

T = TypeVar("T")

_CANCEL_GRACE_S: Final = 10.0
DEFAULT_RESERVE: Final = Bytes(GIB)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an :class:`OSError` into a :class:`MicaError` that names the file and the way out."""
    try:
        yield
    except OSError as error:
        raise _translate(path, error) from error


def _translate(path: Path, error: OSError) -> MicaError:
    what = error.strerror or str(error)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return MicaError(
                Code.INSUFFICIENT_DISK,
                f"{path} cannot be written: {what}",
                hint=f"free some space there: df -h {path.parent}",
                retryable=True,
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return MicaError(
                Code.FORBIDDEN, f"{path} cannot be used: {what}", hint=f"look at its owner and mode: ls -ld {path}"
            )
        case errno.ENOENT:
            return MicaError(Code.NOT_FOUND, f"{path} is not there", hint="restore it from a backup")
        case errno.EFBIG:
            return MicaError(
                Code.INVALID, f"{path} would be larger than its file system allows a file to be", hint="make it smaller"
            )
        case _:
            return MicaError(Code.INTERNAL, f"{path} failed: {what}", hint="look at the kernel's log: dmesg")


def need_space(directory: Path, needed: int, reserve: int) -> None:
    """Raises ``insufficient-disk`` naming the numbers when ``needed`` bytes would cut into the ``reserve``."""
    with naming(directory):
        stat = os.statvfs(directory)
    free = stat.f_bavail * stat.f_frsize
    # A reserve that a small file system could never keep would forbid every disk on it.
    kept = min(reserve, stat.f_blocks * stat.f_frsize // 20)
    if free - kept >= needed:
        return
    raise MicaError(
        Code.INSUFFICIENT_DISK,
        f"{directory} has {format_size(free)} free, of which {format_size(kept)} stay reserved for the host; "
        f"{format_size(needed)} are needed",
        hint="delete snapshots (mica snapshot list), images (mica image list) or VMs for good "
        "(mica vm delete --purge), or grow the file system",
        retryable=True,
        details={"free": free, "reserve": kept, "needed": needed, "path": str(directory)},
    )


def file_system_size(directory: Path) -> Bytes:
    stat = os.statvfs(directory)
    return Bytes(stat.f_blocks * stat.f_frsize)


def sync_file(path: Path) -> None:
    """Bring the file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(temporary: Path, path: Path) -> None:
    """Make a finished file appear under its name, so that it survives a power cut whole."""
    sync_file(temporary)
    temporary.rename(path)
    sync_file(path.parent)


def write_whole(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    put_in_place(temporary, path)


def fresh(temporary: Path) -> None:
    """An empty file that only we may read, for whoever fills it; what an earlier attempt left there is gone."""
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600, exist_ok=False)


def give_up(temporary: Path) -> None:
    """Leave nothing of what could not be finished."""
    temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other volumes are in the directory
        temporary.parent.rmdir()


def hand_over(path: Path, owner: tuple[int, int] | None) -> None:
    """Nobody else's to read or write."""
    path.chmod(0o600)
    if owner is not None:
        os.chown(path, *owner, follow_symlinks=False)


def make_read_only(path: Path) -> None:
    """Nobody's to write from now on, and ours, whoever made it. Who has it open for writing can still write."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        os.fchown(descriptor, os.geteuid(), os.getegid())
        os.fchmod(descriptor, 0o444)
    finally:
        os.close(descriptor)


def reflink(source: Path, target: Path) -> bool:
    """Make ``target`` share the blocks of ``source`` where the file system can; say whether it could."""
    with source.open("rb") as from_, target.open("wb") as to:
        try:
            fcntl.ioctl(to.fileno(), _FICLONE, from_.fileno())
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM):
                return False
            raise
    return True


async def in_thread(function: Callable[..., T], *arguments: object, stop: threading.Event | None = None) -> T:
    """Run what waits for the disk in a thread. Who is cancelled meanwhile gets to know once it has ended.

    Otherwise it would go on behind the back of whoever cleans up; a disk that hangs is waited for ten seconds.
    ``stop`` is set then, for what takes long and looks at it.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        if stop is not None:
            stop.set()
        done, _ = await asyncio.wait([work], timeout=_CANCEL_GRACE_S)
        for ended in done:
            ended.exception()  # seen: the cancellation is what is raised
        raise


async def together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at once and return their results in order; the first error ends the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as several:
        raise several.exceptions[0] from several
    return [task.result() for task in tasks]
