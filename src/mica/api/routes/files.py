"""Files in and out of guests, as tar streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from litestar import Request, get, put
from litestar.openapi.spec import OpenAPIFormat, OpenAPIMediaType, OpenAPIType, Operation, RequestBody, Schema
from litestar.params import QueryParameter

from mica.api.files import MEDIA_TYPE, Download, Upload
from mica.api.lifetime import LifetimeDep
from mica.api.live import Live
from mica.api.params import ActorDep, EngineDep, VmRef
from mica.api.problems import hang_up
from mica.model.errors import MicaError

FILES = "/v1/vms/{vm:str}/files"
Size = Annotated[
    int,
    QueryParameter(ge=0, description="Bytes of the files in it: refused at once where the guest has no space for them"),
]
GuestPath = Annotated[str, QueryParameter(min_length=1, max_length=4096, description="A path in the guest")]


@dataclass
class _TarUpload(Operation):
    """The body is read by hand, so its description is too."""

    def __post_init__(self) -> None:
        tar = OpenAPIMediaType(
            schema=Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY, description="Of any length")
        )
        self.request_body = RequestBody(content={MEDIA_TYPE: tar}, required=True)


@put(FILES, summary="Copy files in", operation_id="files_in", operation_class=_TarUpload, request_max_body_size=None)
async def copy_in(
    request: Request[Any, Any, Any], engine: EngineDep, actor: ActorDep, vm: VmRef, path: GuestPath, size: Size = 0
) -> dict[str, Any]:
    body = Upload(request)
    try:
        summary: dict[str, Any] = msgspec.to_builtins(await engine.copy_in(vm, path, aiter(body), by=actor, size=size))
    except MicaError:
        if not await body.drain():
            hang_up(request.scope)
        raise
    return summary


@get(FILES, summary="Copy files out", operation_id="files_out", media_type=MEDIA_TYPE)
async def copy_out(engine: EngineDep, actor: ActorDep, lifetime: LifetimeDep, vm: VmRef, path: GuestPath) -> Live:
    download = Download(engine.copy_out(vm, path, by=actor))
    await download.open()
    return Live(download, lifetime.closing, media_type=MEDIA_TYPE)


HANDLERS: list[Any] = [copy_in, copy_out]
