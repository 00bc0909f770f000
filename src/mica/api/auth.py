"""Who asks. On the UNIX socket the kernel says so (SO_PEERCRED, unix(7)); on TCP a token does.

Administrators are root, the daemon's own user, and members of the group ``mica``, judged by the groups that the peer's
process had when it connected: the same groups that let it open the socket at all.
"""

from __future__ import annotations

import array
import grp
import hmac
import os
import pwd
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from mica.model.errors import Code, MicaError, invalid
from mica.model.operation import Actor

# asm-generic/socket.h, since Linux 4.13; the socket module has no name for it.
SO_PEERGROUPS = 59
_UCRED = struct.Struct("3i")
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Peer(msgspec.Struct, frozen=True):
    """The process at the other end of a UNIX socket, when it connected."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def peer_of(sock: socket.socket | None) -> Peer | None:
    """The peer of a UNIX socket; ``None`` for any other."""
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        # 1024 bytes, 256 groups, is the most that the socket module asks for.
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
        groups = tuple(array.array("I", raw))
    except OSError:  # more groups than that, or an old kernel: the host's database has to do
        groups = tuple(os.getgrouplist(user_name(uid), gid))
    return Peer(pid, uid, gid, groups)


def group_id(name: str) -> int | None:
    """The id of a group of this host, ``None`` where there is none of that name."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def user_name(uid: int) -> str:
    """The name of a user, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class Access:
    """The rule of who may do what. ``uid`` is the daemon's own; ``token`` is empty where TCP is not served.

    ``lookup`` finds the id of ``group``, anew for each request: it may be made while the daemon runs.
    """

    def __init__(
        self, *, uid: int, group: str = "mica", token: str = "", lookup: Callable[[str], int | None] = group_id
    ) -> None:
        self._uid = uid
        self._group = group
        self._lookup = lookup
        self._token = token.encode()
        self._names: dict[int, str] = {}

    def identify(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> Actor:
        """Who sent this request. Raises ``unauthenticated``, ``forbidden``, ``invalid`` (a foreign Host header)."""
        peer = scope["state"].get("peer")
        if isinstance(peer, Peer):
            return self._from_peer(peer, scope["path"])
        self._check_host(headers.get(b"host", b"").decode("latin-1"))
        return self._from_token(headers.get(b"authorization", b""))

    def _from_peer(self, peer: Peer, path: str) -> Actor:
        # Liveness tells nothing and changes nothing; whoever can open the socket may ask for it.
        if peer.uid in (0, self._uid) or self._in_group(peer) or path == "/v1/health":
            return Actor(self._name(peer.uid), f"unix:uid={peer.uid}")
        raise MicaError(
            Code.FORBIDDEN,
            f"user {self._name(peer.uid)} (uid {peer.uid}) may not use this daemon",
            hint=f"administrators are root, uid {self._uid} and the group {self._group}: "
            f"`sudo usermod -aG {self._group} {self._name(peer.uid)}`, then log in anew",
            details={"uid": peer.uid},
        )

    def _in_group(self, peer: Peer) -> bool:
        gid = self._lookup(self._group)
        return gid is not None and (peer.gid == gid or gid in peer.groups)

    def _name(self, uid: int) -> str:
        if uid not in self._names:
            if len(self._names) >= 1024:
                self._names.clear()
            self._names[uid] = user_name(uid)
        return self._names[uid]

    @staticmethod
    def _check_host(host: str) -> None:
        """A page on the internet can point a name of its own at 127.0.0.1; its Host header gives it away."""
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        if name.lower() not in _LOCAL_HOSTS:
            raise invalid(f"the Host header says {host!r}", hint="use http://127.0.0.1:PORT or http://localhost:PORT")

    def _from_token(self, header: bytes) -> Actor:
        scheme, _, token = header.partition(b" ")
        if self._token and scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token):
            return Actor("token", "token")
        raise MicaError(
            Code.UNAUTHENTICATED,
            "the token is wrong" if header else "a token is needed here",
            hint="send 'Authorization: Bearer TOKEN' with the content of the daemon's token file, "
            "with mica by `--token-file FILE`; or use its socket",
        )
