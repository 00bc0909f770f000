"""Commands in guests: over the API, and their streams over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from mica.api.server import ApiServer
from mica.model.exec import ExecState
from tests.api.conftest import over_unix
from tests.api.fake_engine import FakeEngine


@pytest.fixture
async def vm(engine: FakeEngine, server: ApiServer, path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a daemon with a running VM ``web``."""
    async with over_unix(path) as http:
        await http.post("/v1/vms", json={"name": "web", "start": True})
        yield http
    async with asyncio.timeout(5):
        while engine.watchers:  # whoever followed has let go of the engine
            await asyncio.sleep(0.001)


async def start(http: httpx.AsyncClient, *argv: str, **options: Any) -> str:
    reply = await http.post("/v1/vms/web/execs", json={"argv": list(argv), **options})
    assert reply.status_code == 201, reply.text
    assert reply.headers["location"] == f"/v1/vms/web/execs/{reply.json()['id']}"
    return str(reply.json()["id"])


def stream(path: Path, exec_id: str, query: str = "") -> connect:
    url = f"ws://mica/v1/vms/web/execs/{exec_id}/stream{query}"
    return unix_connect(str(path), url, compression=None)


async def read_all(ws: ClientConnection) -> tuple[bytes, bytes, dict[str, Any]]:
    """Standard output, standard error, and how it ended."""
    out = {1: b"", 2: b""}
    last: dict[str, Any] = {}
    async for frame in ws:
        assert not last, "something came after the end"
        if isinstance(frame, str):
            last = json.loads(frame)
        else:
            out[frame[0]] += frame[1:]
    assert ws.close_code == 1000
    return out[1], out[2], last


async def test_both_outputs_then_how_it_ended_then_1000(vm: httpx.AsyncClient, path: Path) -> None:
    id_ = await start(vm, "both")
    async with stream(path, id_) as ws:
        out, err, last = await read_all(ws)
    assert (out, err) == (b"out", b"err")
    assert (last["id"], last["state"], last["exit_code"]) == (id_, "exited", 3)


async def test_output_from_offsets_as_often_as_wanted(vm: httpx.AsyncClient, path: Path) -> None:
    id_ = await start(vm, "both")
    for query, expected in (
        ("?stdout=1&stderr=3", (b"ut", b"")),
        ("?stderr=2", (b"out", b"r")),
        ("", (b"out", b"err")),
    ):
        async with stream(path, id_, query) as ws:
            assert (await read_all(ws))[:2] == expected


async def test_input_goes_in_live_and_an_empty_frame_ends_it(vm: httpx.AsyncClient, path: Path) -> None:
    id_ = await start(vm, "cat", stdin=True)
    async with stream(path, id_) as ws:
        await ws.send(b"\0one ")
        assert await ws.recv() == b"\x01one "
        await ws.send(b"\0two")
        assert await ws.recv() == b"\x01two"
        await ws.send(b"\0")
        out, _, last = await read_all(ws)
    assert (out, last["exit_code"]) == (b"", 0)


async def test_a_command_that_takes_no_more_input_says_so_and_goes_on_talking(
    engine: FakeEngine, vm: httpx.AsyncClient, path: Path
) -> None:
    id_ = await start(vm, "deaf", stdin=True)
    async with stream(path, id_) as ws:
        for _ in range(3):
            await ws.send(b"\0data")
        frame = await ws.recv()
        assert isinstance(frame, bytes)
        assert frame[0] == 0
        assert json.loads(frame[1:])["code"] == "state-conflict"
        await engine.say(id_, "stdout", b"still here")
        assert await ws.recv() == b"\x01still here"
        await engine.end(id_, 0)
        assert (await read_all(ws))[2]["state"] == "exited"


@pytest.mark.parametrize("frame", [b"", b"\x01out", b"\x07"])
async def test_a_frame_for_another_channel_is_refused(vm: httpx.AsyncClient, path: Path, frame: bytes) -> None:
    id_ = await start(vm, "cat", stdin=True)
    async with stream(path, id_) as ws:
        await ws.send(frame)
        with pytest.raises(ConnectionClosed) as caught:
            await ws.recv()
    assert caught.value.rcvd is not None
    assert (caught.value.rcvd.code, caught.value.rcvd.reason[:7]) == (4400, "invalid")


async def test_the_command_goes_on_when_its_client_goes(engine: FakeEngine, vm: httpx.AsyncClient, path: Path) -> None:
    id_ = await start(vm, "cat", stdin=True)
    async with stream(path, id_) as ws:
        await ws.send(b"\0before")
        assert await ws.recv() == b"\x01before"
    assert (await vm.get(f"/v1/vms/web/execs/{id_}")).json()["state"] == "running"
    await engine.say(id_, "stdout", b" after")
    async with stream(path, id_, "?stdout=6") as ws:
        assert await ws.recv() == b"\x01 after"


async def test_a_slow_reader_slows_nobody_and_loses_nothing(
    vm: httpx.AsyncClient, path: Path, server: ApiServer
) -> None:
    id_ = await start(vm, "yes", "8000000")
    async with stream(path, id_) as slow:
        async with stream(path, id_) as quick, asyncio.timeout(20):
            assert len((await read_all(quick))[0]) == 8_000_000
        buffered = [c.transport.get_write_buffer_size() for c in server._server.server_state.connections]
        assert max(buffered) < 256 * 1024
        async with asyncio.timeout(20):
            out, _, last = await read_all(slow)
    assert len(out) == 8_000_000
    assert last["exit_code"] == 0


@pytest.mark.parametrize(
    ("exec_id", "query", "status"), [("exec-9", "", 404), ("exec-1", "?stdout=x", 400), ("exec-1", "?stdin=0", 400)]
)
async def test_a_stream_that_cannot_be_is_an_answer(
    vm: httpx.AsyncClient, path: Path, exec_id: str, query: str, status: int
) -> None:
    await start(vm, "cat")
    with pytest.raises(InvalidStatus) as caught:
        async with stream(path, exec_id, query):
            pytest.fail("it was accepted")
    assert caught.value.response.status_code == status


async def test_an_offset_beyond_the_end_is_told_in_the_close_frame(vm: httpx.AsyncClient, path: Path) -> None:
    id_ = await start(vm, "both")
    async with stream(path, id_, "?stdout=3&stderr=100") as ws:
        with pytest.raises(ConnectionClosed) as caught:
            await ws.recv()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 4400
    assert "100" in caught.value.rcvd.reason


async def test_closing_leaves_the_command_and_says_1012(
    engine: FakeEngine, vm: httpx.AsyncClient, path: Path, server: ApiServer
) -> None:
    id_ = await start(vm, "sleep")
    async with stream(path, id_) as ws:
        await server._end()
        with pytest.raises(ConnectionClosed) as caught:
            await ws.recv()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1012
    assert engine.commands[id_].state is ExecState.RUNNING


async def test_waiting_for_a_command(engine: FakeEngine, vm: httpx.AsyncClient) -> None:
    id_ = await start(vm, "sleep")
    url = f"/v1/vms/web/execs/{id_}"
    assert (await vm.get(f"{url}?wait=0.05")).json()["state"] == "running"
    waiting = asyncio.create_task(vm.get(f"{url}?wait=60"))
    killed = await vm.post(f"{url}/kill", json={"signal": 9})
    assert (killed.status_code, killed.json()["state"]) == (200, "killed")
    async with asyncio.timeout(5):
        assert (await waiting).json()["exit_code"] == 137
    assert (await vm.post(f"{url}/kill")).status_code == 409
    assert [e["id"] for e in (await vm.get("/v1/vms/web/execs")).json()] == [id_]


async def test_what_cannot_be_run(vm: httpx.AsyncClient) -> None:
    url = "/v1/vms/web/execs"
    assert (await vm.post(url, json={"argv": []})).status_code == 400
    unknown = await vm.post(url, json={"argv": ["cat"], "comand": 1})
    assert unknown.json()["details"]["field"] == "comand"
    assert (await vm.post(url, json={"argv": "cat"})).status_code == 400
    assert (await vm.post("/v1/vms/nobody/execs", json={"argv": ["cat"]})).status_code == 404
    failed = await vm.post(url, json={"argv": ["nonsense"]})
    assert (failed.status_code, failed.json()["state"]) == (201, "failed")
    await vm.post("/v1/vms/web/stop")
    stopped = await vm.post(url, json={"argv": ["cat"]})
    assert (stopped.status_code, stopped.json()["code"]) == (409, "agent-unavailable")


@pytest.mark.parametrize("signal", [0, 65, "TERM", -1])
async def test_a_signal_that_is_none(vm: httpx.AsyncClient, signal: Any) -> None:
    id_ = await start(vm, "sleep")
    reply = await vm.post(f"/v1/vms/web/execs/{id_}/kill", json={"signal": signal})
    assert reply.status_code == 400
    assert "signal" in reply.json()["detail"]


async def test_an_exec_that_is_not_there(vm: httpx.AsyncClient) -> None:
    assert (await vm.get("/v1/vms/web/execs/none")).status_code == 404
    assert (await vm.post("/v1/vms/web/execs/none/kill")).status_code == 404
    assert (await vm.get("/v1/vms/nobody/execs")).status_code == 404
