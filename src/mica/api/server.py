"""The listening side: uvicorn on a UNIX socket, and on loopback TCP when asked.

uvicorn does not say who is at the other end of a UNIX socket. Its protocol classes copy a per-connection ``app_state``
into the scope of each request and hand it on to the WebSocket protocol, so one subclass that adds the peer there serves
both.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mica.api.auth import peer_of
from mica.model.errors import Code, MicaError, invalid

if TYPE_CHECKING:
    from uvicorn._types import ASGIApplication

    from mica.api.lifetime import Lifetime

# sockaddr_un.sun_path has 108 bytes, the last of them NUL (unix(7)).
MAX_SOCKET_PATH = 107
BACKLOG = 256
# Streams end by themselves when the server closes; this bounds what does not, such as a reader that does not read.
SHUTDOWN_S = 3
# A console line or a chunk of stdin: larger frames are refused before they are held in memory.
MAX_FRAME = 1024 * 1024


class PeerProtocol(H11Protocol):
    """HTTP/1.1 that knows its peer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer = peer_of(transport.get_extra_info("socket"))
        self.app_state = {**self.app_state, "peer": peer}
        super().connection_made(transport)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers (the daemon has its own) and without its ten wake-ups a second."""

    def __init__(self, config: uvicorn.Config, lifetime: Lifetime) -> None:
        super().__init__(config)
        self._lifetime = lifetime
        self.accepting = asyncio.Event()
        self.stop = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        await self.on_tick(0)
        self.accepting.set()
        await self.stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._lifetime.closing.set()
        await super().shutdown(sockets)


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # a full backlog, a time-out: somebody is there
    return True


def bind_unix(path: Path, *, mode: int, gid: int | None = None) -> socket.socket:
    """Listen on ``path``, which appears at once with ``mode`` and group ``gid``.

    Only the holder of the home's lock may call this: it replaces a socket that a dead daemon left. One that is served
    is never replaced, and neither is anything that is no socket. Raises ``invalid``, ``home-locked``, ``in-use``.
    """
    spare = path.with_name(f".{path.name}.{os.getpid()}")
    if len(os.fsencode(spare)) > MAX_SOCKET_PATH:
        raise invalid(
            f"the socket path {path} is too long ({len(os.fsencode(path))} bytes; with Mica's prefix "
            f"it may have {MAX_SOCKET_PATH})",
            hint="set XDG_RUNTIME_DIR to a shorter directory",
        )
    if path.is_symlink() or (path.exists() and not stat.S_ISSOCK(path.lstat().st_mode)):
        raise MicaError(Code.IN_USE, f"{path} exists and is no socket", hint="move it away")
    if path.exists() and _is_served(path):
        raise MicaError(Code.HOME_LOCKED, f"another daemon serves {path}", hint="`mica daemon stop` ends it")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        spare.unlink(missing_ok=True)
        # Made under another name, so that nobody can connect before the mode is right, and none finds the path empty.
        old = os.umask(0o177)
        try:
            sock.bind(os.fspath(spare))
        finally:
            os.umask(old)
        if gid is not None:
            os.chown(spare, -1, gid)
        spare.chmod(mode)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        spare.rename(path)
    except BaseException:
        sock.close()
        spare.unlink(missing_ok=True)
        raise
    return sock


def bind_tcp(host: str, port: int) -> socket.socket:
    """Listen on a loopback address; port 0 takes a free one. Raises ``invalid``, ``in-use``."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise invalid(f"{host!r} is no address", hint="use 127.0.0.1 or ::1") from None
    if not address.is_loopback:
        raise invalid(f"{host} is no loopback address", hint="use 127.0.0.1, and SSH to reach it from elsewhere")
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        return socket.create_server((str(address), port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise MicaError(
            Code.IN_USE, f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another port"
        ) from error


class ApiServer:
    """Serves ``app`` while entered. ``lifetime`` is the application's own: it is closed first when the server stops.

    On leaving, no new connection is taken, streams end (WebSockets with code 1012), requests that run are waited for,
    and what is left after ``SHUTDOWN_S`` seconds is cut. The UNIX socket's path is removed if it is still ours.
    """

    def __init__(
        self,
        app: object,
        lifetime: Lifetime,
        *,
        unix: Path,
        unix_mode: int = 0o600,
        unix_gid: int | None = None,
        tcp: tuple[str, int] | None = None,
    ) -> None:
        self._unix, self._mode, self._gid, self._tcp = unix, unix_mode, unix_gid, tcp
        config = uvicorn.Config(
            cast("ASGIApplication", app),
            http=PeerProtocol,
            ws="websockets-sansio",
            ws_max_size=MAX_FRAME,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        self._server = _Server(config, lifetime)
        self._task: asyncio.Task[None] | None = None
        self._inode = 0
        self.port: int | None = None
        """The TCP port, where TCP is served."""

    async def __aenter__(self) -> Self:
        sockets = [bind_unix(self._unix, mode=self._mode, gid=self._gid)]
        self._inode = self._unix.lstat().st_ino
        try:
            if self._tcp is not None:
                sockets.append(bind_tcp(*self._tcp))
                self.port = sockets[-1].getsockname()[1]
            self._task = asyncio.create_task(self._server.serve(sockets))
            ready = asyncio.ensure_future(self._server.accepting.wait())
            await asyncio.wait([ready, self._task], return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                ready.cancel()
                self._task.result()
                raise MicaError(Code.INTERNAL, "the API's server ended before it began")
        except BaseException:
            await self._end()
            for sock in sockets:
                sock.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        if self._unix.exists() and self._unix.lstat().st_ino == self._inode:
            self._unix.unlink()
        self._server.stop.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
