"""The door: every connection gets an id, is asked who it is, is counted, and leaves one line in the log.

It stands before routing, so that pages that do not exist are behind it too.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, cast

from litestar.enums import ScopeType

from mica.api.problems import MEDIA_TYPE, body_of, encode, headers_of, internal
from mica.model.errors import Code, MicaError

if TYPE_CHECKING:
    from litestar.types import ASGIApp, HTTPSendMessage, Message, Receive, Scope, Send
    from structlog.typing import FilteringBoundLogger

    from mica.api.auth import Access
    from mica.api.metrics import Metrics

# Requests and streams at a time; each may hold a file descriptor or two, of which a process has 1024 by default.
MAX_CONCURRENT = 384

# What a closed connection or a stopping server interrupts is no fault.
_GONE = (ConnectionError, BrokenPipeError)


async def refuse(scope: Scope, send: Send, error: MicaError, status: int | None = None) -> None:
    """Answer with a problem, a WebSocket too as long as it has not been accepted (ASGI: WebSocket Denial Response)."""
    kind = "http" if scope["type"] == ScopeType.HTTP else "websocket.http"
    if kind == "websocket.http" and "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 4000 + error.info.http_status, "reason": error.message[:120]})
        return
    body = body_of(error, status)
    content = encode(body)
    headers = {"content-type": MEDIA_TYPE, "content-length": str(len(content)), **headers_of(body)}
    start = {
        "type": f"{kind}.response.start",
        "status": body.status,
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
    }
    await send(cast("HTTPSendMessage", start))
    await send(cast("HTTPSendMessage", {"type": f"{kind}.response.body", "body": content, "more_body": False}))


class Gate:
    """ASGI: identify, count, call ``app``, write the line."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        log: FilteringBoundLogger,
        metrics: Metrics,
        limit: int = MAX_CONCURRENT,
    ) -> None:
        self._app = app
        self._access = access
        self._log = log
        self._metrics = metrics
        self.limit = limit
        self._now = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        state["request_id"] = request_id = secrets.token_hex(8)
        facts: dict[str, Any] = state.setdefault("log", {})
        began = time.perf_counter()
        status: int | None = None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            elif message["type"] == "websocket.accept":
                status = 101
            elif message["type"] == "websocket.close":
                facts["close"] = message["code"]
            await send(message)

        self._now += 1
        try:
            await self._pass(scope, receive, watched, state)
        except _GONE:
            facts["aborted"] = True
        except Exception as error:  # noqa: BLE001 - the last place where it can be told; the line carries it
            facts["exc_info"] = error
            if status is None:
                await refuse(scope, watched, internal(request_id))
            else:
                facts["truncated"] = True  # returning without the end makes the server drop the connection
        finally:
            self._now -= 1
            self._tell(scope, facts, status, time.perf_counter() - began)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, state: dict[str, Any]) -> None:
        try:
            if self._now > self.limit:
                raise MicaError(
                    Code.BUSY,
                    f"{self.limit} requests and streams are being served already",
                    hint="close some, or try again",
                    retryable=True,
                )
            headers = dict(scope["headers"])
            state["actor"] = self._access.identify(cast("dict[str, Any]", scope), headers)
        except MicaError as error:
            state["log"]["code"] = str(error.code)
            await refuse(scope, send, error)
            return
        await self._app(scope, receive, send)

    def _tell(self, scope: Scope, facts: dict[str, Any], status: int | None, seconds: float) -> None:
        actor = scope["state"].get("actor")
        method = "WS" if scope["type"] == ScopeType.WEBSOCKET else str(scope["method"])
        route = scope.get("path_template") or ""
        self._metrics.request(method, route, status or 0, seconds)
        level = self._log.error if "exc_info" in facts and (status is None or status >= 500) else self._log.info
        level(
            "request",
            method=method,
            route=route or None,
            path=scope["path"] if not route else None,
            status=status,
            ms=round(seconds * 1000, 1),
            actor=actor.source if actor else None,
            request_id=scope["state"]["request_id"],
            **facts,
        )
