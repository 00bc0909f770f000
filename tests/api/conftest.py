"""A client straight into the application, and one that is nobody in particular."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from litestar import Litestar
from structlog.testing import LogCapture

from mica.api.app import create_app
from mica.api.auth import Access, Peer
from mica.api.lifetime import Lifetime
from mica.api.server import ApiServer
from tests.api.fake_engine import FakeEngine

Scope = MutableMapping[str, Any]
TOKEN = "correct horse battery staple"


class Connected:
    """The ASGI application as the server calls it for a connection of ``peer`` (``None``: over TCP)."""

    def __init__(self, app: Litestar, peer: Peer | None) -> None:
        self.app, self.peer = app, peer

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Any]) -> None:
        scope["state"] = {"peer": self.peer}
        await self.app(scope, receive, send)  # type: ignore[arg-type]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def lines() -> LogCapture:
    return LogCapture()


@pytest.fixture
def lifetime() -> Lifetime:
    return Lifetime()


@pytest.fixture
def app(engine: FakeEngine, lines: LogCapture, lifetime: Lifetime) -> Litestar:
    access = Access(uid=4242, group="root", token=TOKEN)
    return create_app(engine, access=access, log=structlog.wrap_logger(None, processors=[lines]), lifetime=lifetime)


def connect(app: Litestar, peer: Peer | None, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(Connected(app, peer))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **options)


@pytest.fixture
async def http(app: Litestar) -> AsyncIterator[httpx.AsyncClient]:
    """As root over the UNIX socket."""
    async with connect(app, Peer(os.getpid(), 0, 0)) as client:
        yield client


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api.sock"


@pytest.fixture
def served_app(engine: FakeEngine, lines: LogCapture, lifetime: Lifetime) -> Litestar:
    access = Access(uid=os.getuid(), group="no-such-group", token=TOKEN)
    return create_app(engine, access=access, log=structlog.wrap_logger(None, processors=[lines]), lifetime=lifetime)


@pytest.fixture
async def server(served_app: Litestar, lifetime: Lifetime, path: Path) -> AsyncIterator[ApiServer]:
    """On a real socket, for this user, and on TCP with ``TOKEN``."""
    async with ApiServer(served_app, lifetime, unix=path, tcp=("127.0.0.1", 0)) as running:
        yield running


def over_unix(path: Path) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://mica")
