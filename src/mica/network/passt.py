"""passt, one process per user-mode NIC: outbound access, DHCP and DNS for a guest, without privileges.

It stands beside QEMU, not in it, so it outlives a QEMU that is swapped; QEMU reaches it by a UNIX socket out of its
empty network namespace (``-netdev stream,addr.type=unix,addr.path=…``). It runs in the host's network namespace as a
user of its own, and gives itself an empty file system and a seccomp filter (passt(1)).

Layout of a NIC's directory: ``log`` (passt's, at most 1 MiB), ``output`` (what it says while starting; all that it says
where it may have no log, at most 4 MiB), and ``link/`` with the socket, which QEMU's user may enter. Behind a sieve
passt's own socket is in ``inner/``.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from collections.abc import Sequence
from ipaddress import IPv4Interface, IPv6Address, ip_address
from pathlib import Path

import msgspec

from mica.host.processes import CLEAN_ENVIRONMENT, LiveProcess, ResourceLimits, find, reference, spawn
from mica.model.errors import Code, MicaError, invalid
from mica.model.units import MIB
from mica.model.vm import ProcessRef, Publish
from mica.network import addresses, ports

_OPTION = re.compile(r"--[a-z][a-z0-9-]*")
_NEEDED = (
    "--socket",
    "--no-map-gw",
    "--foreground",
    "--address",
    "--netmask",
    "--gateway",
    "--mac-addr",
    "--no-dhcp-dns",
)
_SOCKET_MAX = 107  # unix(7): sun_path is 108 bytes with the final zero
_START_TIMEOUT_S = 10.0
_STOP_GRACE_S = 2.0
_LAST_WORDS = 2000
_OUTPUT_MAX = 4 * MIB  # above the 1 MiB at which passt cuts its own log
_SIEVE = Path(__file__).with_name("sieve.py")


class Owner(msgspec.Struct, frozen=True):
    """Whom passt runs as when Mica is root, and the group of the QEMU that may connect."""

    uid: int
    gid: int
    peer_gid: int


class Passt(msgspec.Struct, frozen=True):
    """The passt of this host: where it is, which options it knows, whether it needs a sieve, and how that is known.

    ``place`` is where it may work, and ``log`` whether it may write a log there: the AppArmor profile that Debian and
    Ubuntu ship confines it to ``/tmp`` and ``/home``, for writing only, while a log is opened for reading too.
    """

    path: str
    options: frozenset[str]
    sieve: bool = False
    proof: str = ""
    place: str = ""
    log: bool = True


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """What one NIC is to get. ``publish`` has host ports already (:func:`mica.network.ports.reserve`)."""

    directory: Path
    addresses: addresses.NicAddresses
    publish: tuple[Publish, ...] = ()
    owner: Owner | None = None

    @property
    def socket(self) -> Path:
        return self.directory / "link" / "socket"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def output(self) -> Path:
        return self.directory / "output"

    @property
    def inner_socket(self) -> Path:
        return self.directory / "inner" / "socket"


class PasstHandle(msgspec.Struct, frozen=True):
    """What was started: JSON that a later daemon finds and stops it by."""

    directory: str
    socket: str
    processes: tuple[ProcessRef, ...]
    publish: tuple[Publish, ...] = ()
    reduced: tuple[str, ...] = ()


async def detect(path: str | None = None) -> Passt:
    """Find passt and ask it for its options; no option is judged by a version. Raises ``host-lacks``."""
    program = shutil.which(path or "passt", path=CLEAN_ENVIRONMENT["PATH"])
    if program is None:
        raise MicaError(
            Code.HOST_LACKS,
            f"the program {path or 'passt'}, by which VMs have networking of their own, is missing",
            hint="correct the setting passt" if path else "sudo apt-get install passt",
            details={"program": "passt", "package": "passt"},
        )
    process = await asyncio.create_subprocess_exec(
        program,
        "--help",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(CLEAN_ENVIRONMENT),
    )
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            text, _ = await process.communicate()
    except TimeoutError as error:
        raise MicaError(Code.TIMEOUT, f"{program} --help did not end", retryable=True) from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    options = frozenset(_OPTION.findall(text.decode(errors="replace")))
    lacking = [option for option in _NEEDED if option not in options]
    if lacking:
        raise MicaError(
            Code.HOST_LACKS,
            f"{program} does not know {', '.join(lacking)}",
            hint="install passt 2023-03 or newer",
            details={"program": program},
        )
    return Passt(program, options)


def arguments(passt: Passt, link: Link, network: HostNetwork) -> list[str]:
    """passt's argument vector for one NIC."""
    given = link.addresses
    interface = IPv4Interface(given.address)
    out = [*_become(link.owner), passt.path, "--foreground", "--quiet", "--no-map-gw"]
    if passt.log:
        out += ["--log-file", str(link.log)]
    out += ["--socket", str(link.inner_socket if passt.sieve else link.socket)]
    out += ["--address", str(interface.ip), "--netmask", str(interface.network.prefixlen)]
    out += ["--gateway", given.gateway, "--mac-addr", given.gateway_mac]
    if network.ipv6:
        out += ["--address", given.address6.partition("/")[0]]
    else:
        out += ["--ipv4-only"]
    if network.template is not None:
        out += ["--interface", network.template]
    out += _dns(passt, link, network)
    for publish in link.publish:
        option = "--udp-ports" if publish.protocol == "udp" else "--tcp-ports"
        out += [option, f"{publish.host_address}/{publish.host_port}:{publish.guest_port}"]
    return out


def _become(owner: Owner | None) -> list[str]:
    """Run what follows as the NIC's user from its first instruction on, able to bind low ports and nothing else.

    passt's own ``--runas`` will not do: releases of 2023 bind the socket as that user, those of 2025 as a root that
    has given up its right to ignore permissions, so no directory suits both.
    """
    if owner is None:
        return []
    only = "-all,+net_bind_service"
    out = ["setpriv", f"--reuid={owner.uid}", f"--regid={owner.gid}", "--clear-groups", "--no-new-privs"]
    return [*out, f"--bounding-set={only}", f"--inh-caps={only}", f"--ambient-caps={only}", "--"]


class HostNetwork(msgspec.Struct, frozen=True):
    """What passt is told about the host. ``template`` is the interface it is to look at where there is no default
    route (it would refuse to start without one); ``local_dns`` is a resolver on the host's own loopback."""

    ipv6: bool = False
    template: str | None = None
    dns: tuple[str, ...] = ()
    local_dns: str | None = None


def read_host_network(root: Path = Path("/")) -> HostNetwork:
    """Look at the host's routes and resolvers; cheap, so each start looks anew.

    A resolver on the loopback, as systemd-resolved has it, is out of a guest's reach: its upstream resolvers are told
    instead, as systemd-resolved.service(8) lists them.
    """
    routes = addresses.read_routes(root / "proc")
    default6 = addresses.ipv6_default(root / "proc")
    template = None
    if not any(network.prefixlen == 0 for _, network in routes):
        template = default6 or (routes[0][0] if routes else "lo")
    resolvers = _resolvers(root / "etc/resolv.conf")
    outside = [text for text in resolvers if not ip_address(text).is_loopback]
    if resolvers and not outside:
        upstream = _resolvers(root / "run/systemd/resolve/resolv.conf")
        outside = [text for text in upstream if not ip_address(text).is_loopback]
    usable = [text for text in outside if default6 is not None or ":" not in text]
    local = next((text for text in resolvers if ip_address(text).is_loopback), None) if not usable else None
    return HostNetwork(default6 is not None, template, tuple(usable[:3]), local)


def _resolvers(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    out = []
    for fields in map(str.split, lines):
        if len(fields) >= 2 and fields[0] == "nameserver":
            try:
                address = ip_address(fields[1])
            except ValueError:
                continue
            if not (isinstance(address, IPv6Address) and address.is_link_local):  # means nothing on another link
                out.append(str(address))
    return out


def _dns(passt: Passt, link: Link, network: HostNetwork) -> list[str]:
    if network.dns:
        return [word for server in network.dns for word in ("--dns", server)]
    if network.local_dns is not None and "--dns-host" in passt.options:
        forward = link.addresses.dns
        return ["--dns-forward", forward, "--dns-host", network.local_dns, "--dns", forward]
    return ["--no-dhcp-dns"]


def reduced(passt: Passt, network: HostNetwork) -> tuple[str, ...]:
    """What a guest has less of on this host."""
    if network.dns or (network.local_dns is not None and "--dns-host" in passt.options):
        return ()
    return ("the guest is told no DNS server: the host's resolver is on its loopback, and this passt cannot forward",)


async def start(passt: Passt, link: Link, *, network: HostNetwork | None = None) -> PasstHandle:
    """Start passt (and its sieve) for one NIC and return when QEMU can connect and all ports are published.

    What an earlier start left in the directory is ended first. Nothing is left running when it raises ``in-use``,
    ``command-failed`` with passt's last words, or ``timeout``.
    """
    network = network or read_host_network()
    if len(os.fsencode(link.socket)) > _SOCKET_MAX:
        raise invalid(
            f"{link.socket} is longer than the {_SOCKET_MAX} bytes of a UNIX socket's path",
            hint="choose a shorter runtime directory",
        )
    await stop_left(link.directory)
    publish = tuple(ports.reserve(link.publish))
    link = msgspec.structs.replace(link, publish=publish)
    _prepare(passt, link)
    output = link.output
    running: list[LiveProcess] = []
    try:
        running.append(_spawn(arguments(passt, link, network), output))
        if passt.sieve:
            running.append(_spawn(_sieve(link), output))
            await _listening(link.inner_socket, running[0], output)
        await _listening(link.socket, running[-1], output)
        for wish in publish:
            if not ports.listening(wish):
                raise MicaError(
                    Code.IN_USE, f"passt could not publish {wish.protocol} port {wish.host_port}", retryable=True
                )
    except BaseException:
        for process in running:
            process.kill()
            await process.wait_exit(_START_TIMEOUT_S)
        shutil.rmtree(link.directory)
        raise
    finally:
        for process in running:
            process.close()
    refs = tuple(process.ref for process in running)
    return PasstHandle(str(link.directory), str(link.socket), refs, publish, reduced(passt, network))


def _prepare(passt: Passt, link: Link) -> None:
    """The directories and the log. passt starts as the NIC's user, who must own where it binds and what it writes."""
    link.directory.mkdir(mode=0o711)
    link.directory.chmod(0o711 if link.owner is not None else 0o700)
    for directory in (link.socket.parent, *((link.inner_socket.parent,) if passt.sieve else ())):
        directory.mkdir(mode=0o700)
        if link.owner is not None:
            peer = link.owner.peer_gid if directory == link.socket.parent else link.owner.gid
            os.chown(directory, link.owner.uid, peer)
            directory.chmod(0o710)
    if link.owner is not None:
        for file in (link.log, link.output):  # under AppArmor even an open file that is another user's is taken away
            file.touch(mode=0o600)
            os.chown(file, link.owner.uid, link.owner.gid)


def _sieve(link: Link) -> list[str]:
    out = ["setpriv", "--no-new-privs", "--inh-caps=-all"]
    owner: list[str] = []
    if link.owner is not None:
        out += ["--bounding-set=-all,+setuid,+setgid"]  # the interpreter may lie where only root can reach it
        owner = [str(link.owner.uid), str(link.owner.gid)]
    return [*out, "--", sys.executable, "-I", "-S", str(_SIEVE), str(link.socket), str(link.inner_socket), *owner]


def _spawn(argv: Sequence[str], output: Path) -> LiveProcess:
    # The socket's directory decides who may connect, so the socket itself is open to all. What is said after the limit
    # is reached is lost, and nobody dies of it.
    limits = ResourceLimits(core=0, file_size=_OUTPUT_MAX)
    return spawn(argv, stdout=output, stderr=output, umask=0, limits=limits, restore_signals=False)


def listens(path: Path, proc: Path = Path("/proc")) -> bool:
    """Whether somebody listens on a UNIX socket, without connecting: passt takes one client, and that is QEMU.

    /proc/net/unix (unix(7)): the flag 0x10000 is __SO_ACCEPTCON. The file alone is there already after bind().
    """
    wanted = str(path)
    for line in (proc / "net/unix").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == wanted and int(fields[3], 16) & 0x10000:
            return True
    return False


async def _listening(path: Path, process: LiveProcess, output: Path) -> None:
    """Wait for a socket. Nothing signals that somebody listens, so look, at growing intervals."""
    pause_s = 0.002
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not listens(path):
                if not process.alive:
                    words = output.read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:].strip()
                    lines = [line for line in words.splitlines() if line and "to syslog" not in line]
                    raise MicaError(
                        Code.COMMAND_FAILED,
                        f"the network process ended at once: {' / '.join(lines[-3:]) or 'silently'}",
                    )
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 1.5, 0.1)
    except TimeoutError as error:
        raise MicaError(
            Code.TIMEOUT, f"the network process did not listen within {_START_TIMEOUT_S} s", retryable=True
        ) from error


def healthy(handle: PasstHandle) -> bool:
    """Whether every process of the NIC still runs and listens."""
    for ref in handle.processes:
        process = find(ref)
        if process is None:
            return False
        process.close()
    return listens(Path(handle.socket))


async def stop(handle: PasstHandle) -> None:
    """End the NIC's processes and remove its directory; what is gone already is no error."""
    for ref in handle.processes:
        process = find(ref)
        if process is not None:
            with process:
                await process.terminate(_STOP_GRACE_S)
    await stop_left(Path(handle.directory))


async def stop_left(directory: Path) -> None:
    """End whatever names this directory in its command line (an interrupted start kept no record), and remove it."""
    if not directory.exists():
        return
    marker = os.fsencode(directory) + b"/"
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended just now
        # QEMU's command line and its jail's name the directory too; only these two programs are ours to end here.
        ours = {os.path.basename(word) for word in words} & {b"passt", b"sieve.py"}
        if ours and any(word.startswith(marker) for word in words):
            ref = reference(int(entry.name))
            process = find(ref) if ref is not None else None
            if process is not None:
                with process:
                    await process.terminate(_STOP_GRACE_S)
    shutil.rmtree(directory)
