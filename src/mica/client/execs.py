"""Commands in a guest: their input, output and exit status, live, for as long as they run.

A command belongs to the daemon, not to the connection: its output is read by offset, so a lost connection loses none.
Input that was on its way when a connection was lost may have arrived or not, so then the command is not fed further.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import msgspec

from mica.client.link import Link
from mica.client.together import alongside
from mica.client.transport import Params, Transport, path_of, problem_error
from mica.model.errors import Code, MicaError
from mica.model.exec import ExecSpec, ExecState, ExecView, check_exec

Channel = Literal["stdout", "stderr"]
Stdin = bytes | str | AsyncIterable[bytes] | None

MAX_OUTPUT = 64 * 1024**2
_CHUNK = 32 * 1024
_STDIN = b"\x00"
_CHANNELS: dict[int, Channel] = {1: "stdout", 2: "stderr"}


@dataclass(frozen=True)
class ExecResult:
    """How a command ended. ``str()`` is its standard output as text, without the last line break.

    ``exit_code`` is its exit status, or 128 and the number of the signal that ended it.
    """

    argv: tuple[str, ...]
    exit_code: int
    stdout: bytes
    stderr: bytes

    def __str__(self) -> str:
        return self.stdout.decode(errors="replace").removesuffix("\n")

    def check(self) -> Self:
        """Return itself if the exit status is 0. Raises ``command-failed`` with the last words of the command."""
        if self.exit_code:
            last = self.stderr.decode(errors="replace").strip()[-500:]
            raise MicaError(
                Code.COMMAND_FAILED,
                f"{self.argv[0]} ended in the guest with status {self.exit_code}" + (f": {last}" if last else ""),
                hint="with check=False its result is returned",
                details={"argv": list(self.argv), "exit_code": self.exit_code},
            )
        return self


def exit_code(record: ExecView) -> int:
    """The exit status as a shell counts it. Raises what the command failed with: ``timeout``, ``agent-failed`` …"""
    if record.error is not None:
        raise MicaError.of(record.error)
    if record.exit_code is not None:
        return record.exit_code
    argv0 = record.spec.argv[0]
    if record.state is ExecState.KILLED:
        return 128 + (record.signal or 9)
    if record.state is ExecState.LOST:
        raise MicaError(
            Code.AGENT_UNAVAILABLE, f"the guest that ran {argv0} is gone", hint="its output up to then is whole"
        )
    raise MicaError(Code.STATE_CONFLICT, f"{argv0} has not ended: it is {record.state}", hint="wait for it first")


class ExecStream:
    """A running command, as an asynchronous context manager and an iterator over ``(channel, bytes)``.

        async with vm.exec_stream("tail", "-f", "/var/log/syslog") as command:
            async for channel, data in command:
                …

    Leaving it leaves the command running; ``kill`` ends it. After the iteration has ended, ``record`` and ``result``
    tell how the command did.
    """

    def __init__(self, transport: Transport, vm: str, spec: ExecSpec) -> None:
        self._transport = transport
        self._vm = vm
        self._spec = check_exec(spec)
        self._offsets: dict[str, int] = {"stdout": 0, "stderr": 0}
        self._link: Link | None = None
        self._record: ExecView | None = None
        self._fed_on: int | None = None  # the connection that carried input, counted by reconnections
        self.input_refused: MicaError | None = None
        """Why the command takes no more input; what is written then is dropped, as for a program that has ended."""

    async def __aenter__(self) -> Self:
        path = path_of("vms", self._vm, "execs")
        # Not replayed: the daemon starts commands without an idempotency key.
        self._record = await self._transport.request("POST", path, ExecView, body=self._spec, replay=False)
        self._link = Link(self._transport, path_of("vms", self._vm, "execs", self.id, "stream"), self._where)
        await self._link.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._link is not None:
            await self._link.close()

    def _where(self) -> Params:
        return {**self._offsets}

    @property
    def record(self) -> ExecView:
        """What is known of it: as it was when it began, and at the end as it ended."""
        assert self._record is not None, "enter it first"
        return self._record

    @property
    def id(self) -> str:
        return self.record.id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Channel, bytes]:
        """The next output, from where the last ended, also after a lost connection."""
        assert self._link is not None, "enter it first"
        while True:
            frame = await self._link.receive()
            if frame is None:
                raise StopAsyncIteration
            if isinstance(frame, str):
                self._record = msgspec.json.decode(frame, type=ExecView)
            elif frame[:1] == _STDIN:
                self.input_refused = problem_error(frame[1:], 0, "standard input")
            elif len(frame) > 1 and frame[0] in _CHANNELS:
                channel = _CHANNELS[frame[0]]
                self._offsets[channel] += len(frame) - 1
                return channel, frame[1:]

    async def write(self, data: bytes) -> None:
        """Give it input. Raises ``daemon-unreachable`` when the connection that carried input was lost."""
        for start in range(0, len(data), _CHUNK):
            if self.input_refused is not None:
                return
            link = self._feedable()
            self._fed_on = link.reconnects
            await link.send(_STDIN + data[start : start + _CHUNK], again=False)

    async def close_stdin(self) -> None:
        """Its input ends here. Raises like :meth:`write`: what is not whole must not look as if it were."""
        await self._feedable().send(_STDIN, again=self._fed_on is None)

    def _feedable(self) -> Link:
        assert self._link is not None, "enter it first"
        if self._fed_on not in (None, self._link.reconnects):
            raise MicaError(
                Code.DAEMON_UNREACHABLE,
                "the connection was lost while input was sent: nobody knows how much of it arrived",
                hint=f"the command goes on in the guest without it, as exec {self.id}",
            )
        return self._link

    async def kill(self, signum: int = 15) -> None:
        """Send it a signal of the guest's, SIGTERM by default."""
        path = path_of("vms", self._vm, "execs", self.id, "kill")
        await self._transport.request("POST", path, ExecView, body={"signal": signum}, replay=False)

    async def wait(self) -> ExecView:
        """Pass over what it still says and return how it ended."""
        async for _channel, _data in self:
            pass
        return self.record

    def result(self, stdout: bytes = b"", stderr: bytes = b"") -> ExecResult:
        """How it ended. Raises ``timeout`` and what else it failed with; ``state-conflict`` while it runs."""
        return ExecResult(self._spec.argv, exit_code(self.record), stdout, stderr)


async def run(stream: ExecStream, stdin: Stdin, *, max_output: int = MAX_OUTPUT) -> ExecResult:
    """Run a command to its end and keep its output. Raises ``too-large`` beyond ``max_output`` bytes of it."""
    kept: dict[Channel, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

    async def keep() -> None:
        async for channel, data in stream:
            kept[channel] += data
            if len(kept["stdout"]) + len(kept["stderr"]) > max_output:
                raise MicaError(
                    Code.TOO_LARGE,
                    f"the command's output is larger than {max_output} bytes; it goes on in the guest",
                    hint="read it with exec_stream, or write it to a file and copy that out",
                )

    async with stream:
        await alongside(keep(), _feed(stream, stdin))
    return stream.result(bytes(kept["stdout"]), bytes(kept["stderr"]))


async def _feed(stream: ExecStream, stdin: Stdin) -> None:
    if stdin is None:
        return
    if isinstance(stdin, str):
        stdin = stdin.encode()
    if isinstance(stdin, bytes):
        await stream.write(stdin)
    else:
        async for chunk in stdin:
            await stream.write(chunk)
    await stream.close_stdin()


def make_spec(
    argv: tuple[str, ...],
    *,
    stdin: bool,
    env: Mapping[str, str] | None,
    user: str | None,
    cwd: str | None,
    timeout_s: float | None,
) -> ExecSpec:
    """The specification of a command; words left empty are left out."""
    return ExecSpec(
        argv=argv, stdin=stdin, env=dict(env or {}), user=user or None, cwd=cwd or None, timeout_s=timeout_s
    )
