"""Running a command in a guest as if it were here: streams, signals and exit status. For ``run`` and ``vm exec``."""

from __future__ import annotations

import asyncio
import base64
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Group, Parameter

from mica.cli.context import Context
from mica.cli.options import Duration, Flag, Many
from mica.cli.streams import chunks, is_given
from mica.cli.values import pairs
from mica.client.execs import ExecStream
from mica.client.handle import VmHandle
from mica.client.together import alongside
from mica.model.errors import MicaError

COMMAND = Group("The command in the guest", sort_key=20)


@Parameter(name="*", group=COMMAND)
@dataclass(frozen=True, kw_only=True)
class GuestOptions:
    """How a command in a guest is run."""

    interactive: Annotated[Flag, Parameter(name=["--interactive", "-i"], negative=())] = False
    """Give it what is typed here. What is piped in here is given without it."""

    user: str | None = None
    """The guest's user to run as; the agent's own (root) by default."""

    env: Annotated[Many, Parameter(name=["--env", "-e"], negative=())] = ()
    """A variable of its environment, as KEY=VALUE; may be repeated."""

    cwd: str | None = None
    """The directory to run in."""

    timeout: Duration | None = None
    """End it after this time, for example 10m."""


NO_GUEST_OPTIONS = GuestOptions()


async def run_in_guest(ctx: Context, vm: VmHandle, argv: Sequence[str], how: GuestOptions) -> int:
    """Run ``argv``; its output is ours, its exit status is returned (128 and the signal that ended it)."""
    fd = ctx.world.stdin_fd()
    feed = fd is not None and (how.interactive or is_given(fd))
    stream = vm.exec_stream(
        *argv, stdin=feed, env=pairs(how.env, "env"), user=how.user, cwd=how.cwd, timeout_s=how.timeout
    )
    kept: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

    async def show() -> None:
        async for channel, data in stream:
            if ctx.json:
                kept[channel] += data
            else:
                ctx.world.write_bytes(data, error=channel == "stderr")

    async with stream:
        passer = _Signals(ctx, stream)
        helpers = [passer.run()]
        if feed and fd is not None:
            helpers.append(_feed(stream, fd))
        try:
            with ctx.interrupts.taken_by(passer.take):
                await alongside(show(), *helpers)
        except asyncio.CancelledError:
            if not vm.rm:
                ctx.say(f"the command goes on in {vm.name}")
            raise
    result = stream.result()
    if ctx.json:
        ctx.emit(_document(vm, result.exit_code, kept), str)
    return result.exit_code


def _document(vm: VmHandle, exit_code: int, kept: dict[str, bytearray]) -> dict[str, Any]:
    """What came, as text; bytes that are no UTF-8 in base64 as well."""
    out: dict[str, Any] = {"vm": vm.name, "exit_code": exit_code}
    for name, data in kept.items():
        out[name] = data.decode(errors="replace")
        if out[name].encode() != data:
            out[f"{name}_base64"] = base64.b64encode(data).decode()
    return out


async def _feed(stream: ExecStream, fd: int) -> None:
    async for data in chunks(fd):
        await stream.write(data)
    await stream.close_stdin()


class _Signals:
    """Passes our signals on to the command: the first as it is, a second Ctrl-C as SIGKILL; a third is ours."""

    def __init__(self, ctx: Context, stream: ExecStream) -> None:
        self._ctx = ctx
        self._stream = stream
        self._came = 0
        self._waiting: asyncio.Queue[int] = asyncio.Queue(maxsize=4)

    def take(self, signum: int) -> bool:
        self._came += 1
        if self._came > 2 or self._waiting.full():
            return False
        self._waiting.put_nowait(signum if self._came == 1 else signal.SIGKILL)
        return True

    async def run(self) -> None:
        while True:
            signum = await self._waiting.get()
            try:
                await self._stream.kill(signum)
            except MicaError as error:
                self._ctx.say(f"the signal did not reach the command: {error}")
