"""A command in a guest over a WebSocket: its output from any offset, its input at the speed it reads.

Frames are one byte for the channel and data. To the daemon: 0 is standard input, and no data closes it. From the
daemon: 1 is standard output, 2 standard error; 0 is a problem (JSON) that says why no more input is taken. The last
frame is text: how the command ended.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, Literal, NoReturn, cast

import msgspec

from mica.api.facade import Facade
from mica.api.problems import body_of, encode
from mica.api.sockets import Socket, Wire, answering, check_query, converse, offset_of
from mica.api.waiting import CutShort, first, together
from mica.model.errors import MicaError, invalid
from mica.model.exec import ExecView

STDIN = 0
CHANNELS: dict[Literal["stdout", "stderr"], int] = {"stdout": 1, "stderr": 2}
# What is sent in one frame: small enough that output and the other channel take turns.
_PIECE = 64 * 1024


async def ended(engine: Facade, vm: str, exec_id: str, wait_s: float, closing: asyncio.Event) -> ExecView:
    """The command as it is when it has ended, the time is over, or the server closes."""
    state = await engine.exec_state(vm, exec_id)
    if wait_s <= 0:
        return state
    try:
        return await first(engine.exec_wait(vm, exec_id), closing.wait(), timeout_s=wait_s)
    except CutShort:
        return await engine.exec_state(vm, exec_id)


class _Stream:
    """One client of one command."""

    def __init__(self, wire: Wire, engine: Facade, vm: str, exec_id: str) -> None:
        self._wire, self._engine, self._vm, self._id = wire, engine, vm, exec_id

    async def _follow(self, stream: Literal["stdout", "stderr"], offset: int) -> None:
        mark = bytes([CHANNELS[stream]])
        chunks = cast("Any", self._engine.exec_follow(self._vm, self._id, stream, offset))
        async with aclosing(chunks):
            async for chunk in chunks:
                for start in range(0, len(chunk), _PIECE):
                    await self._wire.send(mark + chunk[start : start + _PIECE])

    async def tell(self, stdout: int, stderr: int) -> None:
        """All output, then how it ended."""
        await together(self._follow("stdout", stdout), self._follow("stderr", stderr))
        state = await self._engine.exec_wait(self._vm, self._id)
        await self._wire.send_text(msgspec.json.encode(state).decode())

    async def feed(self) -> NoReturn:
        """Input, as long as the command takes it; what it does not take any more is dropped, once said so."""
        refused = False
        while True:
            frame = await self._wire.receive()
            if not frame or frame[0] != STDIN:
                raise invalid("a frame came that is not for channel 0", hint="begin frames of input with a zero byte")
            if refused:
                continue
            try:
                await self._engine.exec_stdin(self._vm, self._id, frame[1:] or None)
            except MicaError as error:
                refused = True
                await self._wire.send(bytes([STDIN]) + encode(body_of(error)))


async def attend(socket: Socket, engine: Facade, vm: str, exec_id: str, closing: asyncio.Event) -> None:
    """Serve one client until the command has ended or the client goes; the command goes on without it."""
    async with answering(socket) as wire:
        check_query(socket, *CHANNELS)
        stdout, stderr = offset_of(socket, "stdout") or 0, offset_of(socket, "stderr") or 0
        id_ = (await engine.vm(vm)).id
        await engine.exec_state(id_, exec_id)
        stream = _Stream(wire, engine, id_, exec_id)
        await converse(wire, closing, stream.tell(stdout, stderr), stream.feed())
