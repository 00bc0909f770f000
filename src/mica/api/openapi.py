"""The description of the API: OpenAPI 3.1, generated from the routes themselves.

``python -m mica.api.openapi > openapi.json`` writes the committed file; a test fails when it differs.
Litestar describes what its handlers take and return; what it cannot know is added here: that every error is a problem
(RFC 9457), and how one signs in.
"""

from __future__ import annotations

import sys
from functools import cache
from inspect import cleandoc
from typing import Any

import msgspec
from litestar import Litestar
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.spec import License

from mica.api.app import ROUTES, plain_dependencies
from mica.api.problems import MEDIA_TYPE, ProblemBody
from mica.model.views import Event

VERSION = "1"
DESCRIPTION = """\
One daemon's API. On its UNIX socket the kernel says who asks; on TCP (loopback only) a token does.

Whatever changes something is accepted as an operation (202, `Location`), durable from then on: follow it by
`GET /v1/operations/{operation}?wait=60` or on `/v1/events`. Errors are problem details (RFC 9457) whose `code` is
stable. WebSocket endpoints are described in docs/reference/api.md.
"""
_PROBLEM = {"$ref": "#/components/responses/Problem"}
_METHODS = ("get", "put", "post", "patch", "delete")


def _types(app: Litestar) -> list[Any]:
    """Every struct that goes in or out."""
    found: list[Any] = [ProblemBody, Event]
    for route in app.routes:
        for handler in getattr(route, "route_handlers", ()):
            data, returned = handler.parsed_data_field, handler.parsed_return_field
            candidates = [data, *((returned, *returned.inner_types) if returned else ())]
            found.extend(
                field.annotation
                for field in candidates
                if field is not None and isinstance(field.annotation, type) and field.is_subclass_of(msgspec.Struct)
            )
    return list({type_.__name__: type_ for type_ in found}.values())


def _optional_bodies(app: Litestar) -> set[str]:
    """Operations whose body may be left out; Litestar describes every body as required."""
    return {
        handler.operation_id
        for route in app.routes
        for handler in getattr(route, "route_handlers", ())
        if handler.parsed_data_field is not None and handler.parsed_data_field.has_default
    }


def _unindented(node: Any) -> Any:
    """Docstrings as text: their indentation belongs to the source."""
    if isinstance(node, dict):
        return {
            key: cleandoc(value) if key == "description" and isinstance(value, str) else _unindented(value)
            for key, value in node.items()
        }
    return [_unindented(value) for value in node] if isinstance(node, list) else node


def _refs(node: Any) -> set[str]:
    if isinstance(node, dict):
        here = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return here.union(*(_refs(value) for value in node.values()))
    return set().union(*(_refs(value) for value in node)) if isinstance(node, list) else set()


def _finish(app: Litestar, spec: dict[str, Any]) -> dict[str, Any]:
    # msgspec knows its structs better than Litestar does: their docstrings, unions, and what they forbid.
    _, schemas = msgspec.json.schema_components(_types(app), ref_template="#/components/schemas/{name}")
    problem = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    spec["components"] = {
        "schemas": schemas,
        "responses": {"Problem": {"description": "A problem: `code` says which", "content": problem}},
        "securitySchemes": {
            "token": {"type": "http", "scheme": "bearer", "description": "On TCP only; the socket needs none"}
        },
    }
    spec["security"] = [{"token": []}, {}]
    optional = _optional_bodies(app)
    for item in spec["paths"].values():
        for method in _METHODS:
            if method in item:
                if item[method]["operationId"] in optional:
                    item[method]["requestBody"]["required"] = False
                responses = item[method]["responses"]
                for status in [s for s in responses if s >= "400"]:
                    del responses[status]
                responses["default"] = _PROBLEM
    dangling = {ref for ref in _refs(spec) if ref.rpartition("/")[2] not in {*schemas, "Problem"}}
    if dangling:
        raise LookupError(f"the description refers to what it does not describe: {sorted(dangling)}")
    return spec


@cache
def document() -> bytes:
    """The description as JSON: sorted, indented, the same for the same code."""
    config = OpenAPIConfig(
        title="Mica",
        version=VERSION,
        description=DESCRIPTION,
        license=License(name="Apache-2.0", identifier="Apache-2.0"),
        render_plugins=(),
        use_handler_docstrings=True,
    )
    app = Litestar([*ROUTES], dependencies=plain_dependencies(), openapi_config=config, logging_config=None)
    spec = _finish(app, app.openapi_schema.to_schema())
    return msgspec.json.format(msgspec.json.encode(_unindented(spec), order="sorted"), indent=2) + b"\n"


if __name__ == "__main__":
    sys.stdout.buffer.write(document())
