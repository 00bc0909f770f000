"""Tar streams in and out: whole, of any length, or noticeably broken."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from structlog.testing import LogCapture

from mica.api.server import ApiServer
from tests.api.conftest import over_unix
from tests.api.fake_engine import FakeEngine


def tar_of(**files: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as opened:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            opened.addfile(entry, io.BytesIO(data))
    return archive.getvalue()


@pytest.fixture
async def vm(server: ApiServer, path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with over_unix(path) as http:
        await http.post("/v1/vms", json={"name": "web", "start": True})
        yield http


async def test_files_go_in_and_come_out_larger_than_any_body_may_be(vm: httpx.AsyncClient, engine: FakeEngine) -> None:
    content = bytes(range(256)) * 20_000  # 5 MB
    reply = await vm.put("/v1/vms/web/files", params={"path": "/tmp"}, content=tar_of(big=content, small=b"x"))
    assert reply.status_code == 200
    assert reply.json() == {"files": 2, "bytes": len(content) + 1}
    assert engine.copied_by[0].startswith("unix:uid=")
    back = await vm.get("/v1/vms/web/files", params={"path": "/tmp"})
    assert back.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(back.content)) as opened:
        member = opened.extractfile("tmp/big")
        assert member is not None
        assert member.read() == content


async def test_an_upload_of_unknown_length_is_taken(vm: httpx.AsyncClient, engine: FakeEngine) -> None:
    whole = tar_of(a=b"a" * 100_000)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(whole), 10_000):
            yield whole[start : start + 10_000]

    reply = await vm.put("/v1/vms/web/files?path=/tmp", content=chunks())
    assert reply.json() == {"files": 1, "bytes": 100_000}


async def test_an_upload_that_breaks_off_leaves_nothing_and_is_no_fault(
    vm: httpx.AsyncClient, engine: FakeEngine, path: Path, lines: LogCapture
) -> None:
    _, writer = await asyncio.open_unix_connection(str(path))
    head = b"PUT /v1/vms/web/files?path=/tmp HTTP/1.1\r\nHost: mica\r\nContent-Length: 100000\r\n\r\n"
    writer.write(head + tar_of(a=b"x")[:600])
    await writer.drain()
    async with asyncio.timeout(5):
        while not engine.copied_by:
            await asyncio.sleep(0.001)
        writer.close()
        while lines.entries[-1]["method"] != "PUT":
            await asyncio.sleep(0.001)
    assert lines.entries[-1]["status"] == 400
    assert lines.entries[-1]["log_level"] == "info"
    assert engine.files == {}


async def test_a_download_that_breaks_off_is_cut_so_that_the_client_notices(
    vm: httpx.AsyncClient, engine: FakeEngine, lines: LogCapture
) -> None:
    engine.files["/tmp/big"] = b"x" * 1_000_000
    engine.break_after = 3
    with pytest.raises(httpx.RemoteProtocolError):
        await vm.get("/v1/vms/web/files?path=/tmp")
    async with asyncio.timeout(5):
        while lines.entries[-1]["method"] != "GET":
            await asyncio.sleep(0.001)
    assert lines.entries[-1]["truncated"] is True
    assert engine.watchers == 0


async def test_a_refusal_is_an_answer_because_nothing_has_been_said_yet(
    vm: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.files["/tmp/a"] = b"x"
    missing = await vm.get("/v1/vms/web/files?path=/nowhere")
    assert (missing.status_code, missing.json()["code"]) == (404, "not-found")
    engine.break_after = 0
    broken = await vm.get("/v1/vms/web/files?path=/tmp")
    assert (broken.status_code, broken.json()["code"]) == (502, "agent-failed")
    assert engine.watchers == 0
    for reply in (
        await vm.put("/v1/vms/web/files?path=relative", content=tar_of(a=b"x")),
        await vm.put("/v1/vms/web/files", content=tar_of(a=b"x")),
        await vm.get("/v1/vms/web/files?path="),
    ):
        assert (reply.status_code, reply.json()["code"]) == (400, "invalid")
    garbage = await vm.put("/v1/vms/web/files?path=/tmp", content=b"no archive" * 100)
    assert (garbage.status_code, garbage.json()["code"]) == (422, "corrupt")
    assert (await vm.get("/v1/vms/nobody/files?path=/x")).status_code == 404


async def test_a_client_that_leaves_a_download_ends_the_reading_in_the_guest(
    vm: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.files["/tmp/big"] = b"x" * 20_000_000
    async with vm.stream("GET", "/v1/vms/web/files?path=/tmp") as reply:
        await anext(reply.aiter_raw())
        assert engine.watchers == 1
    async with asyncio.timeout(5):
        while engine.watchers:
            await asyncio.sleep(0.001)


async def test_an_upload_that_is_refused_is_not_read_to_its_end(vm: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(100_000)

    async with asyncio.timeout(30):
        reply = await vm.put("/v1/vms/none/files?path=/tmp", content=endless())
    assert reply.status_code == 404
    assert reply.headers["connection"] == "close"
    reply = await vm.put("/v1/vms/none/files?path=/tmp", content=tar_of(a=b"a" * 1_000_000))
    assert reply.status_code == 404
    assert "connection" not in reply.headers
