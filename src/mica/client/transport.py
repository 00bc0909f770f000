"""HTTP and WebSocket to one daemon: deadlines, problems as :class:`MicaError`, and starting the daemon when absent.

A request that changes something carries an ``Idempotency-Key``, so it is sent again after a lost connection and still
happens once. A daemon that dies takes all idle connections with it, and each may be noticed only by the next request
on it: so a request is sent again until it has had a connection of its own.
"""

from __future__ import annotations

import ssl
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from mica.model.errors import Code, MicaError, invalid

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

T = TypeVar("T")
Params = Mapping[str, str | int | float | bool | Sequence[str] | None]

DEFAULT_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10.0
_KEEP_ALIVE = 4
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class WireProblem(msgspec.Struct, frozen=True):
    """The members of ``application/problem+json`` (RFC 9457) that Mica's daemon sends."""

    code: str = ""
    title: str = ""
    detail: str = ""
    status: int = 0
    hint: str = ""
    retryable: bool = False
    details: dict[str, Any] = {}


@dataclass(frozen=True)
class Endpoint:
    """Where a daemon is: a UNIX socket, or a base URL with a bearer token."""

    socket: str = ""
    url: str = ""
    token: str = ""

    @property
    def text(self) -> str:
        return self.url or f"unix://{self.socket}"


def parse_url(url: str, token: str) -> Endpoint:
    """An endpoint for ``http://…``, ``https://…`` or ``unix:///path``. Raises ``invalid``.

    A token never travels unencrypted to another host: there, ``https`` or an SSH tunnel is needed.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix" and parts.path.startswith("/") and not parts.netloc:
        return Endpoint(socket=parts.path)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise invalid(f"{url!r} is not the URL of a daemon", hint="write http://127.0.0.1:PORT or unix:///PATH")
    if parts.scheme == "http" and token and parts.hostname not in _LOOPBACK:
        raise invalid(
            f"the token would travel to {parts.hostname} unencrypted",
            hint=f"use https, or a tunnel: ssh -L 8006:127.0.0.1:{parts.port or 80} {parts.hostname}",
        )
    return Endpoint(url=url.rstrip("/"), token=token)


def path_of(*parts: str) -> str:
    """``/v1`` and the parts, each quoted as one path segment (RFC 3986 section 3.3)."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def problem_error(body: bytes, status: int, where: str) -> MicaError:
    """The error that a response tells; one that is no problem document becomes ``internal`` with its beginning."""
    try:
        wire = msgspec.json.decode(body, type=WireProblem)
    except msgspec.DecodeError:
        wire = WireProblem()
    if not wire.code:
        text = body[:200].decode(errors="replace").strip()
        return MicaError(Code.INTERNAL, f"{where} was answered with HTTP status {status}: {text or 'no text'}")
    message = wire.detail or wire.title or wire.code
    try:
        code = Code(wire.code)
    except ValueError:  # a newer daemon
        return MicaError(
            Code.INTERNAL,
            f"{message} ({wire.code})",
            hint=wire.hint,
            retryable=wire.retryable,
            details={**wire.details, "code": wire.code},
        )
    return MicaError(code, message, hint=wire.hint, retryable=wire.retryable, details=wire.details)


def _query(params: Params | None) -> httpx.QueryParams:
    out: list[tuple[str, str | int | float | bool | None]] = []
    for key, value in (params or {}).items():
        if value is None or value is False or value == "":
            continue
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        out += [(key, "true" if item is True else str(item)) for item in values]
    return httpx.QueryParams(out)


class Transport:
    """One daemon's HTTP connections. ``starter`` starts the daemon when nobody listens; ``None``: nobody does.

    ``unreachable`` makes the error for a daemon that does not answer.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout_s: float,
        starter: Callable[[], Awaitable[object]] | None,
        unreachable: Callable[[BaseException], MicaError],
    ) -> None:
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self._starter = starter
        self._unreachable = unreachable
        headers = {"Accept": "application/json, application/problem+json"}
        if endpoint.token:
            headers["Authorization"] = f"Bearer {endpoint.token}"
        # A UNIX socket needs no certificates, and loading them costs 20 ms.
        secure = endpoint.url.startswith("https:")
        transport = httpx.AsyncHTTPTransport(
            verify=ssl.create_default_context() if secure else False,
            uds=endpoint.socket or None,
            limits=httpx.Limits(max_connections=100, max_keepalive_connections=_KEEP_ALIVE, keepalive_expiry=4.0),
        )
        self._http = httpx.AsyncClient(
            transport=transport,
            base_url=endpoint.url or "http://localhost",
            headers=headers,
            timeout=self._timeout(timeout_s),
            trust_env=False,
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    @staticmethod
    def _timeout(timeout_s: float) -> httpx.Timeout:
        return httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))

    async def request(
        self,
        method: str,
        path: str,
        type: type[T],  # noqa: A002 - the same word as msgspec's
        *,
        params: Params | None = None,
        body: Any = None,
        if_match: int | None = None,
        replay: bool = True,
        timeout_s: float | None = None,
    ) -> T:
        """Send and decode. ``replay``: send again after a lost connection (the daemon knows it by its key).

        Raises what the daemon says; ``daemon-unreachable``; ``timeout`` after ``timeout_s`` seconds without an answer.
        """
        headers: dict[str, str] = {}
        content = None
        if body is not None:
            content = msgspec.json.encode(body)
            headers["Content-Type"] = "application/json"
        if method != "GET":
            headers["Idempotency-Key"] = uuid.uuid4().hex
        if if_match is not None:
            headers["If-Match"] = f'"{if_match}"'
        response = await self._send(method, path, _query(params), content, headers, replay, timeout_s)
        where = f"{method} {path}"
        if response.is_error:
            raise problem_error(response.content, response.status_code, where)
        try:
            return msgspec.json.decode(response.content or b"null", type=type)
        except msgspec.DecodeError as error:
            raise MicaError(
                Code.INTERNAL,
                f"{where}: the answer is not understood: {error}",
                hint="the daemon may be of another version: compare mica --version with mica host show",
            ) from error

    async def raw(self, path: str, *, params: Params | None = None, timeout_s: float | None = None) -> bytes:
        """The body of a ``GET`` as it is."""
        response = await self._send("GET", path, _query(params), None, {}, True, timeout_s)
        if response.is_error:
            raise problem_error(response.content, response.status_code, f"GET {path}")
        return response.content

    async def _send(
        self,
        method: str,
        path: str,
        query: httpx.QueryParams,
        content: bytes | None,
        headers: dict[str, str],
        replay: bool,
        timeout_s: float | None,
    ) -> httpx.Response:
        timeout = self._timeout(timeout_s if timeout_s is not None else self.timeout_s)
        starts, replays = (1 if self._starter else 0), (_KEEP_ALIVE + 1 if replay else 0)
        while True:
            try:
                return await self._http.request(
                    method, path, params=query, content=content, headers=headers, timeout=timeout
                )
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if not starts or is_denied(error):
                    raise self._unreachable(error) from error
                starts -= 1
                await self.start_if_absent()
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError, httpx.CloseError) as error:
                if not replays:
                    raise lost(f"{method} {path}") from error
                replays -= 1
            except httpx.TimeoutException as error:
                raise too_slow(f"{method} {path}", timeout_s or self.timeout_s) from error

    async def start_if_absent(self) -> None:
        """Make sure that a daemon runs, where this client may start one."""
        if self._starter is not None:
            await self._starter()

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        content: AsyncIterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        idle_s: float | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """A request whose body or answer streams; ``idle_s`` bounds each wait for the next bytes.

        Raises like :meth:`request`; a connection lost midway is ``daemon-unreachable`` and retryable.
        """
        where = f"{method} {path}"
        idle = idle_s if idle_s is not None else self.timeout_s
        try:
            async with self._http.stream(
                method,
                path,
                params=_query(params),
                content=content,
                headers=dict(headers or {}),
                timeout=self._timeout(idle),
            ) as response:
                if response.is_error:
                    raise problem_error(await response.aread(), response.status_code, where)
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._unreachable(error) from error
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError, httpx.CloseError) as error:
            raise lost(where) from error
        except httpx.TimeoutException as error:
            raise too_slow(where, idle) from error

    async def websocket(self, path: str, params: Params | None = None) -> ClientConnection:
        """Open a WebSocket (RFC 6455). Its keep-alive pings bound how long a dead peer goes unnoticed: 40 s."""
        import websockets.asyncio.client as ws
        from websockets.exceptions import InvalidHandshake, InvalidStatus

        query = str(_query(params))
        base = "ws" + self.endpoint.url.removeprefix("http") if self.endpoint.url else "ws://localhost"
        uri = f"{base}{path}" + (f"?{query}" if query else "")
        headers = {"Authorization": f"Bearer {self.endpoint.token}"} if self.endpoint.token else None
        options: dict[str, Any] = {
            "additional_headers": headers,
            "compression": None,  # on one host it only costs
            "open_timeout": self.timeout_s,
            "ping_interval": 20,
            "ping_timeout": 20,
            "close_timeout": 5,
            "max_size": 4 * 1024**2,
            "max_queue": 32,
            "proxy": None,
        }
        try:
            if self.endpoint.socket:
                return await ws.unix_connect(self.endpoint.socket, uri, **options)
            return await ws.connect(uri, **options)
        except InvalidStatus as error:
            body = bytes(error.response.body or b"")
            raise problem_error(body, error.response.status_code, f"WebSocket {path}") from error
        except (ConnectionError, FileNotFoundError, PermissionError) as error:
            raise self._unreachable(error) from error
        except (InvalidHandshake, OSError) as error:
            raise lost(f"WebSocket {path}") from error
        except TimeoutError as error:
            raise too_slow(f"WebSocket {path}", self.timeout_s) from error


def is_denied(error: BaseException | None) -> bool:
    """Whether a refused permission is at the root of a failed connection."""
    while error is not None:
        if isinstance(error, PermissionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def lost(where: str) -> MicaError:
    return MicaError(
        Code.DAEMON_UNREACHABLE,
        f"{where}: the connection to the daemon was lost",
        hint="VMs and operations outlive the daemon: look with mica daemon status, mica operation list",
        retryable=True,
    )


def too_slow(where: str, limit_s: float) -> MicaError:
    return MicaError(
        Code.TIMEOUT,
        f"{where}: the daemon did not answer within {limit_s:g} s",
        hint="look at its log with: mica daemon log",
        retryable=True,
    )
