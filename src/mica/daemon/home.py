"""One daemon for one ``MICA_HOME``: the lock that says so, and the directories below it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mica.daemon.settings import Settings
from mica.model.errors import Code, MicaError, invalid

LOCK_NAME = "daemon.lock"


@contextmanager
def owned(settings: Settings) -> Iterator[None]:
    """Own the home while the block runs.

    Raises ``home-locked`` naming the daemon that does, ``forbidden``, and ``invalid`` for what cannot be a home.

    The lock is on an open file (flock(2)): it is gone with its holder, whatever way that ended.
    """
    home = settings.home
    if '"' in str(home) or not str(home).isprintable():
        raise invalid(
            f"{str(home)!r} cannot be a MICA_HOME: apt cannot be told of quotation marks and control characters",
            hint="choose a directory with a simpler name",
        )
    try:
        # VMs run under user ids of their own and must reach their files below it, and only theirs.
        home.mkdir(parents=True, exist_ok=True, mode=0o711)
        _check_owner(home, settings.uid)
        descriptor = os.open(home / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError as error:
        raise MicaError(
            Code.FORBIDDEN,
            f"{home} cannot be written by this user",
            hint="set MICA_HOME to a directory of yours, or become its owner",
        ) from error
    except OSError as error:
        raise MicaError(
            Code.INVALID,
            f"{home} cannot be used as MICA_HOME: {error.strerror}",
            hint="set MICA_HOME to a directory of yours on a file system that may be written",
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise MicaError(
                Code.HOME_LOCKED,
                f"the daemon with pid {holder} owns {home}",
                hint="use that one, stop it with `mica daemon stop`, or set another MICA_HOME",
                details={"pid": holder, "home": str(home)},
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        _make_directories(settings)
        yield
    finally:
        os.close(descriptor)


def _check_owner(home: Path, uid: int) -> None:
    """A daemon is looked for where that of the home's owner would be, so no other may run there."""
    owner = home.stat().st_uid
    if owner != uid:
        raise MicaError(
            Code.FORBIDDEN,
            f"{home} belongs to user {owner}, and this daemon would run as user {uid}",
            hint="start it as that user, or set MICA_HOME to a directory of yours",
            details={"home": str(home), "owner": owner},
        )


def _make_directories(settings: Settings) -> None:
    for name, mode in (("images", 0o711), ("volumes", 0o711), ("logs", 0o711), ("cache", 0o700), ("execs", 0o700)):
        (settings.home / name).mkdir(exist_ok=True, mode=mode)
    runtime = settings.runtime_dir
    base = runtime.parent
    if settings.uid != 0:
        _own_directory(base, settings.uid)
    runtime.mkdir(parents=True, exist_ok=True, mode=0o711)
    _own_directory(runtime, settings.uid)
    for part in (base, runtime):
        if settings.uid == 0:
            part.chmod(0o711)


def _own_directory(
    path: Path,
    uid: int,
    mode: int = 0o700,
    hint: str = "remove it, or set XDG_RUNTIME_DIR to a directory of yours",
) -> None:
    """Make a directory that only we can have made. Raises ``forbidden`` when somebody else was there first."""
    path.mkdir(parents=True, exist_ok=True, mode=mode)
    status = path.lstat()
    if status.st_uid != uid or status.st_mode & 0o022 or path.is_symlink():
        raise MicaError(
            Code.FORBIDDEN,
            f"{path} belongs to somebody else or is open to others",
            hint=hint,
        )
