"""The serial console over a WebSocket: several watchers, each from the offset it wants.

Server to client: an 8-byte big-endian offset and the data from there. Client to server: what is typed.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, NoReturn, cast

from mica.api.facade import Facade
from mica.api.sockets import Socket, Wire, answering, check_query, converse, offset_of

OFFSET_BYTES = 8
# The longest piece that is handed to the guest in one go; a larger frame takes several turns.
_PIECE = 4096


async def _show(wire: Wire, engine: Facade, vm: str, offset: int | None) -> None:
    chunks = cast("Any", engine.console_follow(vm, offset))
    async with aclosing(chunks):
        async for at, data in chunks:
            await wire.send(at.to_bytes(OFFSET_BYTES, "big") + data)


async def _type(wire: Wire, engine: Facade, vm: str) -> NoReturn:
    while True:
        data = await wire.receive()
        for start in range(0, len(data), _PIECE):
            await engine.console_write(vm, data[start : start + _PIECE])


async def attend(socket: Socket, engine: Facade, vm: str, closing: asyncio.Event) -> None:
    """Serve one watcher until it goes."""
    async with answering(socket) as wire:
        check_query(socket, "offset")
        offset = offset_of(socket, "offset")
        id_ = (await engine.vm(vm)).id  # a name may move to another VM while somebody watches
        await converse(wire, closing, _show(wire, engine, id_, offset), _type(wire, engine, id_))
