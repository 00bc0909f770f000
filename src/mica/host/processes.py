"""Processes that outlive the daemon: start them, find them again, wait for them, signal them, measure them.

A pid alone names nothing: it is reused, and a dead child stays visible as a zombie until somebody reaps it, so
``kill(pid, 0)`` lies. A :class:`~mica.model.vm.ProcessRef` therefore carries the pid, the start time in clock ticks
since boot and the boot's id; :func:`find` opens a pidfd first and compares afterwards, so nothing can slip in between
(pidfd_open(2), proc(5) field 22 of ``/proc/PID/stat``). From then on every signal goes through the pidfd and cannot
hit a stranger.

    spawn() ──► LiveProcess ◄── find(ref)          alive ──► ended (zombie or gone: the pidfd turns readable)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import select
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self

import msgspec

from mica.model.errors import Code, MicaError
from mica.model.vm import ProcessRef

CLEAN_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
)
"""What a started program sees unless told otherwise: nothing of the daemon's own environment."""

_LOG_MODE = 0o600
_CAP_SYS_RESOURCE = 24  # linux/capability.h


class ResourceLimits(msgspec.Struct, frozen=True):
    """Limits set before exec, soft and hard alike (setrlimit(2)); ``None`` leaves one as it is.

    ``file_size`` and ``core`` are bytes. A program that is to get ``EFBIG`` instead of dying at ``file_size`` must
    ignore SIGXFSZ: start it with ``restore_signals=False`` (Python ignores the signal, and an ignored one stays so).
    ``raisable`` leaves the hard limit of ``file_size`` as it is, so that it can be raised later without privileges.
    """

    file_size: int | None = None
    open_files: int | None = None
    core: int | None = 0
    raisable: bool = False

    def options(self) -> list[str]:
        """As options of ``prlimit`` (util-linux)."""
        pairs = (("fsize", self.file_size), ("nofile", self.open_files), ("core", self.core))
        hard = {"fsize": ""} if self.raisable else {}
        return [f"--{name}={value}:{hard.get(name, value)}" for name, value in pairs if value is not None]

    def apply(self, pid: int) -> None:
        """Set them for a process that is already there (prlimit(2))."""
        pairs = (
            (resource.RLIMIT_FSIZE, self.file_size),
            (resource.RLIMIT_NOFILE, self.open_files),
            (resource.RLIMIT_CORE, self.core),
        )
        for kind, value in pairs:
            if value is not None:
                keep = self.raisable and kind == resource.RLIMIT_FSIZE
                resource.prlimit(pid, kind, (value, resource.prlimit(pid, kind)[1] if keep else value))


class ExitStatus(msgspec.Struct, frozen=True):
    """How a process ended; both ``None`` when nobody can know (it was not our child)."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by signal {self.signal}"
        return "ended" if self.code is None else f"exit status {self.code}"


class Usage(msgspec.Struct, frozen=True):
    """What one process uses: processor seconds since its start (all threads, ended ones too), bytes resident, and of
    these ``held``, what is not merely a file mapped (RssAnon and RssShmem: its own memory and what it has in tmpfs);
    ``own``, what nobody shares with it (RssAnon, and VmSwap, where that may have gone: pages of a private mapping count
    once it has written to them); bytes proportional (shared pages counted by share; ``None`` when not asked for, or not
    readable)."""

    cpu_seconds: float
    rss: int
    held: int
    own: int
    pss: int | None = None


class LiveProcess:
    """A process held by a pidfd. Close it (or use it as a context manager); closing does not end the process."""

    def __init__(self, ref: ProcessRef, pidfd: int) -> None:
        self.ref = ref
        self._pidfd = pidfd
        self._exit: ExitStatus | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None

    @property
    def pid(self) -> int:
        return self.ref.pid

    @property
    def alive(self) -> bool:
        """False as soon as it ended, reaped or not."""
        return not self._poll()

    @property
    def exit_status(self) -> ExitStatus | None:
        """``None`` while it lives."""
        if self._poll():
            return self._exit
        return None

    def _poll(self) -> bool:
        if self._exit is not None:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(0):
            return False
        self._exit = _reap(self._pidfd)
        return True

    async def wait_exit(self, timeout_s: float | None = None) -> ExitStatus:
        """Wait until it ends (``None``: as long as it lives). Any number of tasks of one loop may wait.

        Raises ``timeout``.
        """
        if self._poll():
            return self._exit or ExitStatus()
        if self._ended is None:
            self._loop = asyncio.get_running_loop()
            self._ended = self._loop.create_future()
            self._loop.add_reader(self._pidfd, self._on_readable)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._ended)
        except TimeoutError as error:
            raise MicaError(
                Code.TIMEOUT, f"process {self.pid} did not end within {timeout_s} s", retryable=True
            ) from error
        return self._exit or ExitStatus()

    def _on_readable(self) -> None:
        self._poll()
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._pidfd)
        if self._ended is not None and not self._ended.done() and not self._ended.get_loop().is_closed():
            self._ended.set_result(None)
        self._loop = None

    def kill(self, signum: int = signal.SIGKILL) -> bool:
        """Send a signal; false when it has ended already. Raises ``forbidden``."""
        if self._poll():
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, signum)
        except ProcessLookupError:
            return False
        except PermissionError as error:
            raise MicaError(Code.FORBIDDEN, f"not allowed to signal process {self.pid}") from error
        return True

    def raise_file_limit(self, size: int) -> None:
        """Let it write files of up to ``size`` bytes if it may not already: prlimit(2). Raises ``PermissionError``."""
        if self._poll():
            return
        soft, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        if soft == resource.RLIM_INFINITY or soft >= size:
            return
        new_hard = hard if hard == resource.RLIM_INFINITY or hard >= size else size
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, new_hard))

    async def terminate(self, grace_s: float, kill_timeout_s: float = 10.0) -> ExitStatus:
        """SIGTERM, ``grace_s`` seconds to comply, then SIGKILL. Raises ``timeout`` when even that does not end it."""
        if self.kill(signal.SIGTERM):
            try:
                return await self.wait_exit(grace_s)
            except MicaError as error:
                if error.code is not Code.TIMEOUT:
                    raise
                self.kill(signal.SIGKILL)
        return await self.wait_exit(kill_timeout_s)

    def close(self) -> None:
        """Let go of the pidfd; tasks still waiting are released. Idempotent."""
        if self._pidfd >= 0:
            self._poll()
            self._stop_watching()
            os.close(self._pidfd)
            self._pidfd = -1
            self._exit = self._exit or ExitStatus()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def spawn(
    argv: Sequence[str],
    *,
    stdout: Path | int | None = None,
    stderr: Path | int | None = None,
    stdin: int | None = None,
    pass_fds: Sequence[int] = (),
    cwd: Path | None = None,
    env: Mapping[str, str] = CLEAN_ENVIRONMENT,
    umask: int = 0o077,
    restore_signals: bool = True,
    limits: ResourceLimits | None = None,
) -> LiveProcess:
    """Start a program in a session of its own, so that no terminal and no daemon takes it along.

    ``stdout`` and ``stderr`` are files to append to (created 0600), descriptors, or ``None`` for /dev/null; they may
    be the same path. Blocks until exec (about a millisecond: vfork, no Python runs in the child, so threads of the
    daemon cannot dead-lock it). ``limits`` go through ``prlimit``, which replaces itself by the program: one pid.

    Raises ``host-lacks`` when the program is missing, ``command-failed`` when it cannot be executed.
    """
    program = shutil.which(argv[0], path=env.get("PATH", ""))
    if program is None:
        raise MicaError(Code.HOST_LACKS, f"the program {argv[0]!r} is not on this host", details={"program": argv[0]})
    options = limits.options() if limits is not None else []
    command = [*(("prlimit", *options, "--") if options else ()), program, *argv[1:]]
    opened: list[int] = []

    def output(target: Path | int | None) -> int:
        if isinstance(target, Path):
            opened.append(os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _LOG_MODE))
            return opened[-1]
        return subprocess.DEVNULL if target is None else target

    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=output(stdout),
            stderr=output(stderr),
            pass_fds=tuple(pass_fds),
            cwd=cwd,
            env=dict(env),
            umask=umask,
            restore_signals=restore_signals,
            start_new_session=True,
        )
    except OSError as error:
        raise MicaError(Code.COMMAND_FAILED, f"{argv[0]} cannot be started: {error.strerror}") from error
    finally:
        for descriptor in opened:
            os.close(descriptor)
    # Nobody has reaped it, so the pid is still its own even if it has ended already.
    pidfd = os.pidfd_open(process.pid)
    process.returncode = 0  # the pidfd takes over; Popen must neither wait for it nor warn that it still runs
    ref = reference(process.pid)
    assert ref is not None
    return LiveProcess(ref, pidfd)


def reference(pid: int) -> ProcessRef | None:
    """The reference of the process that has this pid now (a zombie included); ``None`` when there is none."""
    stat = _stat(pid)
    return None if stat is None else ProcessRef(pid, int(stat[19]), boot_id())


def find(ref: ProcessRef) -> LiveProcess | None:
    """The process that ``ref`` names, held by a pidfd; ``None`` when it ended, or its pid belongs to another now."""
    try:
        pidfd = os.pidfd_open(ref.pid)
    except ProcessLookupError:
        return None
    except OSError as error:  # EINVAL: a thread, or no pid at all; so not the process that was meant
        if ref.pid > 0 and error.errno in (errno.EMFILE, errno.ENFILE):
            raise MicaError(Code.BUSY, "no file descriptor is left to watch a process", retryable=True) from error
        return None
    live = LiveProcess(ref, pidfd)
    if reference(ref.pid) == ref and live.alive:
        return live
    live.close()
    return None


def usage(ref: ProcessRef, *, pss: bool = False) -> Usage | None:
    """What the process uses; ``None`` when it ended.

    ``pss=True`` walks its page tables (``smaps_rollup``): milliseconds per GiB, so not for every tick of a watcher.
    """
    proportional = _pss(ref.pid) if pss else None
    # In this order there; none of them in what has no memory any more.
    seen = _kib(Path(f"/proc/{ref.pid}/status"), "RssAnon:", "RssShmem:", "VmSwap:")
    anonymous, shared, swapped = seen if len(seen) == 3 else (0, 0, 0)
    # Looked at last: as it is the same process now, what was read before is of it.
    stat = _stat(ref.pid)
    if stat is None or stat[0] in "ZX" or int(stat[19]) != ref.start_ticks or boot_id() != ref.boot_id:
        return None
    ticks = int(stat[11]) + int(stat[12])
    return Usage(
        cpu_seconds=ticks / os.sysconf("SC_CLK_TCK"),
        rss=int(stat[21]) * os.sysconf("SC_PAGE_SIZE"),
        held=anonymous + shared,
        own=anonymous + swapped,
        pss=proportional,
    )


def may_limit_others() -> bool:
    """Whether this process may change the limits of processes of other users (capabilities(7), CAP_SYS_RESOURCE)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & 1 << _CAP_SYS_RESOURCE)
    return False


def boot_id() -> str:
    """The kernel's random name of this boot (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _stat(pid: int) -> list[str] | None:
    """Fields 3 and on of /proc/PID/stat; the name before them may hold blanks and brackets (proc(5))."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def _pss(pid: int) -> int | None:
    return next(iter(_kib(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")), None)


def _kib(path: Path, *names: str) -> list[int]:
    """The lines of these names in a file of ``name: number kB``, in bytes; none when it cannot be read."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith(names)]


def _reap(pidfd: int) -> ExitStatus:
    """Take the exit status of an ended child; of a stranger it stays unknown."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return ExitStatus()
    if result is None:
        return ExitStatus()
    if result.si_code == os.CLD_EXITED:
        return ExitStatus(code=result.si_status)
    return ExitStatus(signal=result.si_status)
