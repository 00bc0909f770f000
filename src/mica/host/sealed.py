"""Memory that nobody can write any more: sealed memfds, and a trial of them on this host.

Seals are for ever (fcntl(2), File Sealing). ``F_SEAL_FUTURE_WRITE`` (Linux 5.1) leaves mappings that exist as they are,
refuses new ones that would write, and holes punched by anybody.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import fcntl
import mmap
import os
from typing import Final

# linux/fcntl.h and linux/falloc.h; Python names none of them.
F_SEAL_FUTURE_WRITE: Final = 0x0010
_PUNCH_HOLE: Final = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE


def try_seals(size: int) -> None:
    """Do to a memfd what is done to guest RAM, and see that it holds. Raises ``OSError`` saying what does not."""
    descriptor = os.memfd_create("trial", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        with mmap.mmap(descriptor, size) as shared:
            shared[:4] = b"mica"
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            shared[:4] = b"ram\n"
        with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE) as private:
            private[:4] = b"mine"
        if os.pread(descriptor, 4, 0) != b"ram\n":
            raise OSError(errno.EIO, "a private mapping changed what all others see")
        if _punch(descriptor, size) == 0:
            raise OSError(errno.EIO, "a hole could be punched into sealed memory")
    finally:
        os.close(descriptor)


def _punch(descriptor: int, size: int) -> int:
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    return int(libc.fallocate(descriptor, _PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(size)))
