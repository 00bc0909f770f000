"""Commands in guests."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Response, WebSocket, get, post, websocket
from litestar.params import JSONBody, PathParameter

from mica.api import execs
from mica.api.lifetime import LifetimeDep
from mica.api.params import ActorDep, EngineDep, VmRef, Wait
from mica.model.exec import ExecSpec, ExecView

EXECS = "/v1/vms/{vm:str}/execs"
EXEC = EXECS + "/{exec_id:str}"
ExecId = Annotated[str, PathParameter(description="A command's id")]


class ExecKill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST …/kill``: the signal's number in the guest, SIGTERM by default."""

    signal: Annotated[int, msgspec.Meta(ge=1, le=64)] = 15


KILL = ExecKill()


@post(EXECS, status_code=201, summary="Start a command in the guest", operation_id="exec_start")
async def start(engine: EngineDep, actor: ActorDep, vm: VmRef, data: JSONBody[ExecSpec]) -> Response[ExecView]:
    record = await engine.exec_start(vm, data, by=actor)
    return Response(record, headers={"Location": f"/v1/vms/{vm}/execs/{record.id}"})


@get(EXECS, summary="List a VM's commands", operation_id="exec_list")
async def list_execs(engine: EngineDep, vm: VmRef) -> list[ExecView]:
    return await engine.execs(vm)


@get(EXEC, summary="Show a command, or wait for its end", operation_id="exec_show")
async def show(engine: EngineDep, lifetime: LifetimeDep, vm: VmRef, exec_id: ExecId, wait: Wait = 0.0) -> ExecView:
    return await execs.ended(engine, vm, exec_id, wait, lifetime.closing)


@post(f"{EXEC}/kill", status_code=200, summary="Send a command a signal", operation_id="exec_kill")
async def kill(engine: EngineDep, vm: VmRef, exec_id: ExecId, data: JSONBody[ExecKill] = KILL) -> ExecView:
    await engine.exec_kill(vm, exec_id, data.signal)
    return await engine.exec_state(vm, exec_id)


@websocket(f"{EXEC}/stream")
async def stream(
    socket: WebSocket[Any, Any, Any], engine: EngineDep, lifetime: LifetimeDep, vm: VmRef, exec_id: ExecId
) -> None:
    await execs.attend(socket, engine, vm, exec_id, lifetime.closing)


HANDLERS: list[Any] = [start, list_execs, show, kill, stream]
