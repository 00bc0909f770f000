"""Find the daemon of a ``MICA_HOME`` on this host, start one where none runs, and stop it.

    connect ──► answered: use it
       └──► nobody there ──► flock in the home ──► connect again ──► spawn ──► wait on the socket ──► use it
                                                        │               └──► it died: its last words
                                                        └──► somebody was quicker: use theirs

The pid of a daemon is never taken from a file: the kernel names the process that listens (SO_PEERCRED, unix(7)),
and a pidfd makes sure that the signal reaches that process and no later one with its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import pwd
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mica.model.errors import TABLE, Code, MicaError
from mica.model.paths import api_socket, runtime_dir

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
LOG_NAME = "daemon.log"
_LOG_LIMIT = 8 * 1024**2
_LOCK_NAME = "daemon.start.lock"
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Place:
    """Where the daemon of one home is: ``owner`` is the uid that it runs as, ``uid`` is ours."""

    home: Path
    socket: Path
    owner: int
    uid: int

    @property
    def log(self) -> Path:
        return self.home / LOG_NAME

    @property
    def ours(self) -> bool:
        """Whether we may start a daemon here."""
        return self.owner == self.uid


def locate(home: Path, environ: Mapping[str, str], uid: int) -> Place:
    """The place of the daemon of ``home``; a home that does not exist yet would be ours."""
    try:
        owner = home.stat().st_uid
    except OSError:  # absent, or below a directory we may not enter: then only our own daemon can be meant
        owner = uid
    if owner not in (uid, 0):
        theirs = f"/run/user/{owner}"
        environ = {"XDG_RUNTIME_DIR": theirs} if Path(theirs).is_dir() else {}
    return Place(home, api_socket(runtime_dir(home, environ, owner)), owner, uid)


def check_runtime_dir(runtime: Path, owner: int) -> None:
    """Refuse a runtime directory that somebody else could have put there: its sockets would not be the daemon's.

    A directory that does not exist is no error. Raises ``forbidden``.
    """
    for path in (runtime.parent, runtime):
        try:
            found = path.lstat()
        except FileNotFoundError:
            return
        except PermissionError as error:
            raise MicaError(
                Code.FORBIDDEN,
                f"{path} may not be entered by user {os.geteuid()}",
                hint="members of the group mica may; or use sudo",
            ) from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & 0o022:
            raise MicaError(
                Code.FORBIDDEN,
                f"{path} is not a directory that only user {owner} may change"
                f" (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o})",
                hint=f"somebody else may have made it: look at it, then remove it with: rm -r {path}",
                details={"path": str(path), "owner": found.st_uid, "mode": stat.S_IMODE(found.st_mode)},
            )


async def answers(place: Place) -> bool:
    """Whether somebody accepts connections on the socket. Raises ``forbidden`` where we may not connect."""
    check_runtime_dir(place.socket.parent, place.owner)
    return await _answers(place)


async def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            await asyncio.get_running_loop().sock_connect(sock, str(path))
    except BaseException:
        sock.close()
        raise
    return sock


async def _answers(place: Place) -> bool:
    try:
        (await _connect(place.socket)).close()
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError, TimeoutError):
        return False
    except PermissionError as error:
        raise denied(place, error) from error
    return True


def denied(place: Place, cause: BaseException) -> MicaError:
    """The error for a socket that exists and that we may not open."""
    return MicaError(
        Code.FORBIDDEN,
        f"user {place.uid} may not use the daemon of {place.home} ({cause})",
        hint="become a member of the group mica and sign in again, or use sudo",
    )


def unreachable(place: Place) -> MicaError:
    """The error for a home whose daemon does not run."""
    hint = "start it with: mica up" if place.ours else f"user {place.owner} starts it with: mica up"
    return MicaError(
        Code.DAEMON_UNREACHABLE,
        f"no daemon runs for {place.home}",
        hint=hint,
        retryable=True,
        details={"home": str(place.home), "socket": str(place.socket)},
    )


async def ensure(
    place: Place,
    environ: Mapping[str, str],
    *,
    announce: Callable[[str], None],
    timeout_s: float = START_TIMEOUT_S,
    argv: Sequence[str] = (),
) -> int | None:
    """Make sure that a daemon runs; return its pid if this call started it.

    Any number of callers may race: one starts it, the others find it running. ``announce`` is told what is done.
    ``argv`` is what to start instead of :func:`command`.
    Raises ``daemon-unreachable`` (it died or did not answer in ``timeout_s`` seconds) and ``forbidden``.
    """
    if not place.ours:
        raise unreachable(place)
    try:
        # Passable, as the daemon makes it: VMs run under user ids of their own and reach their files below it.
        place.home.mkdir(mode=0o711, parents=True, exist_ok=True)
        lock = os.open(place.home / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MicaError(
            Code.FORBIDDEN,
            f"cannot keep a daemon's state in {place.home}: {error.strerror}",
            hint="set MICA_HOME to a directory of yours",
        ) from error
    deadline = time.monotonic() + timeout_s
    try:
        await _lock(lock, place, deadline)
        if await answers(place):
            return None
        announce(f"starting a daemon for {place.home}")
        pid = _spawn(place, environ, argv or command(place.home))
        await _wait_started(place, pid, deadline, timeout_s)
        note = logout_note(place)
        announce(f"it stays until: mica daemon stop; it logs to {place.log}" + (f"; {note}" if note else ""))
        return pid
    finally:
        os.close(lock)


async def _lock(lock: int, place: Place, deadline: float) -> None:
    for pause in _pauses(deadline):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        else:
            return
        await asyncio.sleep(pause)
    raise MicaError(
        Code.DAEMON_UNREACHABLE,
        f"another command has been starting the daemon of {place.home} for too long",
        hint=f"see {place.log}",
        retryable=True,
    )


def _pauses(deadline: float) -> Iterator[float]:
    """Growing pauses (10 ms to 200 ms) until the deadline: neither a lock nor a new socket sends a signal."""
    pause = 0.01
    while time.monotonic() < deadline:
        yield pause
        pause = min(pause * 1.5, 0.2)


def command(home: Path, *extra: str) -> list[str]:
    """The argument vector of a daemon. ``-P``: a directory named ``mica`` in the current directory is not ours."""
    return [sys.executable, "-P", "-m", "mica.daemon", "--home", str(home), *extra]


def _spawn(place: Place, environ: Mapping[str, str], argv: Sequence[str]) -> int:
    """Start the daemon in a session of its own; its pid. Not through asyncio, which kills its children at its end."""
    with contextlib.suppress(FileNotFoundError):
        if place.log.stat().st_size > _LOG_LIMIT:
            place.log.replace(place.log.with_name(LOG_NAME + ".1"))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawn(
        argv[0],
        list(argv),
        dict(environ),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(place.log), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=[],
        setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE],
    )


async def _wait_started(place: Place, pid: int, deadline: float, timeout_s: float) -> None:
    exit_status: int | None = None
    locked = TABLE[Code.HOME_LOCKED].exit_status
    for pause in _pauses(deadline):
        if await answers(place):
            return
        if exit_status is None:
            exit_status = reap(pid)
        # A daemon that somebody else started may hold the home and not listen yet: then it is waited for.
        if exit_status is not None and exit_status != locked:
            raise _died(place, f"the daemon of {place.home} ended with status {exit_status} while starting")
        await asyncio.sleep(pause)
    raise _died(place, f"the daemon of {place.home} did not answer within {timeout_s:.0f} s")


def reap(pid: int) -> int | None:
    """Exit status of our child (negative: a signal), or ``None`` while it runs."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 0
    return os.waitstatus_to_exitcode(status) if found else None


def _died(place: Place, message: str) -> MicaError:
    last = log_tail(place.log, lines=12)
    hint = f"its log is {place.log}" + (", the last lines:\n" + "\n".join(last) if last else ", and it is empty")
    return MicaError(Code.DAEMON_UNREACHABLE, message, hint=hint, details={"home": str(place.home), "log": [*last]})


def log_tail(path: Path, *, lines: int) -> list[str]:
    """The last ``lines`` lines of a log (at most 1 MiB of it); empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1024**2))
            return file.read().decode(errors="replace").splitlines()[-lines:] if lines else []
    except FileNotFoundError:
        return []


def logout_note(place: Place, root: Path = Path("/")) -> str:
    """A warning where the end of the user's last session ends the daemon too, by systemd-logind(8); else empty.

    logind removes ``/run/user/<uid>`` with the last session unless the user lingers (loginctl(1)).
    """
    if place.uid == 0 or not (root / "run/systemd/system").is_dir():
        return ""
    if not str(place.socket).startswith("/run/user/"):
        return ""
    try:
        user = pwd.getpwuid(place.uid).pw_name
    except KeyError:
        return ""
    if (root / "var/lib/systemd/linger" / user).exists():
        return ""
    return "signing out ends it unless you run: loginctl enable-linger"


async def listener_pid(place: Place) -> int:
    """The pid of the process that listens on the socket. Raises ``daemon-unreachable`` and ``forbidden``."""
    try:
        sock = await _connect(place.socket)
    except PermissionError as error:
        raise denied(place, error) from error
    except (OSError, TimeoutError) as error:
        raise unreachable(place) from error
    with sock:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", raw)[0]
    if pid <= 0:
        raise MicaError(
            Code.FORBIDDEN,
            f"the daemon of {place.home} runs in another pid namespace",
            hint="stop it from where it was started",
        )
    return pid


async def stop(place: Place, *, timeout_s: float = STOP_TIMEOUT_S) -> int:
    """Ask the daemon to end (SIGTERM) and wait until it has; its VMs live on. Return its pid.

    Raises ``daemon-unreachable`` when none runs, ``timeout`` when it has not ended after ``timeout_s`` seconds.
    """
    pid = await listener_pid(place)
    pidfd = os.pidfd_open(pid)
    try:
        # The number may have changed hands between the two calls: ask the socket once more.
        if await listener_pid(place) != pid:
            raise unreachable(place)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        except PermissionError as error:
            raise MicaError(
                Code.FORBIDDEN, f"user {place.uid} may not stop the daemon with pid {pid}", hint="use sudo"
            ) from error
        await _wait_ended(pidfd, pid, timeout_s)
    except ProcessLookupError:
        pass  # it ended by itself meanwhile, which is what was asked for
    finally:
        os.close(pidfd)
    return pid


async def _wait_ended(pidfd: int, pid: int, timeout_s: float) -> None:
    """A pidfd becomes readable when its process ends (pidfd_open(2))."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ended.wait()
    except TimeoutError:
        raise MicaError(
            Code.TIMEOUT,
            f"the daemon with pid {pid} has not ended {timeout_s:.0f} s after it was asked to",
            hint=f"its VMs survive it: kill -9 {pid} is safe",
        ) from None
    finally:
        loop.remove_reader(pidfd)
