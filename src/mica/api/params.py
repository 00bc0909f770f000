"""What routes share: the parameters that every verb takes, and how they are read."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from litestar import Request, Response
from litestar.di import NamedDependency
from litestar.params import HeaderParameter, PathParameter, QueryParameter, SkipValidation

from mica.api.facade import Facade
from mica.model.errors import Code, MicaError, invalid
from mica.model.operation import Actor, Operation

EngineDep = NamedDependency[SkipValidation[Facade]]
VmRef = Annotated[str, PathParameter(description="A VM's name, id, or the unique beginning of an id (8 characters)")]
After = Annotated[str, QueryParameter(description="`next` of the page before", max_length=256)]
Limit = Annotated[int, QueryParameter(ge=1, le=1000, description="Items on a page at most")]
Wait = Annotated[float, QueryParameter(ge=0, le=60, description="Seconds to wait for the end before answering")]

_ETAG = re.compile(r'^"(\d{1,18})"$')
_KEY = re.compile(r"^[\x21-\x7e]{1,64}$")


class Terms(msgspec.Struct, frozen=True):
    """On whose word, on what condition, and under which key a verb is asked for."""

    by: Actor
    if_match: int | None = None
    idempotency_key: str = ""


TermsDep = NamedDependency[SkipValidation[Terms]]
ActorDep = NamedDependency[SkipValidation[Actor]]


async def actor(request: Request[Any, Any, Any]) -> Actor:
    """Who asks, as the door found out."""
    found: Actor = request.scope["state"]["actor"]
    return found


async def terms(
    request: Request[Any, Any, Any],
    if_match: Annotated[
        str | None, HeaderParameter(name="If-Match", description='`"<generation>"` as in ETag, or `*` for any')
    ] = None,
    idempotency_key: Annotated[
        str | None,
        HeaderParameter(name="Idempotency-Key", description="1 to 64 printable characters: sent twice, done once"),
    ] = None,
) -> Terms:
    """Read the headers of a verb. Raises ``invalid`` when one is malformed."""
    generation = None
    if if_match is not None and if_match.strip() != "*":
        match = _ETAG.match(if_match.strip())
        if match is None:
            raise invalid(f"If-Match {if_match!r} is no generation", hint='send the ETag as it came, for example "7"')
        generation = int(match.group(1))
    if idempotency_key is not None and not _KEY.match(idempotency_key):
        raise invalid("the Idempotency-Key is not 1 to 64 printable characters", hint="a UUID does well")
    return Terms(request.scope["state"]["actor"], generation, idempotency_key or "")


def labels_of(pairs: list[str] | None) -> dict[str, str] | None:
    """``["a=b"]`` → ``{"a": "b"}``. Raises ``invalid``."""
    if not pairs:
        return None
    for pair in pairs:
        if "=" not in pair:
            raise invalid(f"label {pair!r} is not KEY=VALUE", hint="write ?label=tier=web")
    return dict(pair.split("=", 1) for pair in pairs)


def check_generation(what: str, generation: int, on: Terms) -> None:
    """Raises ``generation-conflict`` when ``what`` has another generation than the one that is to be changed."""
    if on.if_match is not None and on.if_match != generation:
        raise MicaError(
            Code.GENERATION_CONFLICT,
            f"{what} has generation {generation}, not {on.if_match}",
            hint="somebody changed it: read it again and decide anew",
            details={"generation": generation, "if_match": on.if_match},
        )


async def submit(engine: Facade, verb: str, target: str, params: msgspec.Struct, on: Terms) -> Response[Operation]:
    """Hand a verb to the engine and answer where to follow it."""
    operation = await engine.submit(
        verb, target, params, by=on.by, if_match=on.if_match, idempotency_key=on.idempotency_key
    )
    return Response(operation, headers={"Location": f"/v1/operations/{operation.id}"})
