"""Running the programs that make images: with a deadline, with their progress seen, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from mica.images.files import shielded
from mica.model.errors import Code, MicaError

Line = Callable[[str], None]

# Fixed, because these programs live in sbin directories that an ordinary user's PATH lacks.
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# How long a program may take to clean up after SIGTERM before its whole process group is killed.
GRACE_S = 20.0
_LAST_LINES = 12
_LINE_LIMIT = 2000

# Which Debian and Ubuntu package has the program.
PACKAGES = {
    "apt-config": "apt",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "mcopy": "mtools",
    "mformat": "mtools",
    "mke2fs": "e2fsprogs",
    "mmd": "mtools",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "prlimit": "util-linux",
    "qemu-img": "qemu-utils",
    "setpriv": "util-linux",
    "sfdisk": "fdisk",
    "tar": "tar",
}


class CommandError(MicaError):
    """A program ended with a status other than 0. ``status`` is negative for a signal; ``words`` its last lines."""

    def __init__(self, program: str, status: int, words: Sequence[str], *, hint: str = "") -> None:
        said = "; ".join(words) or "it said nothing"
        how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
        super().__init__(
            Code.COMMAND_FAILED,
            f"{program} {how}: {said}",
            hint=hint,
            details={"program": program, "status": status, "last_words": list(words)},
        )
        self.program, self.status, self.words = program, status, tuple(words)


class Commands:
    """Starts programs with a clean environment.

    ``environment`` is added to it: proxies, for example, which only the daemon's settings may read.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = {"PATH": SEARCH_PATH, "LC_ALL": "C.UTF-8", "HOME": "/", **(environment or {})}

    def with_environment(self, environment: Mapping[str, str]) -> Commands:
        """The same with more in the environment of every program."""
        return Commands({**self._environment, **environment})

    def find(self, program: str) -> str:
        """The program's path. Raises ``host-lacks`` naming the package that has it."""
        found = shutil.which(program, path=self._environment["PATH"])
        if found is None:
            package = PACKAGES.get(program, program)
            raise MicaError(
                Code.HOST_LACKS,
                f"the program {program} is not installed",
                hint=f"apt-get install {package}",
                details={"program": program, "package": package},
            )
        return found

    async def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        stdout: Line | IO[bytes] | None = None,
        stderr: Line | None = None,
        stdin: IO[bytes] | None = None,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        accept: Sequence[int] = (0,),
        stop: signal.Signals = signal.SIGTERM,
    ) -> int:
        """Run a program to its end and return its status.

        ``stdout`` and ``stderr`` get the lines without their ends, as they come; a file as ``stdout`` gets the bytes.
        When the deadline passes or the caller is cancelled, the program's process group gets ``stop`` and ``GRACE_S``
        seconds to clean up, then SIGKILL. When our own process dies, the program gets ``stop``.

        Raises :class:`CommandError` for a status not in ``accept``, ``timeout``, ``host-lacks``.
        """
        loop = asyncio.get_running_loop()
        program = self.find(argv[0])
        # A program ends with its starter, however that ends.
        starter = (self.find("setpriv"), "--pdeathsig", stop.name.removeprefix("SIG"), "--", program)
        transport, output = await loop.subprocess_exec(
            lambda: _Output(stdout if callable(stdout) else None, stderr),
            *starter,
            *argv[1:],
            stdin=stdin if stdin is not None else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if stdout is None or callable(stdout) else stdout,
            stderr=asyncio.subprocess.PIPE,
            cwd=cwd,
            env={**self._environment, **(environment or {})},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(timeout_s):
                await output.exited.wait()
                # A straggler would hold the pipes open.
                _signal_group(transport.get_pid(), signal.SIGKILL)
                await output.closed.wait()
        except TimeoutError as error:
            raise MicaError(
                Code.TIMEOUT,
                f"{argv[0]} did not end within {timeout_s:g} s; last words: {'; '.join(output.words) or 'none'}",
                hint="look at the load of this host and at its network, then try again",
                retryable=True,
            ) from error
        finally:
            await shielded(_end(transport, output, stop))
        status = transport.get_returncode()
        assert status is not None
        if status not in accept:
            raise CommandError(argv[0], status, list(output.words))
        return status

    async def output(self, argv: Sequence[str], *, timeout_s: float, cwd: Path | None = None) -> str:
        """What a program writes to its standard output (a few lines; longer lines are cut)."""
        lines: list[str] = []
        await self.run(argv, timeout_s=timeout_s, stdout=lines.append, cwd=cwd)
        return "\n".join(lines)


class _Output(asyncio.SubprocessProtocol):
    """Hands over lines, ended by a newline or, as progress bars do, by a carriage return, and cut to a bound."""

    def __init__(self, stdout: Line | None, stderr: Line | None) -> None:
        self.words: deque[str] = deque(maxlen=_LAST_LINES)
        self.exited = asyncio.Event()
        self.closed = asyncio.Event()
        self._see = {1: stdout, 2: stderr}
        self._rest = {1: b"", 2: b""}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *whole, rest = (self._rest[fd] + data).replace(b"\r", b"\n").split(b"\n")
        self._rest[fd] = rest[:_LINE_LIMIT]
        for line in whole:
            self._hand_over(fd, line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._hand_over(fd, self._rest.pop(fd, b""))

    def process_exited(self) -> None:
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """The process has ended and its pipes are closed."""
        self.closed.set()

    def _hand_over(self, fd: int, raw: bytes) -> None:
        line = raw[:_LINE_LIMIT].decode(errors="replace").rstrip()
        if line:
            if fd == 2:
                self.words.append(line)
            see = self._see[fd]
            if see is not None:
                see(line)


async def _end(transport: asyncio.SubprocessTransport, output: _Output, stop: signal.Signals) -> None:
    """Make sure that the process and its group are gone, and the pipes closed."""
    try:
        if not output.exited.is_set():
            _signal_group(transport.get_pid(), stop)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GRACE_S):
                    await output.exited.wait()
            _signal_group(transport.get_pid(), signal.SIGKILL)
            await output.exited.wait()
    finally:
        transport.close()


def _signal_group(group: int, number: signal.Signals) -> None:
    # The group outlives its leader while members are left, and only then does its id stay ours.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
