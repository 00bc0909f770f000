"""Proof that a guest cannot reach the host's loopback through passt: forge the frames of a hostile guest and listen.

``--no-map-gw`` closes passt's own door to the loopback, the gateway address. Releases before 2024 leave another: they
connect to whatever address a frame names. So this opens listeners on this host, sends passt frames to every address
that means "this host", and believes only what arrives. The same frames to an address of the host that a guest may
reach show that the frames themselves are good.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address
from pathlib import Path

import msgspec

from mica.model.errors import Code, MicaError
from mica.network import addresses, passt
from mica.network.frames import Address, datagram, syn

_TARGETS: tuple[Address, ...] = tuple(
    map(ip_address, ("127.0.0.1", "127.255.0.1", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::127.0.0.1"))  # noqa: S104
)
_CONTROL_TIMEOUT_S = 2.0
_QUIET_S = 0.1
_POOL = addresses.choose_pool([])
# No id of a VM begins like this.
_PREFIX, _NIC = "proof-", "n"


async def prove_anywhere(
    found: passt.Passt, places: Sequence[Path], owner: Callable[[], passt.Owner | None]
) -> passt.Passt:
    """:func:`prove` it in the first of ``places`` where it may work. Places are made; later ones go without a log.

    Raises as :func:`prove` does, for the first place; ``forbidden`` when a place is somebody else's.
    """
    failures: list[MicaError] = []
    for place in places:
        own_place(place)
        candidate = msgspec.structs.replace(found, place=str(place), log=not failures)
        try:
            proven = await prove(candidate, place, owner)
        except MicaError as error:
            if error.code is not Code.COMMAND_FAILED:
                raise
            failures.append(error)
            continue
        why = "".join(
            f"; it cannot work in {places[0]} ({failure.message}), so it does in {place}" for failure in failures
        )
        return msgspec.structs.replace(proven, proof=proven.proof + why)
    raise failures[0]


def confinement(root: Path = Path("/")) -> str:
    """How AppArmor confines passt, as a word: a proof holds for one way alone."""
    try:
        enabled = (root / "sys/module/apparmor/parameters/enabled").read_text(encoding="ascii").strip()
        profile = (root / "etc/apparmor.d/usr.bin.passt").stat().st_mtime_ns
        local = (root / "etc/apparmor.d/abstractions/passt").stat().st_mtime_ns
    except OSError:
        return ""
    return f"{enabled}{profile}{local}"


def own_place(place: Path) -> None:
    """Make a directory for NICs, open for passing. Raises ``forbidden`` when somebody else may change what is in it."""
    place.mkdir(mode=0o711, parents=True, exist_ok=True)
    if not _is_own(place):
        raise MicaError(
            Code.FORBIDDEN, f"{place} belongs to somebody else or is open to others", hint=f"remove it: rm -r {place}"
        )
    place.chmod(0o711)  # whatever the umask: passt's own user has to pass


def _is_own(place: Path) -> bool:
    status = place.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def entries(place: Path) -> list[Path]:
    """The directories in a place of ours. None is in what somebody else put there, whatever it looks like."""
    if not place.exists() or not _is_own(place):
        return []
    return [entry for entry in place.iterdir() if entry.is_dir() and not entry.is_symlink()]


def is_proof(directory: Path) -> bool:
    """Whether it is of a proof and not of a VM."""
    return directory.name.startswith(_PREFIX)


async def prove(found: passt.Passt, directory: Path, owner: Callable[[], passt.Owner | None]) -> passt.Passt:
    """Start passt once as a VM's would be and attack it; about 0.2 s. ``directory`` holds what that needs meanwhile.

    Returns it with ``sieve`` set where it is needed, and with ``proof``. Raises ``host-lacks`` when even the sieve
    does not hold, and what :func:`mica.network.passt.start` raises.
    """
    reached, controlled = await _attack(msgspec.structs.replace(found, sieve=False), directory, owner())
    shown = "" if controlled else " (this host has no other address, so nothing shows that the frames were good)"
    if not reached:
        return msgspec.structs.replace(found, sieve=False, proof=f"forged frames to the loopback were dropped{shown}")
    sieved = msgspec.structs.replace(found, sieve=True)
    still, _ = await _attack(sieved, directory, owner())
    if still:
        raise MicaError(
            Code.HOST_LACKS,
            f"a guest could reach {', '.join(still)} on this host through {found.path}",
            hint="install a newer passt",
        )
    return msgspec.structs.replace(
        sieved, proof=f"passt lets forged frames through to {', '.join(reached)}; the sieve before it drops them{shown}"
    )


async def clear(places: Sequence[Path]) -> None:
    """End and remove what a proof left whose daemon was killed. Only for whoever knows that none is under way."""
    for directory in (entry for place in places for entry in entries(place) if is_proof(entry)):
        await passt.stop_left(directory / _NIC)
        shutil.rmtree(directory)


async def _attack(found: passt.Passt, directory: Path, owner: passt.Owner | None) -> tuple[list[str], bool]:
    """(targets that were reached, whether the control arrived)"""
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX, dir=directory)))
        base.chmod(0o711)
        given = addresses.nic_addresses(_POOL, addresses.SLOTS - 1, 0)
        link = passt.Link(directory=base / _NIC, addresses=given, owner=owner)
        listeners = _Listeners(stack)
        handle = await passt.start(found, link)
        try:
            guest = stack.enter_context(socket.socket(socket.AF_UNIX))
            guest.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(guest, handle.socket)
            sources: dict[int, Address] = {
                4: IPv4Interface(given.address).ip,
                6: IPv6Interface(given.address6).ip,
            }
            control = _own_address()
            targets = (*_TARGETS, *((control,) if control is not None else ()))
            for number, target in enumerate(targets):
                source, port = sources[target.version], 40000 + number
                await loop.sock_sendall(guest, datagram(source, target, port, listeners.port, str(target).encode()))
                await loop.sock_sendall(guest, syn(source, target, port, listeners.port))
            seen = await listeners.heard(str(control) if control is not None else None)
        finally:
            await passt.stop(handle)
    wanted = {str(target) for target in _TARGETS}
    return sorted(seen & wanted), control is not None and str(control) in seen


class _Listeners:
    """TCP and UDP on every address of this host, on one port; what arrives is noted by the address it was sent to."""

    def __init__(self, stack: ExitStack) -> None:
        self._sockets: list[socket.socket] = []
        self.port = 0
        for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104 - for 0.2 s
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                sock = stack.enter_context(socket.socket(family, kind))
                sock.setblocking(False)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                try:
                    sock.bind((any_address, self.port))
                except OSError:
                    if family == socket.AF_INET6:
                        continue  # a host without IPv6, or with that port taken there: TCP and UDP on IPv4 remain
                    raise
                self.port = sock.getsockname()[1]
                if kind == socket.SOCK_STREAM:
                    sock.listen(64)
                self._sockets.append(sock)

    async def heard(self, control: str | None) -> set[str]:
        """Everything that arrives until the control has and then for a moment; without a control, for a moment."""
        seen: set[str] = set()
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def note(sock: socket.socket) -> None:
            seen.update(_take(sock))
            arrived.set()

        for sock in self._sockets:
            loop.add_reader(sock.fileno(), note, sock)
        try:
            async with asyncio.timeout(_CONTROL_TIMEOUT_S if control is not None else _QUIET_S * 5):
                while control not in seen:
                    arrived.clear()
                    await arrived.wait()
        except TimeoutError:
            return seen
        else:
            await asyncio.sleep(_QUIET_S)  # what was sent before the control and is slower than it
            return seen
        finally:
            for sock in self._sockets:
                loop.remove_reader(sock.fileno())


def _take(sock: socket.socket) -> set[str]:
    """The destinations of what has arrived. A datagram says its own; a connection's is its local address."""
    if sock.type == socket.SOCK_DGRAM:
        data, _ = sock.recvfrom(256)
        return {data.decode(errors="replace")}
    connection, _ = sock.accept()
    with connection:
        return {connection.getsockname()[0]}


def _own_address() -> IPv4Address | IPv6Address | None:
    """An address of this host that is not its loopback: the one it would use to reach the outside. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.254", 9))
        except OSError:
            return None
        address = ip_address(sock.getsockname()[0])
    return None if address.is_loopback or address.is_unspecified else address
