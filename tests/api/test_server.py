"""A real server on a real socket, in this process."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog
from litestar import Litestar
from structlog.testing import LogCapture

from mica.api.app import create_app
from mica.api.auth import Access
from mica.api.lifetime import Lifetime
from mica.api.server import ApiServer, bind_tcp, bind_unix
from mica.model.errors import Code, MicaError
from tests.api.conftest import TOKEN, over_unix
from tests.api.fake_engine import FakeEngine


async def test_the_peer_of_the_socket_is_who_asks(server: ApiServer, path: Path, lines: LogCapture) -> None:
    async with over_unix(path) as http:
        reply = await http.post("/v1/vms", json={"name": "web"})
        assert reply.status_code == 202
        assert reply.json()["by"]["source"] == f"unix:uid={os.getuid()}"
        assert (await http.get("/v1")).json()["revision"] == 3
    assert [entry["actor"] for entry in lines.entries] == [f"unix:uid={os.getuid()}"] * 2


async def ask_as(path: Path, *who: str) -> list[str]:
    """``STATUS BODY`` of ``/v1`` and ``/v1/health``, asked by a process under other credentials.

    In Perl, which every Debian has and everybody may run: our own interpreter may lie where only we can reach it.
    """
    script = (
        "for my $page ('/v1', '/v1/health') { my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die $!;"
        'print $s "GET $page HTTP/1.1\\r\\nHost: mica\\r\\nConnection: close\\r\\n\\r\\n"; $s->flush;'
        "local $/; my $r = <$s>; my ($head, $body) = split /\\r\\n\\r\\n/, $r, 2;"
        "print substr($head, 9, 3), ' ', $body, qq{\\n} }"
    )
    process = await asyncio.create_subprocess_exec(
        "setpriv", *who, "perl", "-MIO::Socket::UNIX", "-e", script, str(path),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0, err
    return out.decode().splitlines()


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A socket path that other users can reach."""
    with tempfile.TemporaryDirectory(prefix="mica-api-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory, "api.sock")


@pytest.mark.root
async def test_another_user_is_refused_but_may_ask_for_health(
    served_app: Litestar, lifetime: Lifetime, public_path: Path
) -> None:
    async with ApiServer(served_app, lifetime, unix=public_path, unix_mode=0o666):
        first, second = await ask_as(public_path, "--reuid=65534", "--regid=65534", "--clear-groups")
    assert first.startswith("403 ")
    assert '"code":"forbidden"' in first
    assert "uid 65534" in first
    assert second.startswith("200 ")


@pytest.mark.root
async def test_another_user_cannot_even_connect_by_default(
    served_app: Litestar, lifetime: Lifetime, public_path: Path
) -> None:
    async with ApiServer(served_app, lifetime, unix=public_path):
        with pytest.raises(AssertionError, match="Permission denied"):
            await ask_as(public_path, "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.mark.root
@pytest.mark.parametrize(
    "who",
    [["--reuid=65534", "--regid=65534", "--groups=4711,4712"], ["--reuid=65534", "--regid=4711", "--clear-groups"]],
)
async def test_members_of_the_group_are_administrators(
    engine: FakeEngine,
    lines: LogCapture,
    lifetime: Lifetime,
    public_path: Path,
    who: list[str],
) -> None:
    access = Access(uid=4242, group="mica", lookup={"mica": 4711}.get)
    app = create_app(engine, access=access, log=structlog.wrap_logger(None, processors=[lines]), lifetime=lifetime)
    async with ApiServer(app, lifetime, unix=public_path, unix_mode=0o660, unix_gid=4711):
        assert stat.S_IMODE(public_path.stat().st_mode) == 0o660
        assert public_path.stat().st_gid == 4711
        assert [line[:3] for line in await ask_as(public_path, *who)] == ["200", "200"]


async def test_tcp_needs_the_token(server: ApiServer) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http:
        none = await http.get("/v1/health")
        assert none.status_code == 401
        assert none.headers["www-authenticate"] == "Bearer"
        assert (await http.get("/v1", headers={"Authorization": "Bearer wrong"})).status_code == 401
        assert (await http.get("/v1", headers={"Authorization": f"Basic {TOKEN}"})).status_code == 401
        good = await http.post("/v1/vms", json={"name": "web"}, headers={"Authorization": f"Bearer {TOKEN}"})
        assert good.json()["by"] == {"name": "token", "source": "token"}


async def test_tcp_refuses_a_foreign_host_even_with_the_token(server: ApiServer) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http:
        headers = {"Authorization": f"Bearer {TOKEN}", "Host": "evil.example"}
        reply = await http.get("/v1", headers=headers)
        assert reply.status_code == 400
        assert "evil.example" in reply.json()["detail"]
        for host in (f"localhost:{server.port}", "127.0.0.1", f"[::1]:{server.port}", "[::1]", "LOCALHOST"):
            assert (await http.get("/v1", headers={**headers, "Host": host})).status_code == 200, host


def test_tcp_binds_loopback_only() -> None:
    for host in ("0.0.0.0", "10.0.0.1", "::", "example.com"):
        with pytest.raises(MicaError) as caught:
            bind_tcp(host, 0)
        assert caught.value.code is Code.INVALID
        assert host in caught.value.message


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MicaError, match=str(port)) as caught:
            bind_tcp("127.0.0.1", port)
    assert caught.value.code is Code.IN_USE


def test_the_socket_has_its_mode_from_the_first_moment_whatever_the_umask(path: Path) -> None:
    old = os.umask(0)
    try:
        with bind_unix(path, mode=0o600):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert os.umask(0) == 0
            assert list(path.parent.iterdir()) == [path]
    finally:
        os.umask(old)


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    before = path.stat().st_ino
    with bind_unix(path, mode=0o600), socket.socket(socket.AF_UNIX) as client:
        assert path.stat().st_ino != before
        client.connect(str(path))


def test_a_served_socket_is_not_replaced(path: Path) -> None:
    with bind_unix(path, mode=0o600):
        before = path.stat().st_ino
        with pytest.raises(MicaError) as caught:
            bind_unix(path, mode=0o600)
        assert caught.value.code is Code.HOME_LOCKED
        assert path.stat().st_ino == before


def test_what_is_no_socket_is_not_replaced(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(MicaError) as caught:
        bind_unix(path, mode=0o600)
    assert caught.value.code is Code.IN_USE
    assert path.read_text() == "precious"
    path.unlink()
    path.symlink_to("/nowhere")
    with pytest.raises(MicaError):
        bind_unix(path, mode=0o600)


def test_a_path_that_is_too_long_names_the_limit(tmp_path: Path) -> None:
    with pytest.raises(MicaError, match="107"):
        bind_unix(tmp_path / ("x" * 100), mode=0o600)


async def test_closing_ends_streams_and_waits_at_once_and_removes_the_socket(
    served_app: Litestar, lifetime: Lifetime, engine: FakeEngine, path: Path
) -> None:
    loop = asyncio.get_running_loop()
    async with over_unix(path) as http:
        async with ApiServer(served_app, lifetime, unix=path):
            operation = (await http.post("/v1/vms", json={"name": "slow-web"})).json()
            waiting = asyncio.create_task(http.get(f"/v1/operations/{operation['id']}?wait=60"))
            following = asyncio.create_task(http.get("/v1/events", timeout=30))
            async with asyncio.timeout(5):
                while engine.listeners < 2:
                    await asyncio.sleep(0.005)
            began = loop.time()
        assert loop.time() - began < 2.0
        assert (await waiting).json()["state"] == "running"
        assert (await following).text.startswith("retry:")
    assert engine.listeners == 0
    assert not path.exists()


async def test_a_reader_that_does_not_read_does_not_hold_up_closing(
    served_app: Litestar, lifetime: Lifetime, engine: FakeEngine, path: Path
) -> None:
    async with ApiServer(served_app, lifetime, unix=path):
        reader, writer = await asyncio.open_unix_connection(str(path), limit=1)
        writer.write(b"GET /v1/events?since=0 HTTP/1.1\r\nHost: mica\r\n\r\n")
        await engine.tell("vm", "big", "x" * 4_000_000)
        async with asyncio.timeout(5):
            while engine.listeners < 1:
                await asyncio.sleep(0.005)
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 6.0
    assert engine.listeners == 0
    writer.close()
    assert reader is not None


async def test_a_socket_that_belongs_to_another_by_now_is_left_alone(
    served_app: Litestar, lifetime: Lifetime, path: Path
) -> None:
    async with ApiServer(served_app, lifetime, unix=path):
        path.unlink()
        other = bind_unix(path, mode=0o600)
    assert path.exists()
    other.close()


async def test_a_bad_tcp_address_leaves_nothing_behind(served_app: Litestar, lifetime: Lifetime, path: Path) -> None:
    with pytest.raises(MicaError):
        async with ApiServer(served_app, lifetime, unix=path, tcp=("0.0.0.0", 0)):
            pytest.fail("it served")
    assert not path.exists()


async def test_garbage_on_the_socket_is_answered_and_the_next_is_served(server: ApiServer, path: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b"\x00\x01\x02 nonsense\r\n\r\n")
    assert b" 400 " in await asyncio.wait_for(reader.read(200), 5)
    writer.close()
    async with over_unix(path) as http:
        assert (await http.get("/v1/health")).json()["status"] == "ok"
