"""Schemathesis throws at the API what its description allows, and what it forbids: nothing may be a fault of ours, and
every answer must be what the description says."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from typing import Any

import schemathesis
import structlog
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ensure_resource_availability,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from structlog.testing import LogCapture

from mica.api.app import create_app
from mica.api.auth import Access, Peer
from mica.api.lifetime import Lifetime
from mica.engine.operations.snapshot_create import Take
from mica.model.image import MicroRecipe
from mica.model.operation import Actor
from mica.model.views import ImageMake, VmCreate
from tests.api.conftest import Connected, Scope
from tests.api.fake_engine import FakeEngine

BY = Actor("root", "unix:uid=0")


class Fresh:
    """An application whose engine knows a VM ``web``, its snapshot ``clean``, an image ``micro`` and an operation,
    anew for each request.

    It is closing, so that nothing waits and no stream goes on.
    """

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.life = Lifetime()
        self.life.closing.set()
        log = structlog.wrap_logger(None, processors=[LogCapture()])
        app = create_app(self.engine, access=Access(uid=os.getuid()), log=log, lifetime=self.life)
        self.app = Connected(app, Peer(1, 0, 0))

    async def __call__(self, scope: Scope, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        if scope["type"] == "lifespan":
            return
        self.engine.__init__()  # type: ignore[misc]
        await self.engine.submit("image.make", "", ImageMake(MicroRecipe()), by=BY)
        operation = await self.engine.submit("vm.create", "", VmCreate(name="web"), by=BY)
        self.engine.jobs["op"] = operation
        await self.engine.submit("snapshot.create", "web", Take(name="clean"), by=BY)
        await self.app(scope, receive, send)


@schemathesis.serializer("application/x-tar")
def _tar(_context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


schema = schemathesis.openapi.from_asgi("/v1/openapi.json", Fresh())


@schema.parametrize()
@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_no_request_is_a_fault_and_every_answer_is_as_described(case: Case[Any]) -> None:
    known = {"vm": "web", "image": "micro", "operation": "op", "snapshot": "clean"}
    # Half of the requests are about something that is there.
    if zlib.crc32(repr((case.body, case.query, case.headers)).encode()) % 2:
        case.path_parameters = {name: known.get(name, value) for name, value in (case.path_parameters or {}).items()}
    case.call_and_validate(
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
            unsupported_method,
            ensure_resource_availability,
        ]
    )
