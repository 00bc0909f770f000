"""The serial console and the logs of a VM."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from litestar import Response, WebSocket, get, websocket
from litestar.params import QueryParameter

from mica.api import console
from mica.api.lifetime import LifetimeDep
from mica.api.params import EngineDep, VmRef

# A guest writes what it likes: nobody should take it for text, let alone for a page.
BYTES = "application/octet-stream"
MAX_TAIL = 16 * 1024 * 1024


@websocket("/v1/vms/{vm:str}/console")
async def attend(socket: WebSocket[Any, Any, Any], engine: EngineDep, lifetime: LifetimeDep, vm: VmRef) -> None:
    await console.attend(socket, engine, vm, lifetime.closing)


@get("/v1/vms/{vm:str}/log", summary="Read a VM's log", operation_id="vm_log", media_type=BYTES)
async def log(
    engine: EngineDep,
    vm: VmRef,
    which: Annotated[
        Literal["console", "qemu"], QueryParameter(description="The serial port's history, or QEMU's own words")
    ] = "console",
    tail: Annotated[int, QueryParameter(ge=0, le=MAX_TAIL, description="Bytes from the end at most")] = 65536,
) -> Response[bytes]:
    return Response(await engine.log(vm, which, tail), media_type=BYTES)


HANDLERS: list[Any] = [attend, log]
