"""The application: routes, errors, the door, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from litestar import Litestar, Request
from litestar.di import Provide
from litestar.routes import HTTPRoute

from mica.api.bodies import StrictRequest
from mica.api.gate import Gate
from mica.api.lifetime import Lifetime
from mica.api.params import actor, terms
from mica.api.problems import HANDLERS
from mica.api.routes import (
    console,
    events,
    execs,
    files,
    host,
    images,
    operations,
    schedules,
    schema,
    snapshots,
    templates,
    vms,
)
from mica.model.errors import invalid

if TYPE_CHECKING:
    from litestar.types import ControllerRouterHandler
    from structlog.typing import FilteringBoundLogger

    from mica.api.auth import Access
    from mica.api.facade import Facade

MAX_BODY = 1024 * 1024
ROUTES: list[ControllerRouterHandler] = [
    *host.HANDLERS,
    *vms.HANDLERS,
    *snapshots.HANDLERS,
    *schedules.HANDLERS,
    *templates.HANDLERS,
    *operations.HANDLERS,
    *images.HANDLERS,
    *events.HANDLERS,
    *execs.HANDLERS,
    *files.HANDLERS,
    *console.HANDLERS,
]


async def _known_query(request: Request[Any, Any, Any]) -> None:
    """Refuse query parameters that the route does not have: a misspelt ``?trashd=1`` must not list the living."""
    allowed: list[str] = request.route_handler.opt.get("query", [])
    for name in request.query_params:
        if name not in allowed:
            raise invalid(
                f"unknown query parameter {name!r}",
                hint=f"here are: {', '.join(allowed)}" if allowed else "there are none here",
                allowed=allowed,
            )


def _note_queries(app: Litestar) -> None:
    for route in app.routes:
        if isinstance(route, HTTPRoute):
            for handler, model in route.route_handler_map.values():
                handler.opt["query"] = sorted(parameter.field_alias for parameter in model.expected_query_params)


def plain_dependencies() -> dict[str, Provide]:
    """What every route may ask for by name; the description of the API needs only the names."""
    return _dependencies(None, Lifetime())


def _dependencies(engine: Facade | None, life: Lifetime) -> dict[str, Provide]:
    return {
        "engine": Provide(lambda: engine, sync_to_thread=False),
        "lifetime": Provide(lambda: life, sync_to_thread=False),
        "actor": Provide(actor),
        "terms": Provide(terms),
    }


def create_app(
    engine: Facade, *, access: Access, log: FilteringBoundLogger, lifetime: Lifetime | None = None
) -> Litestar:
    """The API over ``engine``. ``access`` decides who may use it, ``log`` gets one line for each request.

    Set ``lifetime.closing`` to end every stream and every wait.
    """
    life = lifetime or Lifetime()
    app = Litestar(
        [*ROUTES, *schema.HANDLERS],
        dependencies=_dependencies(engine, life),
        exception_handlers=HANDLERS,
        before_request=_known_query,
        request_class=StrictRequest,
        request_max_body_size=MAX_BODY,
        openapi_config=None,
        logging_config=None,
    )
    _note_queries(app)
    # Litestar's middleware stands behind its router; this has to stand before it.
    app.asgi_handler = Gate(app.asgi_handler, access=access, log=log, metrics=life.metrics)
    return app
