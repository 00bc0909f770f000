"""The console, over a real socket: that is where back-pressure is."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from structlog.testing import LogCapture
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from mica.api.server import ApiServer
from tests.api.conftest import TOKEN, over_unix
from tests.api.fake_engine import FakeEngine


def console(path: Path, query: str = "", vm: str = "web") -> connect:
    return unix_connect(str(path), f"ws://mica/v1/vms/{vm}/console{query}", compression=None)


def split(frame: str | bytes) -> tuple[int, bytes]:
    assert isinstance(frame, bytes)
    return int.from_bytes(frame[:8], "big"), frame[8:]


async def read(ws: ClientConnection, size: int) -> tuple[int, bytes]:
    """``size`` bytes, and the offset of the first."""
    start, data = split(await ws.recv())
    while len(data) < size:
        at, more = split(await ws.recv())
        assert at == start + len(data)
        data += more
    return start, data


@pytest.fixture
async def vm(engine: FakeEngine, server: ApiServer, path: Path) -> AsyncIterator[str]:
    """A running VM ``web`` whose console says ``hello``."""
    async with over_unix(path) as http:
        reply = await http.post("/v1/vms", json={"name": "web", "start": True})
    id_ = str(reply.json()["target"].partition("/")[2])
    await engine.print(id_, b"hello")
    yield id_
    async with asyncio.timeout(5):
        while engine.watchers:  # whoever watched has let go of the engine
            await asyncio.sleep(0.001)


async def test_a_watcher_gets_history_then_what_comes(engine: FakeEngine, vm: str, path: Path) -> None:
    async with console(path) as ws:
        assert split(await ws.recv()) == (0, b"hello")
        await engine.print(vm, b" world")
        assert split(await ws.recv()) == (5, b" world")


async def test_a_watcher_resumes_where_it_was(engine: FakeEngine, vm: str, path: Path) -> None:
    async with console(path, "?offset=3") as ws:
        assert split(await ws.recv()) == (3, b"lo")


async def test_what_is_no_longer_kept_shows_in_the_offset(engine: FakeEngine, vm: str, path: Path) -> None:
    engine.kept_from = 2
    async with console(path, "?offset=0") as ws:
        assert split(await ws.recv()) == (2, b"llo")


async def test_what_is_typed_reaches_the_guest_and_all_watchers(engine: FakeEngine, vm: str, path: Path) -> None:
    async with console(path, "?offset=5") as one, console(path, "?offset=5") as two:
        await one.send(b"ls\r")
        assert split(await one.recv()) == (5, b"LS\r")
        assert split(await two.recv()) == (5, b"LS\r")
        await two.send(b"x" * 10_000)  # more than one piece
        assert await read(one, 10_000) == (8, b"X" * 10_000)
    assert engine.typed[vm] == b"ls\r" + b"x" * 10_000


async def test_a_slow_watcher_slows_nobody_and_costs_a_bounded_amount(
    engine: FakeEngine, vm: str, path: Path, server: ApiServer
) -> None:
    async with console(path, "?offset=0") as slow, console(path, "?offset=0") as quick:
        total = 5 + 8_000_000
        await engine.print(vm, b"y" * 8_000_000)
        async with asyncio.timeout(20):
            _, data = await read(quick, total)
        assert data == b"hello" + b"y" * 8_000_000
        # The slow one has read nothing: what waits for it in the server is one connection's buffer, not the history.
        buffered = [c.transport.get_write_buffer_size() for c in server._server.server_state.connections]
        assert max(buffered) < 256 * 1024
        async with asyncio.timeout(20):
            assert (await read(slow, total))[0] == 0  # and nothing was dropped for it


@pytest.mark.parametrize(
    ("vm_name", "query", "status", "word"),
    [
        ("nobody", "", 404, "nobody"),
        ("web", "?offset=-1", 400, "offset"),
        ("web", "?offset=x", 400, "offset"),
        ("web", "?ofset=1", 400, "ofset"),
    ],
)
async def test_a_refusal_is_an_answer_with_problem_details(
    vm: str, path: Path, vm_name: str, query: str, status: int, word: str, lines: LogCapture
) -> None:
    with pytest.raises(InvalidStatus) as caught:
        async with console(path, query, vm_name):
            pytest.fail("it was accepted")
    response = caught.value.response
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body = json.loads(response.body or b"")
    assert word in body["detail"]
    assert lines.entries[-1]["status"] == status
    assert lines.entries[-1]["method"] == "WS"


async def test_what_goes_wrong_later_is_in_the_close_frame(engine: FakeEngine, vm: str, path: Path) -> None:
    async with over_unix(path) as http:
        await http.post("/v1/vms/web/stop")
    async with console(path) as ws:
        await ws.recv()
        await ws.send(b"x")
        with pytest.raises(ConnectionClosed) as caught:
            await ws.recv()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 4409
    assert caught.value.rcvd.reason == "state-conflict: VM web does not run"


async def test_a_text_frame_is_refused(vm: str, path: Path) -> None:
    async with console(path) as ws:
        await ws.recv()
        await ws.send("text")
        with pytest.raises(ConnectionClosed) as caught:
            await ws.recv()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 4400


async def test_an_unexpected_exception_closes_with_its_id_only(
    engine: FakeEngine, vm: str, path: Path, lines: LogCapture
) -> None:
    async with console(path) as ws:
        await ws.recv()
        engine.fail = ZeroDivisionError("secret")
        await ws.send(b"x")
        with pytest.raises(ConnectionClosed) as caught:
            await ws.recv()
        engine.fail = None
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 4500
    assert "secret" not in caught.value.rcvd.reason
    async with asyncio.timeout(5):
        while not any("exc_info" in line for line in lines.entries):
            await asyncio.sleep(0.001)
    line = next(line for line in lines.entries if "exc_info" in line)
    assert line["request_id"] in caught.value.rcvd.reason
    assert line["status"] == 101


async def test_closing_sends_1012_at_once(engine: FakeEngine, vm: str, path: Path, server: ApiServer) -> None:
    loop = asyncio.get_running_loop()
    async with console(path) as ws:
        await ws.recv()
        began = loop.time()
        await server._end()
        with pytest.raises(ConnectionClosed) as caught:
            await ws.recv()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1012
    assert loop.time() - began < 2.0


async def test_over_tcp_a_websocket_needs_the_token_and_a_local_host(vm: str, server: ApiServer) -> None:
    url = f"ws://127.0.0.1:{server.port}/v1/vms/web/console"
    with pytest.raises(InvalidStatus) as caught:
        async with connect(url):
            pytest.fail("it was accepted")
    assert caught.value.response.status_code == 401
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with connect(url, additional_headers=headers) as ws:
        assert split(await ws.recv()) == (0, b"hello")
    evil = url.replace("127.0.0.1", "evil.example")
    with pytest.raises(InvalidStatus) as caught:
        async with connect(evil, additional_headers=headers, host="127.0.0.1", port=server.port):
            pytest.fail("it was accepted")
    assert caught.value.response.status_code == 400


async def test_a_watcher_that_vanishes_is_let_go_and_is_no_error(
    engine: FakeEngine, vm: str, path: Path, lines: LogCapture
) -> None:
    ws = await console(path)
    await ws.recv()
    ws.transport.abort()
    with contextlib.suppress(ConnectionClosed):
        await ws.wait_closed()
    async with asyncio.timeout(5):
        while not (lines.entries and lines.entries[-1]["method"] == "WS"):
            await asyncio.sleep(0.001)
    assert lines.entries[-1]["aborted"] is True
    assert lines.entries[-1]["log_level"] == "info"


async def test_a_plain_request_for_the_console_says_what_it_wants(vm: str, path: Path) -> None:
    async with over_unix(path) as http:
        reply = await http.get("/v1/vms/web/console")
    assert reply.status_code in (404, 405)
    assert reply.headers["content-type"] == "application/problem+json"


async def test_logs_are_bytes_from_the_end(engine: FakeEngine, http: httpx.AsyncClient) -> None:
    id_ = (await http.post("/v1/vms", json={"name": "web"})).json()["target"].partition("/")[2]
    await engine.print(id_, b"boot \xff\x00 done")
    whole = await http.get("/v1/vms/web/log")
    assert whole.content == b"boot \xff\x00 done"
    assert whole.headers["content-type"] == "application/octet-stream"
    assert (await http.get("/v1/vms/web/log?tail=4")).content == b"done"
    assert (await http.get("/v1/vms/web/log?tail=0")).content == b""
    assert b"qemu" in (await http.get("/v1/vms/web/log?which=qemu")).content
    for query in ("which=kernel", "tail=-1", "tail=99999999999"):
        assert (await http.get(f"/v1/vms/web/log?{query}")).status_code == 400
    assert (await http.get("/v1/vms/nobody/log")).status_code == 404
