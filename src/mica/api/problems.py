"""Errors on the wire: problem details (RFC 9457), one shape for everything that can go wrong.

``type`` is a reference to the page that explains the code; programs test ``code``. Internals never leave: an unexpected
exception is logged with the id of the request, and only the id is told.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException, ValidationException
from litestar.types import ExceptionHandlersMap, Scope

from mica.model.errors import Code, MicaError, invalid, not_found

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


class ProblemBody(msgspec.Struct, frozen=True, kw_only=True):
    """Problem details. ``hint`` is the way out, ``details`` the numbers behind the sentence.

    ``retryable``: the same request may succeed later without any change.
    """

    type: str
    title: str
    status: int
    detail: str
    code: Code
    hint: str = ""
    retryable: bool = False
    details: dict[str, Any] = {}


def body_of(error: MicaError, status: int | None = None) -> ProblemBody:
    """``status`` overrides the one of the table: for refusals by HTTP itself, such as 405."""
    title = error.info.title if status in (None, error.info.http_status) else HTTPStatus(int(status or 0)).phrase
    return ProblemBody(
        type=f"/errors/{error.code}",
        title=title,
        status=status or error.info.http_status,
        detail=error.message,
        code=error.code,
        hint=error.hint,
        retryable=error.retryable,
        details=error.details,
    )


def headers_of(body: ProblemBody) -> dict[str, str]:
    """RFC 9110 wants ``WWW-Authenticate`` with 401; 503 says when to come back."""
    headers: dict[str, str] = {}
    if body.status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if body.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def encode(body: ProblemBody) -> bytes:
    """Details come from far away: what JSON cannot say is written as text rather than lost."""
    return msgspec.json.encode(body, enc_hook=str)


def internal(request_id: str) -> MicaError:
    """What is told of an unexpected exception."""
    return MicaError(
        Code.INTERNAL,
        f"Mica failed at this request; its log says more under {request_id}",
        hint="report it with the lines of the daemon's log that carry this id",
        details={"request_id": request_id},
    )


def _allowed_methods(request: Request[Any, Any, Any]) -> list[str]:
    found = []
    for method in METHODS:
        try:
            request.app.asgi_router.handle_routing(path=request.scope["path"].rstrip("/") or "/", method=method)
        except HTTPException:
            continue
        found.append(method)
    return found


def _validation(error: ValidationException) -> MicaError:
    """What Litestar says of parameters; bodies are judged in :mod:`mica.api.bodies`, unless there is none at all."""
    errors = []
    for item in error.extra if isinstance(error.extra, list) else []:
        name, source = str(item.get("key", "")), item.get("source", "")
        if source == "body":
            return invalid("the request has no body", hint="send one JSON object; see /v1/openapi.json for its fields")
        where = str(getattr(source, "value", source))
        errors.append({"name": name, "in": where, "problem": str(item.get("message", ""))})
    said = "; ".join(f"{e['in']} parameter {e['name']!r}: {e['problem']}".strip() for e in errors)
    return invalid(said or error.detail, hint="see /v1/openapi.json for what is taken", errors=errors)


def _from_http(request: Request[Any, Any, Any], error: HTTPException) -> tuple[MicaError, dict[str, str]]:
    """What Litestar itself refuses."""
    path = request.scope["path"]
    if isinstance(error, MethodNotAllowedException):
        allowed = ", ".join(_allowed_methods(request))
        hint = f"{path} takes {allowed}" if allowed else ""
        return invalid(f"{request.method} is not possible on {path}", hint=hint), {"Allow": allowed}
    if isinstance(error, NotFoundException):
        return not_found("page", path, hint="see /v1/openapi.json for all there are"), {}
    if isinstance(error, ValidationException):
        return _validation(error), {}
    if error.status_code == 413:
        limit = request.route_handler.resolve_request_max_body_size()
        return MicaError(
            Code.TOO_LARGE,
            f"the request's body is larger than {limit} bytes",
            hint="files go to PUT /v1/vms/{vm}/files",
            details={"limit": limit},
        ), {}
    return invalid(error.detail), {}


def answer(error: MicaError, status: int | None = None, headers: dict[str, str] | None = None) -> Response[bytes]:
    """The error as a response."""
    body = body_of(error, status)
    return Response(
        encode(body), status_code=body.status, headers={**headers_of(body), **(headers or {})}, media_type=MEDIA_TYPE
    )


def note(scope: Scope, **facts: Any) -> None:
    """Add facts to the request's one log line."""
    scope["state"].setdefault("log", {}).update(facts)


def hang_up(scope: Scope) -> None:
    """Close the connection after the answer: the rest of the request is not read."""
    scope["state"]["hang_up"] = True


def _on_mica(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    assert isinstance(error, MicaError)
    note(request.scope, code=str(error.code))
    if error.code is Code.INTERNAL or error.__cause__ is not None:
        note(request.scope, error=error.message, exc_info=error)
    return answer(error, headers={"Connection": "close"} if request.scope["state"].get("hang_up") else None)


def _on_http(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    assert isinstance(error, HTTPException)
    if error.status_code >= 500:
        return _on_unexpected(request, error)
    mica, headers = _from_http(request, error)
    note(request.scope, code=str(mica.code))
    return answer(mica, error.status_code, headers)


def _on_unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    note(request.scope, code=str(Code.INTERNAL), exc_info=error)
    return answer(internal(request.scope["state"].get("request_id", "")))


HANDLERS: ExceptionHandlersMap = {MicaError: _on_mica, HTTPException: _on_http, Exception: _on_unexpected}
