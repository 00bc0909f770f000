"""Ask a short-lived program something: give it its input, take its answer, leave nothing of it behind.

For programs that live as long as a VM there is :mod:`mica.host.processes`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mica.host.processes import CLEAN_ENVIRONMENT
from mica.model.errors import Code, MicaError

MAX_OUTPUT = 16 * 1024**2
_KILLED_S = 5.0


class Answer(NamedTuple):
    """How a program ended (a negative status is a signal) and what it wrote."""

    status: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        return self.out.decode(errors="replace")

    @property
    def last_words(self) -> str:
        """The last line of its messages, of its output when it left none, cut to what a person will read."""
        for stream in (self.err, self.out):
            lines = stream[-4000:].decode(errors="replace").strip().splitlines()
            if lines:
                return lines[-1].strip()[:300]
        return ""


async def ask(
    argv: Sequence[str],
    *,
    timeout_s: float,
    stdin: bytes = b"",
    env: Mapping[str, str] = CLEAN_ENVIRONMENT,
    pass_fds: Sequence[int] = (),
    max_output: int = MAX_OUTPUT,
    farewell: tuple[bytes, bytes] | None = None,
    watch: Callable[[bytes], None] = lambda _: None,
) -> Answer:
    """Run ``argv`` (``argv[0]`` is a path) to its end, in a session of its own.

    ``farewell`` is what is written to its standard input last, once something is in its output: ``(what, then)``.
    ``watch`` is given its standard output as it comes.

    When this returns or raises, also on cancellation, the program and its process group are killed and reaped.
    One that hangs in the kernel, where no signal reaches it, is left to its fate after another five seconds.
    Raises ``host-lacks`` when it cannot be executed, ``timeout`` after ``timeout_s`` seconds (``details["said"]`` is
    the end of its output), and ``command-failed`` when it writes more than ``max_output`` bytes to one stream. Any
    exit status is an answer.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(env),
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    except OSError as error:
        raise MicaError(Code.HOST_LACKS, f"{argv[0]} cannot be executed: {error.strerror or error}") from error
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = bytearray(), bytearray()
    until, last = farewell or (b"", b"")
    heard = asyncio.Event()
    try:
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
            group.create_task(_feed(process, stdin, heard, last))
            group.create_task(_take(process.stdout, out, argv[0], max_output, until, heard, watch))
            group.create_task(_take(process.stderr, err, argv[0], max_output))
    except TimeoutError as error:
        said = out[-4000:].decode(errors="replace")
        raise MicaError(
            Code.TIMEOUT, f"{argv[0]} did not end within {timeout_s:g} s", retryable=True, details={"said": said}
        ) from error
    except ExceptionGroup as several:
        raise several.exceptions[0] from several
    finally:
        await _end(process)
    assert process.returncode is not None
    return Answer(process.returncode, bytes(out), bytes(err))


async def _feed(process: asyncio.subprocess.Process, data: bytes, heard: asyncio.Event, last: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read what it does not want
        process.stdin.write(data)
        await process.stdin.drain()
        if last:
            await heard.wait()
            process.stdin.write(last)
            await process.stdin.drain()
        process.stdin.close()
        await process.stdin.wait_closed()
    await process.wait()


async def _take(
    stream: asyncio.StreamReader,
    into: bytearray,
    name: str,
    limit: int,
    until: bytes = b"",
    heard: asyncio.Event | None = None,
    watch: Callable[[bytes], None] = lambda _: None,
) -> None:
    """Read to the end; ``heard`` is set when ``until`` has come, and at the end."""
    while chunk := await stream.read(65536):
        since = max(0, len(into) - len(until))
        into += chunk
        watch(chunk)
        if len(into) > limit:
            raise MicaError(Code.COMMAND_FAILED, f"{name} wrote more than {limit} bytes", details={"limit": limit})
        if heard is not None and until in into[since:]:
            heard.set()
    if heard is not None:
        heard.set()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill what is left and read the pipes to their end, which is what closes them; a second cancellation waits."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    cleaner = asyncio.ensure_future(_drain(process))
    while not cleaner.done():
        with contextlib.suppress(asyncio.CancelledError, TimeoutError):
            await asyncio.shield(cleaner)
    with contextlib.suppress(TimeoutError):
        cleaner.result()


async def _drain(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    async with asyncio.timeout(_KILLED_S):
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            while await stream.read(65536):
                pass
        await process.wait()
