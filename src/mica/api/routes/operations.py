"""Operations: what Mica is doing, and what it did."""

from __future__ import annotations

from typing import Annotated

from litestar import get, post
from litestar.params import JSONBody, PathParameter, QueryParameter

from mica.api.lifetime import LifetimeDep
from mica.api.params import ActorDep, After, EngineDep, Limit, Wait
from mica.api.waiting import operation_ended
from mica.engine.definition import NoParams
from mica.model.operation import Operation
from mica.model.views import OperationPage, Resolve

OPERATION = "/v1/operations/{operation:str}"
NOTHING = NoParams()
Id = Annotated[str, PathParameter(description="An operation's id")]


@get("/v1/operations", summary="List operations, newest first", operation_id="operation_list")
async def list_operations(
    engine: EngineDep,
    after: After = "",
    limit: Limit = 100,
    vm: Annotated[str, QueryParameter(description="Only those about this VM")] = "",
    active: Annotated[bool, QueryParameter(description="Only those that have not ended")] = False,
) -> OperationPage:
    return await engine.operations(after=after, limit=limit, vm=vm, active=active)


@get(OPERATION, summary="Show an operation, or wait for its end", operation_id="operation_show")
async def show(engine: EngineDep, lifetime: LifetimeDep, operation: Id, wait: Wait = 0.0) -> Operation:
    return await operation_ended(engine, operation, wait, lifetime.closing)


@post(f"{OPERATION}/cancel", status_code=200, summary="Ask an operation to stop", operation_id="operation_cancel")
async def cancel(engine: EngineDep, actor: ActorDep, operation: Id, data: JSONBody[NoParams] = NOTHING) -> Operation:
    return await engine.cancel(operation, by=actor)


@post(f"{OPERATION}/resolve", status_code=200, summary="Decide a stuck operation", operation_id="operation_resolve")
async def resolve(engine: EngineDep, actor: ActorDep, operation: Id, data: JSONBody[Resolve]) -> Operation:
    return await engine.resolve(operation, data.how, by=actor)


HANDLERS = [list_operations, show, cancel, resolve]
