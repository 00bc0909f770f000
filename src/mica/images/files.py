"""Files of the image store: reading all of one, making it durable, and work in threads that can be stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from mica.model.errors import Code, MicaError
from mica.model.image import ImageFile
from mica.model.units import Bytes, format_size

T = TypeVar("T")

CHUNK = 1 << 20


async def in_thread(work: Callable[[threading.Event], T]) -> T:
    """Run blocking ``work`` in a thread. When cancelled, set its event and wait until it has really stopped.

    So nobody removes files from under a thread that is still busy with them.
    """
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # the cancellation is what the caller hears of
        raise


async def shielded(work: Awaitable[None]) -> None:
    """Do ``work`` (cleaning up, with a deadline of its own) to its end, also while being cancelled."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.done():
                break
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


class Stopped(Exception):  # noqa: N818 - not an error: the work was asked to stop
    """Raised by work in a thread that found its event set."""


def digest_file(path: Path, stop: threading.Event, seen: Callable[[int], None] | None = None) -> ImageFile:
    """Size and BLAKE3 of a file; ``seen`` gets the number of bytes read with every chunk."""
    hasher = blake3()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            if stop.is_set():
                raise Stopped
            hasher.update(chunk)
            size += len(chunk)
            if seen is not None:
                seen(len(chunk))
    return ImageFile(size=Bytes(size), blake3=hasher.hexdigest())


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Directories are synced the same way: what is durable then is the list of their names.
sync_directory = sync_file


def remove_tree(path: Path) -> None:
    """Remove a tree also where directories were made read-only; what is absent is no error."""

    def again(function: object, name: str, _: object) -> None:
        if not os.path.lexists(name):
            return
        os.chmod(os.path.dirname(name), 0o700)
        if os.path.isdir(name) and not os.path.islink(name):
            os.chmod(name, 0o700)
            shutil.rmtree(name)
        else:
            os.unlink(name)

    if path.exists():
        shutil.rmtree(path, onerror=again)


def need_space(directory: Path, need: int, what: str) -> None:
    """Raises ``insufficient-disk`` with the numbers when ``directory`` has less than ``need`` bytes left."""
    free = shutil.disk_usage(directory).free
    if free < need:
        raise MicaError(
            Code.INSUFFICIENT_DISK,
            f"{what} needs {format_size(need)} in {directory}, where {format_size(free)} are free",
            hint="delete images that nobody uses (mica image delete), or free space on that file system",
            details={"path": str(directory), "needed": need, "free": free},
        )


@contextlib.contextmanager
def disk_full_is_said(directory: Path, what: str) -> Iterator[None]:
    """Turn a full disk, met by us or by a program that we ran, into ``insufficient-disk``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _full(directory, what) from error
    except MicaError as error:
        words = str(error.details.get("last_words", ""))
        if error.code is Code.COMMAND_FAILED and (
            os.strerror(errno.ENOSPC) in words or os.strerror(errno.EDQUOT) in words
        ):
            raise _full(directory, what) from error
        raise


def _full(directory: Path, what: str) -> MicaError:
    free = shutil.disk_usage(directory).free
    return MicaError(
        Code.INSUFFICIENT_DISK,
        f"the disk filled up while {what}: {format_size(free)} are free in {directory}",
        hint="free space on that file system and start again; nothing half done was kept",
        details={"path": str(directory), "free": free},
    )


def try_lock(path: Path) -> int | None:
    """An open, exclusively locked descriptor of ``path`` (flock(2)), or ``None`` when another holds the lock.

    The lock ends with the last copy of the descriptor, so the death of its owner, however it came, frees it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.asynccontextmanager
async def locked(path: Path, *, timeout_s: float, what: str) -> AsyncIterator[None]:
    """Hold the lock file ``path``. Raises ``busy`` after ``timeout_s``.

    flock(2) tells nobody when a lock becomes free but a blocked thread, which could not be cancelled: hence the
    polling with back-off.
    """
    wait_s = 0.01
    deadline = asyncio.get_running_loop().time() + timeout_s
    while (descriptor := try_lock(path)) is None:
        if asyncio.get_running_loop().time() > deadline:
            raise MicaError(
                Code.BUSY,
                f"{what} is busy in another process for more than {timeout_s:g} s (lock file {path})",
                hint="wait for the other build to end",
                retryable=True,
            )
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 2, 0.5)
    try:
        yield
    finally:
        os.close(descriptor)
