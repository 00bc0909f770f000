"""This host and its daemon."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Response, get
from litestar.params import QueryParameter

from mica.api.lifetime import LifetimeDep
from mica.api.metrics import Metrics
from mica.api.params import EngineDep
from mica.model.doctor import DoctorReport
from mica.model.views import HostView


class Root(HostView, frozen=True, kw_only=True):
    """The host, and the revision of the present moment, from which ``/v1/events`` can go on."""

    revision: int


class Health(msgspec.Struct, frozen=True):
    """The daemon answers."""

    status: str
    revision: int


@get("/v1", summary="What this is", operation_id="root")
async def root(engine: EngineDep) -> Root:
    return Root(**msgspec.structs.asdict(await engine.host()), revision=await engine.revision())


@get("/v1/health", summary="Whether the daemon answers", operation_id="health")
async def health(engine: EngineDep) -> Health:
    return Health("ok", await engine.revision())


@get("/v1/host", summary="Show the host", operation_id="host_show")
async def show(engine: EngineDep) -> HostView:
    return await engine.host()


@get("/v1/host/doctor", summary="What this host can do, with proof", operation_id="host_doctor")
async def doctor(
    engine: EngineDep, fresh: Annotated[bool, QueryParameter(description="Prove again what is remembered")] = False
) -> DoctorReport:
    return await engine.doctor(fresh=fresh)


@get("/metrics", summary="Numbers for Prometheus", operation_id="metrics", media_type="text/plain; version=0.0.4")
async def metrics(engine: EngineDep, lifetime: LifetimeDep) -> Response[bytes]:
    return Response(await lifetime.metrics.render(engine), media_type=Metrics.MEDIA_TYPE)


HANDLERS: list[Any] = [root, health, show, doctor, metrics]
