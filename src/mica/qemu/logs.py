"""Keeps the logs of all VMs short: what their guests write to their serial ports, and what QEMU says.

A log is cut by punching a hole into its beginning (fallocate(2)): offsets stay, the disk gets its blocks back, and
QEMU, which appends, notices nothing. Its length goes on growing, so QEMU's limit on the size of files is moved along;
while no daemon lives that limit is what bounds a log.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

log = structlog.get_logger()

KEEP = 1024 * 1024
NAMES = ("console.log", "qemu.log")
# A serial port takes minutes to write what QEMU may write at most.
PERIOD_S = 10.0

_FALLOC_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02  # linux/falloc.h
_BLOCK = 4096


class LogKeeper:
    """Looks at every log now and then. ``let_grow`` is told a VM's id and the length of its longest log."""

    def __init__(self, log_dir: Path, let_grow: Callable[[str, int], None], period_s: float = PERIOD_S) -> None:
        self._log_dir = log_dir
        self._let_grow = let_grow
        self._period_s = period_s
        self._failed: list[str] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run(), name="logs")
            try:
                yield
            finally:
                task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            failed = await asyncio.to_thread(self.once)
            if failed and failed != self._failed:
                log.warning("logs could not be kept short", errors=failed)
            self._failed = failed

    def once(self) -> list[str]:
        """One round over all VMs; what went wrong. The next round is the retry."""
        failed = []
        for directory in self._log_dir.iterdir():
            try:
                length = max(trim(directory / name) for name in NAMES)
                if length > KEEP:
                    self._let_grow(directory.name, length)
            except PermissionError:
                continue  # the limit stays: where that is so, it was made large from the beginning
            except OSError as error:
                failed.append(f"{directory.name}: {error.strerror}")
        return failed


def trim(file: Path, keep: int = KEEP) -> int:
    """Give all but the last ``keep`` bytes of a log back to the disk, once it has twice as many; return its length.

    Cheap when there is nothing to do; a log that is not there has length 0. Raises ``OSError``.
    """
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return 0
    try:
        status = os.fstat(descriptor)
        if status.st_blocks * 512 > 2 * keep and status.st_size > keep:
            _punch_hole(descriptor, (status.st_size - keep) // _BLOCK * _BLOCK)
        return status.st_size
    finally:
        os.close(descriptor)


def _punch_hole(descriptor: int, end: int) -> None:
    """Give the blocks before ``end`` back to the file system; the size stays (fallocate(2)). Raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if libc.fallocate(descriptor, _FALLOC_KEEP_SIZE_PUNCH_HOLE, 0, end) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
