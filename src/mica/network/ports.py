"""Ports on the host for published guest ports: found free, or their holder named, before anything is started."""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import msgspec

from mica.model.errors import Code, MicaError, invalid
from mica.model.vm import Publish


def reserve(publish: tuple[Publish, ...]) -> tuple[Publish, ...]:
    """Check by binding that every port can be had, and choose one where ``host_port`` is 0.

    Nothing is held afterwards: whoever takes the ports is started next and is asked with :func:`listening`.
    Raises ``in-use`` naming port and holder, ``forbidden`` for low ports, ``invalid`` for addresses of other hosts.
    """
    out = []
    held: list[socket.socket] = []
    try:
        for wish in publish:
            sock = _bind(wish)
            held.append(sock)  # so that two wishes for any port are given two
            out.append(msgspec.structs.replace(wish, host_port=sock.getsockname()[1]))
    finally:
        for sock in held:
            sock.close()
    return tuple(out)


def listening(publish: Publish) -> bool:
    """Whether somebody has taken the port."""
    try:
        _bind(publish).close()
    except MicaError as error:
        if error.code is Code.IN_USE:
            return True
        raise
    return False


def _bind(wish: Publish) -> socket.socket:
    try:
        address = ip_address(wish.host_address)
    except ValueError as error:
        raise invalid(
            f"cannot publish on {wish.host_address!r}", hint="use an IP address of this host, such as 127.0.0.1"
        ) from error
    family = socket.AF_INET6 if isinstance(address, IPv6Address) else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM if wish.protocol == "udp" else socket.SOCK_STREAM)
    name = f"{wish.protocol} port {wish.host_port} on {wish.host_address}"
    try:
        if wish.protocol == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections in TIME_WAIT do not count
        sock.bind((wish.host_address, wish.host_port))
        if wish.protocol == "tcp":
            sock.listen(1)
    except OSError as error:
        sock.close()
        raise _refused(error, wish, name) from error
    return sock


def _refused(error: OSError, wish: Publish, name: str) -> MicaError:
    if isinstance(error, PermissionError):
        return MicaError(
            Code.FORBIDDEN,
            f"{name} is not open to the daemon's user",
            hint="publish on a port above 1023, or: sudo sysctl -w net.ipv4.ip_unprivileged_port_start=80",
        )
    if error.errno in _ELSEWHERE:
        return invalid(f"{wish.host_address} is not an address of this host", hint="publish on 127.0.0.1 or 0.0.0.0")
    owner = holder(wish)
    return MicaError(
        Code.IN_USE,
        f"{name} is taken" + (f" by {owner}" if owner else ""),
        hint="publish on another port, or on 0 to have a free one chosen",
        details={"port": wish.host_port, "address": wish.host_address, "protocol": wish.protocol, "holder": owner},
    )


_ELSEWHERE = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


def holder(wish: Publish, proc: Path = Path("/proc")) -> str:
    """``name (pid 123)`` of who holds the port, empty when that cannot be read (another user's process)."""
    inodes = set()
    for table in (wish.protocol, wish.protocol + "6"):
        try:
            lines = (proc / "net" / table).read_text(encoding="ascii").splitlines()[1:]
        except FileNotFoundError:
            continue
        for fields in map(str.split, lines):
            port = int(fields[1].rpartition(":")[2], 16)
            if port == wish.host_port and (wish.protocol == "udp" or fields[3] == "0A"):  # 0A: listening (proc(5))
                inodes.add(f"socket:[{fields[9]}]")
    for directory in proc.iterdir():
        if directory.name.isdigit() and inodes & _open_files(directory):
            return f"{_name(directory)} (pid {directory.name})"
    return ""


def _open_files(directory: Path) -> set[str]:
    out = set()
    try:
        with os.scandir(directory / "fd") as descriptors:
            for descriptor in descriptors:
                out.add(os.readlink(descriptor.path))
    except OSError:
        return out  # it ended, or it is another user's
    return out


def _name(directory: Path) -> str:
    try:
        return (directory / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "a process"
