"""``mica vm log``."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated

from mica.cli.context import Context
from mica.cli.operation_verbs import operations_table
from mica.cli.options import DEFAULTS, Flag, Hidden, Options, VmArg
from mica.cli.text import clean
from mica.client.handle import VmHandle
from mica.model.errors import invalid

_POLL_S = 0.5
_QUIET_S = 0.3
_BYTES_PER_LINE = 400
_MAX_BYTES = 1024**2
_SEEN = 4096
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")


async def log(
    vm: VmArg,
    /,
    *,
    console: Flag = False,
    qemu: Flag = False,
    operations: Flag = False,
    follow: Flag = False,
    tail: int = 200,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Show what a VM's console or QEMU said, or what was done with it.

    Without a choice it is the history of the serial console.

    Parameters
    ----------
    vm
        Name or id of the VM.
    console
        The history of the serial console.
    qemu
        QEMU's own messages.
    operations
        The VM's operations, the newest first.
    follow
        Go on with what is added, until Ctrl-C.
    tail
        How many lines (or operations) from the end.
    """
    if console + qemu + operations > 1:
        raise invalid("one log at a time", hint="choose one of --console, --qemu and --operations")
    if tail < 0:
        raise invalid(f"--tail {tail} is negative")
    async with ctx.client() as client:
        handle = await client.vms.get(vm)
        if operations:
            if follow:
                raise invalid("operations are not a text to follow", hint="use: mica events")
            found = await handle.operations(limit=tail)
            ctx.emit(found, lambda: operations_table(found, ctx))
        elif qemu:
            await _qemu(ctx, handle, tail, follow)
        else:
            await _console(ctx, handle, tail, follow)


async def _console(ctx: Context, handle: VmHandle, tail: int, follow: bool) -> None:
    if not follow:
        _once(ctx, await handle.log("console", tail=_bytes(tail)), tail)
        return
    async with handle.console() as console:
        history = b""
        try:
            # The history comes at once; nothing says where it ends but that no more comes.
            while True:
                async with asyncio.timeout(_QUIET_S):
                    history += await anext(console)
        except TimeoutError:
            pass
        except StopAsyncIteration:
            follow = False
        _write(ctx, last_lines(history, tail))
        if follow:
            async for data in console:
                _write(ctx, data)


async def _qemu(ctx: Context, handle: VmHandle, tail: int, follow: bool) -> None:
    data = await handle.log("qemu", tail=_bytes(tail))
    if not follow:
        _once(ctx, data, tail)
        return
    _write(ctx, last_lines(data, tail))
    seen = data[-_SEEN:]
    while True:
        # A log sends no signal.
        await asyncio.sleep(_POLL_S)
        data = await handle.log("qemu", tail=_MAX_BYTES)
        new = added(data, seen)
        if new:
            _write(ctx, new)
            seen = data[-_SEEN:]


def added(data: bytes, seen: bytes) -> bytes:
    """What follows ``seen`` in ``data``; all of it where a new log has begun."""
    at = data.rfind(seen)
    return data if at < 0 else data[at + len(seen) :]


def last_lines(data: bytes, lines: int) -> bytes:
    """The last ``lines`` lines of ``data``."""
    kept = data.splitlines(keepends=True)[-lines:] if lines else []
    return b"".join(kept)


def _bytes(lines: int) -> int:
    return min(max(lines * _BYTES_PER_LINE, 64 * 1024), _MAX_BYTES)


def _once(ctx: Context, data: bytes, lines: int) -> None:
    kept = last_lines(data, lines)
    if ctx.json:
        ctx.emit(kept.decode(errors="replace").splitlines(), str)
        return
    _write(ctx, kept)
    if kept and not kept.endswith(b"\n") and ctx.world.is_terminal(ctx.world.stdout):
        ctx.world.write_bytes(b"\n")


def _write(ctx: Context, data: bytes) -> None:
    """As it is into files and pipes; without what drives a terminal onto a terminal."""
    if ctx.world.is_terminal(ctx.world.stdout):
        data = harmless(data.decode(errors="replace")).encode(errors="replace")
    ctx.world.write_bytes(data)


def harmless(text: str) -> str:
    """Text without escape sequences (ECMA-48 section 5.4) and other control characters."""
    return clean(_SEQUENCE.sub("", text).replace("\r", ""))
