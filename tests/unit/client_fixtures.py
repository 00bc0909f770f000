"""A daemon's API over an engine in memory, served on a UNIX socket from a thread, and ``mica`` run against it."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import structlog

from mica.api.app import create_app
from mica.api.auth import Access
from mica.api.lifetime import Lifetime
from mica.api.server import ApiServer
from mica.cli.main import run
from mica.cli.world import World
from mica.model.operation import Actor, Operation, OperationState
from tests.api.fake_engine import FakeEngine

T = TypeVar("T")

TOKEN = "a token of this test"


class Engine(FakeEngine):
    """Operations that are cancelled end at once, unless ``stubborn``."""

    stubborn = False

    async def cancel(self, operation_id: str, *, by: Actor) -> Operation:
        operation = await super().cancel(operation_id, by=by)
        return operation if self.stubborn else await self.finish(operation.id, OperationState.CANCELLED)


class Served:
    """The API on ``socket`` while ``start`` is in force; ``engine`` outlives a restart of the server."""

    def __init__(self, socket: Path, kind: type[FakeEngine]) -> None:
        self.socket = socket
        self.url = f"unix://{socket}"
        self.tcp_url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="api")
        self._thread.start()
        self._stop: asyncio.Event | None = None
        self._serving: Future[None] | None = None
        self.engine = self.call(self._make(kind))

    @staticmethod
    async def _make(kind: type[FakeEngine]) -> FakeEngine:
        return kind()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it where the engine lives."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    def start(self) -> None:
        up = threading.Event()
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(up), self._loop)
        assert up.wait(30)

    async def _serve(self, up: threading.Event) -> None:
        self._stop = asyncio.Event()
        lifetime = Lifetime()
        log = structlog.wrap_logger(None, processors=[_quiet])
        app = create_app(
            self.engine, access=Access(uid=os.geteuid(), group="", token=TOKEN), log=log, lifetime=lifetime
        )
        async with ApiServer(app, lifetime, unix=self.socket, tcp=("127.0.0.1", 0)) as server:
            self.tcp_url = f"http://127.0.0.1:{server.port}"
            up.set()
            await self._stop.wait()

    def stop(self) -> None:
        """The daemon goes away, its connections with it."""
        if self._serving is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._serving.result(timeout=30)
            self._serving = None

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        self._loop.close()


def _quiet(_logger: object, _method: str, _event: object) -> Any:
    raise structlog.DropEvent


@contextmanager
def served(kind: type[FakeEngine] = Engine) -> Iterator[Served]:
    """In a directory with a short name: pytest's are too long for sockets."""
    directory = Path(tempfile.mkdtemp(prefix="mica-"))
    api = Served(directory / "api.sock", kind)
    try:
        api.start()
        yield api
    finally:
        api.close()
        shutil.rmtree(directory)


class Ended(NamedTuple):
    status: int
    out: str
    err: str


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def mica(
    *argv: str, url: str = "", environ: dict[str, str] | None = None, terminal: bool = False, stdin: str = ""
) -> Ended:
    """Run the command line in this process."""
    kind = Terminal if terminal else io.TextIOWrapper
    out, err = kind(io.BytesIO(), encoding="utf-8"), kind(io.BytesIO(), encoding="utf-8")
    variables = {"MICA_URL": url} if url else {}
    world = World(
        {**variables, "COLUMNS": "100", **(environ or {})},
        os.geteuid(),
        kind(io.BytesIO(stdin.encode()), encoding="utf-8"),
        out,
        err,
    )
    status = run(list(argv), world)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return Ended(status, *texts)
