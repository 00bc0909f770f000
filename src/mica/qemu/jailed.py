"""Processes in a jail: start one, find it again after the daemon died, learn how it ended.

bubblewrap stays outside as the *keeper*: it does nothing but wait for the program, and writes the exit status into
the status file even when nobody listens any more, so a restarted daemon still learns how a VM ended. The keeper dying
does not end the program.

    spawned ──pid told──► held (limits and control groups are set here) ──let go──► mounts, drops rights ──► program

While it is held, the program waits in a read of a pipe that it holds open for writing itself: when the daemon dies at
that moment it stays held for ever, never runs unlimited, and :func:`find_left` finds it by the status file.
Source: bwrap(1), options ``--info-fd``, ``--block-fd``, ``--json-status-fd``, ``--as-pid-1``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Self

import msgspec

from mica.host.processes import ExitStatus, LiveProcess, find, reference, spawn
from mica.model.errors import Code, MicaError
from mica.model.vm import ProcessRef
from mica.qemu.jail import Jail, JailFds, JailKind, JailSpec, advice

_KEEPER_EXIT_S = 5.0
_LAST_WORDS = 2000


class JailedRefs(msgspec.Struct, frozen=True):
    """All that a later daemon needs to hold a jailed process again. Without a jail there is no keeper."""

    process: ProcessRef
    keeper: ProcessRef | None
    status_file: str


class Jailed:
    """A jailed process held by pidfds. Closing lets go of it and does not end it."""

    def __init__(self, refs: JailedRefs, process: LiveProcess, keeper: LiveProcess | None) -> None:
        self.refs = refs
        self.process = process
        self.keeper = keeper

    async def wait_exit(self, timeout_s: float | None = None) -> ExitStatus:
        """Wait until the program has ended (``None``: as long as it runs). Raises ``timeout``.

        A status above 128 from the keeper is a signal's number plus 128, as bubblewrap tells it.
        """
        status = await self.process.wait_exit(timeout_s)
        if self.keeper is None:
            return status
        status = await self.keeper.wait_exit(_KEEPER_EXIT_S)
        code = status.code if status.code is not None else exit_code(Path(self.refs.status_file))
        if code is None:
            return ExitStatus()
        return ExitStatus(signal=code - 128) if code > 128 else ExitStatus(code=code)

    def close(self) -> None:
        self.process.close()
        if self.keeper is not None:
            self.keeper.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def start(
    jail: Jail,
    argv: Sequence[str],
    spec: JailSpec,
    *,
    status_file: Path,
    output: Path,
    pass_fds: Sequence[int] = (),
    before: Callable[[int], Awaitable[None]] | None = None,
    timeout_s: float = 10.0,
) -> Jailed:
    """Start ``argv`` jailed and return as soon as it was let go; it has not necessarily reached its own code then.

    ``output`` is the file that its stdout and stderr are appended to. ``before`` is awaited with a pid to put into
    control groups, for the keeper and for the program, before the program runs. Without a jail the program runs
    already while ``before`` is awaited. On any failure, cancelling included, nothing is left running.

    Raises ``host-lacks`` when namespaces are refused, ``command-failed`` when a file of ``spec`` is not there (whether
    that is noticed here or ends the program with status 1 is up to bubblewrap's pace), ``timeout``.
    """
    if jail.kind is JailKind.OFF:
        return await _start_bare(
            jail, argv, spec, status_file=status_file, output=output, pass_fds=pass_fds, before=before
        )
    with _descriptors(status_file) as (info_read, info_write, hold, fds):
        keeper = spawn(
            jail.wrap(argv, spec, fds),
            stdout=output,
            stderr=output,
            pass_fds=(*pass_fds, fds.info, fds.block, fds.status),
            restore_signals=spec.limits.file_size is None,
        )
        info_write.close()
        try:
            async with asyncio.timeout(timeout_s):
                process = await _told(info_read, keeper, jail, output)
                try:
                    await _hold(process, keeper, spec, before)
                except BaseException as error:
                    ended = not process.alive
                    process.kill()
                    await process.wait_exit(_KEEPER_EXIT_S)
                    process.close()
                    if ended and isinstance(error, OSError):  # bubblewrap gave up; its process cannot be held
                        raise await _refused(keeper, jail, output) from error
                    raise
            os.write(hold, b"x")
        except TimeoutError as error:
            await _abort(keeper)
            raise MicaError(Code.TIMEOUT, f"the jail did not stand within {timeout_s} s", retryable=True) from error
        except BaseException:
            await _abort(keeper)
            raise
    return Jailed(JailedRefs(process.ref, keeper.ref, str(status_file)), process, keeper)


async def _start_bare(
    jail: Jail,
    argv: Sequence[str],
    spec: JailSpec,
    *,
    status_file: Path,
    output: Path,
    pass_fds: Sequence[int],
    before: Callable[[int], Awaitable[None]] | None,
) -> Jailed:
    process = spawn(
        jail.wrap(argv, spec),
        stdout=output,
        stderr=output,
        pass_fds=pass_fds,
        limits=spec.limits,
        restore_signals=spec.limits.file_size is None,
    )
    try:
        status_file.write_text(json.dumps({"child-pid": process.pid}) + "\n", encoding="ascii")
        if process.alive:
            Path(f"/proc/{process.pid}/oom_score_adj").write_text(str(spec.oom_score_adj), encoding="ascii")
        if before is not None:
            await before(process.pid)
    except BaseException:
        process.kill()
        await process.wait_exit(_KEEPER_EXIT_S)
        process.close()
        raise
    return Jailed(JailedRefs(process.ref, None, str(status_file)), process, None)


def adopt(refs: JailedRefs) -> Jailed | None:
    """Hold a process that was started earlier, perhaps by another daemon; ``None`` when it has ended."""
    process = find(refs.process)
    if process is None:
        return None
    return Jailed(refs, process, find(refs.keeper) if refs.keeper is not None else None)


def find_left(status_file: Path, marker: str) -> Jailed | None:
    """What an interrupted start left behind: the process whose pid the status file tells, if it is still the one.

    ``marker`` must occur in its command line, which a pid's next owner will not have: the VM's run directory.
    """
    number = _status(status_file).get("child-pid")
    if not isinstance(number, int):
        return None
    ref = reference(number)
    process = find(ref) if ref is not None else None
    if process is None:
        return None
    command = Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace")
    if marker not in command or not process.alive:
        process.close()
        return None
    return Jailed(JailedRefs(process.ref, None, str(status_file)), process, None)


def exit_code(status_file: Path) -> int | None:
    """The exit status that the keeper noted; ``None`` while the program runs, or when the keeper was killed."""
    code = _status(status_file).get("exit-code")
    return code if isinstance(code, int) else None


def _status(status_file: Path) -> dict[str, object]:
    """bubblewrap writes several JSON objects, one per line; the later ones add keys."""
    out: dict[str, object] = {}
    try:
        text = status_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return out
    for line in text.splitlines():
        try:
            out |= json.loads(line)
        except ValueError:
            break  # a line half written: the host went down just then
    return out


@contextmanager
def _descriptors(status_file: Path) -> Iterator[tuple[int, IO[bytes], int, JailFds]]:
    """Read and write end of the pid pipe, write end of the hold pipe, what the child gets; all closed in the end."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    with ExitStack() as stack:

        def held(descriptor: int) -> int:
            stack.callback(os.close, descriptor)
            return descriptor

        status = held(os.open(status_file, flags, 0o600))

        # Opened anew for both directions (pipe(7)): the child itself keeps its pipe from ending when we die. Else the
        # keeper would fail to tell a dead daemon the pid, and end before it has written that into the status file.
        def both_ways(pipe: int) -> int:
            return os.open(f"/proc/self/fd/{pipe}", os.O_RDWR | os.O_CLOEXEC)

        info_read, info_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(held(info_read), False)
        os.close(info_write)
        told = stack.enter_context(os.fdopen(both_ways(info_read), "r+b", buffering=0))
        hold_read, hold_write = map(held, os.pipe2(os.O_CLOEXEC))
        yield info_read, told, hold_write, JailFds(info=told.fileno(), block=held(both_ways(hold_read)), status=status)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, wake)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


async def _told(info_read: int, keeper: LiveProcess, jail: Jail, output: Path) -> LiveProcess:
    """Wait until bubblewrap tells the program's pid, and hold that process."""
    text = b""
    while b"}" not in text:
        await _readable(info_read)
        chunk = os.read(info_read, 4096)
        if not chunk:
            raise await _refused(keeper, jail, output)
        text += chunk
    ref = reference(json.loads(text)["child-pid"])
    process = find(ref) if ref is not None else None
    if process is None:
        raise await _refused(keeper, jail, output)
    return process


async def _refused(keeper: LiveProcess, jail: Jail, output: Path) -> MicaError:
    status = await keeper.wait_exit(_KEEPER_EXIT_S)
    words = output.read_bytes()[-_LAST_WORDS:].decode(errors="replace").strip().splitlines()
    last = words[-1] if words else str(status)
    if "No such file" in last:
        return MicaError(Code.COMMAND_FAILED, f"the jail could not be made: {last}")
    return MicaError(Code.HOST_LACKS, f"the jail was refused: {last}", hint=advice(jail.kind is JailKind.ROOT))


async def _hold(
    process: LiveProcess, keeper: LiveProcess, spec: JailSpec, before: Callable[[int], Awaitable[None]] | None
) -> None:
    """Set what must hold before the program's first instruction. It is bubblewrap still, waiting to be let go."""
    spec.limits.apply(process.pid)
    Path(f"/proc/{process.pid}/oom_score_adj").write_text(str(spec.oom_score_adj), encoding="ascii")
    if before is not None:
        # The keeper too: stopping the daemon's own group must not take away who notes the exit status.
        await before(keeper.pid)
        await before(process.pid)


async def _abort(keeper: LiveProcess) -> None:
    """End a half-made jail: its child would outlive the keeper, so stop the keeper, end the child, then the keeper."""
    if keeper.kill(signal.SIGSTOP):
        try:
            children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text(encoding="ascii").split()
        except (FileNotFoundError, ProcessLookupError):
            children = []
        for child in children:
            ref = reference(int(child))
            process = find(ref) if ref is not None else None
            if process is not None:
                process.kill()
                await process.wait_exit(_KEEPER_EXIT_S)
                process.close()
        keeper.kill()
    await keeper.wait_exit(_KEEPER_EXIT_S)
    keeper.close()
