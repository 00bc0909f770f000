"""Real passt processes, asked as a guest would ask, and the sieve that stands before the leaky ones."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import struct
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mica.host.processes import find, spawn
from mica.model.errors import Code, MicaError
from mica.model.vm import NicRuntime, NicSpec, Publish, Vm, VmSpec
from mica.network import addresses, frames, passt, ports, proof, sieve, slirp
from mica.network.user import UserNetworks
from tests.unit.ethernet import Wire

needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
as_root = os.geteuid() == 0
POOL = addresses.choose_pool([network for _, network in addresses.read_routes()])


def owner(slot: int = 7) -> passt.Owner | None:
    base = 0x7D49_0000 + slot
    return passt.Owner(base + 16384, base + 16384, base) if as_root else None


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short path that other users may pass."""
    with tempfile.TemporaryDirectory(prefix="m") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="module")
def found() -> passt.Passt:
    """This host's passt, proven."""

    async def prove() -> passt.Passt:
        with tempfile.TemporaryDirectory(prefix="m") as name:
            Path(name).chmod(0o711)
            return await proof.prove(await passt.detect(), Path(name), owner)

    return asyncio.run(prove())


class Plant:
    """Starts NICs and ends them whatever happens."""

    def __init__(self, found: passt.Passt, base: Path) -> None:
        self.found, self.base = found, base
        self.handles: list[passt.PasstHandle] = []

    def link(self, slot: int = 7, *publish: Publish) -> passt.Link:
        return passt.Link(
            directory=self.base / f"n{slot}",
            addresses=addresses.nic_addresses(POOL, slot, 0),
            publish=publish,
            owner=owner(slot),
        )

    async def start(self, link: passt.Link | None = None, **options: passt.HostNetwork) -> passt.PasstHandle:
        handle = await passt.start(self.found, link or self.link(), **options)
        self.handles.append(handle)
        return handle


@pytest.fixture
async def plant(found: passt.Passt, short: Path) -> AsyncIterator[Plant]:
    plant = Plant(found, short)
    yield plant
    for handle in plant.handles:
        await passt.stop(handle)


def own_address() -> IPv4Address:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.254", 9))
        except OSError:
            pytest.skip("this host has no address but its loopback")
        return IPv4Address(sock.getsockname()[0])


@needs_passt
async def test_the_guest_is_given_its_address_router_and_resolvers(plant: Plant) -> None:
    handle = await plant.start(network=passt.HostNetwork(dns=("9.9.9.9", "149.112.112.112")))
    wire = await Wire.plug(handle.socket)
    async with asyncio.timeout(10):
        lease = await wire.dhcp()
    await wire.unplug()
    given = addresses.nic_addresses(POOL, 7, 0)
    assert f"{lease.address}/29" == given.address
    assert str(lease.mask) == "255.255.255.248"
    assert str(lease.router) == given.gateway
    assert list(map(str, lease.dns)) == ["9.9.9.9", "149.112.112.112"]
    assert wire.peer.hex(":") == given.gateway_mac
    assert handle.reduced == ()


@needs_passt
async def test_out_to_the_host_but_never_to_its_loopback(plant: Plant) -> None:
    outside = own_address()
    handle = await plant.start()
    wire = await Wire.plug(handle.socket)
    accepted: list[str] = []

    def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer.get_extra_info("sockname")[0])
        writer.close()

    async with asyncio.timeout(30), await asyncio.start_server(note, "0.0.0.0", 0) as server:
        lease = await wire.dhcp()
        port = server.sockets[0].getsockname()[1]
        assert await wire.tcp_connect(outside, port) == "open"
        for target in (lease.router, lease.address, *map(IPv4Address, ("127.0.0.1", "127.9.9.9", "0.0.0.0"))):
            assert await wire.tcp_connect(target, port) != "open", target
    await wire.unplug()
    assert accepted == [str(outside)]


@needs_passt
async def test_published_ports_reach_the_guest_and_only_where_asked(plant: Plant) -> None:
    handle = await plant.start(plant.link(7, Publish(guest_port=80), Publish(guest_port=53, protocol="udp")))
    tcp, udp = handle.publish
    assert tcp.host_port > 0
    assert tcp.host_address == "127.0.0.1"
    wire = await Wire.plug(handle.socket)
    async with asyncio.timeout(20):
        await wire.dhcp()
        serving = asyncio.ensure_future(wire.tcp_serve(80, b"pong"))
        reader, writer = await asyncio.open_connection("127.0.0.1", tcp.host_port)
        writer.write(b"ping")
        assert await serving == b"ping"
        assert await reader.readexactly(4) == b"pong"
        writer.close()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"query", ("127.0.0.1", udp.host_port))
            _, data = await wire.udp_receive(53)
        assert data == b"query"
    await wire.unplug()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as elsewhere, pytest.raises(ConnectionRefusedError):
        elsewhere.connect((str(own_address()), tcp.host_port))


@needs_passt
async def test_it_stays_when_a_qemu_leaves_and_serves_the_next(plant: Plant) -> None:
    handle = await plant.start()
    for _ in range(3):
        wire = await Wire.plug(handle.socket)
        async with asyncio.timeout(10):
            assert str((await wire.dhcp()).address) == addresses.nic_addresses(POOL, 7, 0).address.partition("/")[0]
        await wire.unplug()
    assert passt.healthy(handle)


@needs_passt
async def test_a_later_daemon_finds_it_and_stops_it(plant: Plant) -> None:
    handle = msgspec.json.decode(msgspec.json.encode(await plant.start()), type=passt.PasstHandle)
    assert passt.healthy(handle)
    process = find(handle.processes[-1])
    assert process is not None
    with process:
        process.kill()
        await process.wait_exit(10)
    assert not passt.healthy(handle)
    await passt.stop(handle)
    await passt.stop(handle)
    assert all(find(ref) is None for ref in handle.processes)
    assert not Path(handle.directory).exists()


@needs_passt
async def test_what_an_interrupted_start_left_is_ended_and_nobody_else(plant: Plant) -> None:
    first = await plant.start(plant.link(7, Publish(guest_port=80)))
    path = first.socket
    with spawn(["sh", "-c", "sleep 60; exit 0", "qemu", path]) as bystander:  # names the socket, as QEMU's jail does
        try:
            wish = first.publish[0]
            second = await plant.start(plant.link(7, wish))  # same directory, same port, no record of the first
            assert second.publish == (wish,)
            assert all(find(ref) is None for ref in first.processes)
            assert passt.healthy(second)
            assert bystander.alive
        finally:
            bystander.kill()
            await bystander.wait_exit(10)


@needs_passt
@pytest.mark.root
@pytest.mark.skipif(not as_root, reason="needs root")
async def test_it_runs_as_nobody_else_with_nothing(plant: Plant) -> None:
    handle = await plant.start()
    wire = await Wire.plug(handle.socket)
    async with asyncio.timeout(10):
        await wire.dhcp()
    who = owner()
    assert who is not None
    for ref in handle.processes:
        status = Path(f"/proc/{ref.pid}/status").read_text()
        seen = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert seen["Uid"].split() == [str(who.uid)] * 4
        assert seen["CapEff"] == seen["CapPrm"] == "0" * 16
        assert seen["NoNewPrivs"] == "1"
    await wire.unplug()
    first = handle.processes[0].pid
    assert os.listdir(f"/proc/{first}/root/") == []
    assert "Seccomp:\t2" in Path(f"/proc/{first}/status").read_text()
    link = Path(handle.socket).parent.stat()
    assert (link.st_uid, link.st_gid, link.st_mode & 0o777) == (who.uid, who.peer_gid, 0o710)


@needs_passt
@pytest.mark.root
@pytest.mark.skipif(not as_root, reason="needs root")
async def test_root_publishes_low_ports(plant: Plant) -> None:
    wishes = (Publish(guest_port=80, host_port=number) for number in range(1023, 0, -1))
    free = next(wish for wish in wishes if not ports.listening(wish))
    handle = await plant.start(plant.link(7, free))
    assert handle.publish == (free,)
    assert ports.listening(free)


@needs_passt
async def test_a_taken_port_is_named_with_its_holder_before_anything_starts(plant: Plant) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(MicaError) as caught:
            await plant.start(plant.link(7, Publish(guest_port=80, host_port=port)))
    assert caught.value.code is Code.IN_USE
    assert f"port {port}" in caught.value.message
    assert f"(pid {os.getpid()})" in caught.value.message
    assert not (plant.base / "n7").exists()


@needs_passt
async def test_a_failing_start_tells_why_and_leaves_nothing(plant: Plant) -> None:
    with pytest.raises(MicaError) as caught:
        await plant.start(network=passt.HostNetwork(template="nosuchif0"))
    assert caught.value.code is Code.COMMAND_FAILED
    assert "nosuchif0" in caught.value.message
    assert not (plant.base / "n7").exists()


@needs_passt
async def test_a_host_without_a_default_route_still_starts(plant: Plant) -> None:
    handle = await plant.start(network=passt.HostNetwork(template="lo"))
    wire = await Wire.plug(handle.socket)
    async with asyncio.timeout(10):
        lease = await wire.dhcp()
    await wire.unplug()
    assert lease.dns == []
    assert "no DNS" in handle.reduced[0]


@needs_passt
async def test_a_path_too_long_for_a_socket_is_refused(plant: Plant) -> None:
    link = msgspec.structs.replace(plant.link(), directory=plant.base / ("x" * 100))
    with pytest.raises(MicaError) as caught:
        await plant.start(link)
    assert caught.value.code is Code.INVALID
    assert "107" in caught.value.message


@needs_passt
async def test_the_proof_holds_and_says_what_it_saw(found: passt.Passt, short: Path) -> None:
    reached, _ = await proof._attack(found, short, owner())
    assert reached == []
    assert "dropped" in found.proof or "drops" in found.proof
    assert list(short.iterdir()) == []
    bare, controlled = await proof._attack(msgspec.structs.replace(found, sieve=False), short, owner())
    assert bool(bare) == found.sieve  # a sieve stands where, and only where, passt lets something through
    assert controlled == (proof._own_address() is not None)


def test_the_proof_can_fail() -> None:
    """The listeners do hear what arrives on the loopback: otherwise silence would prove nothing."""

    async def hear() -> set[str]:
        from contextlib import ExitStack

        with ExitStack() as stack:
            listeners = proof._Listeners(stack)
            sender = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sender.sendto(b"::1", ("127.0.0.1", listeners.port))
            stack.enter_context(socket.create_connection(("127.0.0.1", listeners.port)))
            return await listeners.heard(None)

    assert asyncio.run(hear()) == {"::1", "127.0.0.1"}


CONFINED = """#!/bin/sh
# What AppArmor's profile of passt leaves it: one place, and no file to write to that it also reads.
before=
for word; do
  case "$before" in
    --socket) case "$word" in {place}/*) ;; *) echo "Failed to bind: Permission denied"; exit 1;; esac;;
    --log-file) echo "Couldn't open log file: Permission denied"; exit 1;;
  esac
  before=$word
done
exec {passt} "$@"
"""


@needs_passt
async def test_a_confined_passt_works_where_it_may(short: Path) -> None:
    """As on Debian and Ubuntu with AppArmor, where its profile knows /tmp and /home alone."""
    real = shutil.which("passt")
    program = short / "passt"
    program.write_text(CONFINED.format(place=short / "b", passt=real))
    program.chmod(0o755)
    places = [short / "a", short / "b"]

    async def find_passt() -> passt.Passt:
        return await proof.prove_anywhere(await passt.detect(str(program)), places, owner)

    proven = await find_passt()
    assert (proven.place, proven.log) == (str(short / "b"), False)
    assert f"cannot work in {short / 'a'}" in proven.proof
    assert [list(place.iterdir()) for place in places] == [[], []]
    networks = UserNetworks(places=places, find=find_passt, owner=owner, instead=no_slirp)
    nic = await networks.attach(vm(NicSpec()), "net0")
    try:
        assert Path(nic.handle["socket"]).is_relative_to(short / "b")
        wire = await Wire.plug(nic.handle["socket"])
        async with asyncio.timeout(10):
            await wire.dhcp()
        await wire.unplug()
        assert await networks.healthy(nic)
    finally:
        await networks.detach(vm().id, nic)
    assert [list(place.iterdir()) for place in places] == [[], []]
    with pytest.raises(MicaError, match="Permission denied"):
        await proof.prove_anywhere(await passt.detect(str(program)), places[:1], owner)
    places[0].chmod(0o777)
    with pytest.raises(MicaError, match="somebody else"):
        await find_passt()


def test_a_proof_holds_for_one_way_of_confinement(tmp_path: Path) -> None:
    assert proof.confinement(tmp_path) == ""
    for name in ("sys/module/apparmor/parameters", "etc/apparmor.d/abstractions"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "sys/module/apparmor/parameters/enabled").write_text("Y\n")
    for name in ("usr.bin.passt", "abstractions/passt"):
        (tmp_path / "etc/apparmor.d" / name).touch()
    confined = proof.confinement(tmp_path)
    os.utime(tmp_path / "etc/apparmor.d/usr.bin.passt", (1, 1))
    assert "" != confined != proof.confinement(tmp_path)


async def test_a_missing_or_ancient_passt_is_named(tmp_path: Path) -> None:
    old = tmp_path / "passt"
    old.write_text("#!/bin/sh\necho '  --socket PATH'\n")
    old.chmod(0o755)
    with pytest.raises(MicaError) as caught:
        await passt.detect(str(old))
    assert caught.value.code is Code.HOST_LACKS
    assert "--no-map-gw" in caught.value.message


# ---- the host's network, from files


def host(
    root: Path, *, routes: str = "", ipv6: bool = False, resolv: str = "", upstream: str = ""
) -> passt.HostNetwork:
    for name in ("proc/net", "etc", "run/systemd/resolve"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "proc/net/route").write_text(
        "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n" + routes
    )
    six = f"{'0' * 32} 00 {'0' * 32} 00 {'fe80' + '0' * 28} 00000400 00000001 00000000 00000003 eth0\n"
    (root / "proc/net/ipv6_route").write_text(six if ipv6 else "")
    (root / "etc/resolv.conf").write_text(resolv)
    (root / "run/systemd/resolve/resolv.conf").write_text(upstream)
    return passt.read_host_network(root)


DEFAULT = "eth0 00000000 0100000A 0003 0 0 100 00000000 0 0 0\n"
LAN = "eth1 0000000A 00000000 0001 0 0 100 00FFFFFF 0 0 0\n"


def test_resolvers_on_the_loopback_are_replaced_by_their_upstreams(tmp_path: Path) -> None:
    got = host(tmp_path, routes=DEFAULT, resolv="nameserver 127.0.0.53\n", upstream="nameserver 9.9.9.9\n")
    assert (got.dns, got.local_dns, got.template) == (("9.9.9.9",), None, None)
    got = host(tmp_path, routes=DEFAULT, resolv="nameserver 127.0.0.53\noptions edns0\n")
    assert (got.dns, got.local_dns) == ((), "127.0.0.53")
    new = passt.Passt("passt", frozenset({"--dns-host"}))
    assert passt.reduced(new, got) == ()
    assert passt.reduced(passt.Passt("passt", frozenset()), got)
    link = passt.Link(directory=tmp_path, addresses=addresses.nic_addresses(POOL, 1, 0))
    argv = passt.arguments(new, link, got)
    assert argv[argv.index("--dns-host") + 1] == "127.0.0.53"
    assert argv[argv.index("--dns-forward") + 1] == argv[argv.index("--dns") + 1] == link.addresses.dns


def test_ipv6_is_offered_where_the_host_has_it(tmp_path: Path) -> None:
    link = passt.Link(directory=tmp_path, addresses=addresses.nic_addresses(POOL, 1, 0))
    found = passt.Passt("passt", frozenset())
    resolv = "nameserver 2620:fe::fe\nnameserver fe80::1%eth0\nnameserver junk\nnameserver 9.9.9.9\n"
    got = host(tmp_path, routes=DEFAULT, ipv6=True, resolv=resolv)
    assert got.dns == ("2620:fe::fe", "9.9.9.9")
    assert "fd4d:6963:6100:8::2" in passt.arguments(found, link, got)
    got = host(tmp_path, routes=DEFAULT, resolv=resolv)
    assert got.dns == ("9.9.9.9",)
    assert "--ipv4-only" in passt.arguments(found, link, got)


def test_without_a_default_route_some_interface_serves_as_template(tmp_path: Path) -> None:
    assert host(tmp_path, routes=LAN).template == "eth1"
    assert host(tmp_path).template == "lo"
    assert host(tmp_path, ipv6=True).template == "eth0"
    assert host(tmp_path, routes=LAN + DEFAULT).template is None


# ---- the sieve


def frame(source: str, destination: str, data: bytes = b"x") -> bytes:
    return frames.datagram(ip_address(source), ip_address(destination), 1, 2, data)


HARMLESS = [
    ("10.64.0.2", "9.9.9.9"),
    ("0.0.0.0", "255.255.255.255"),
    ("10.64.0.2", "128.0.0.1"),
    ("10.64.0.2", "126.255.255.255"),
    ("fd00::2", "2620:fe::fe"),
    ("::", "ff02::1:ff00:2"),
    ("fe80::2", "ff02::2"),
    ("fd00::2", "64:ff9b::7f00:1"),
]
HARMFUL = [
    ("10.64.0.2", "127.0.0.1"),
    ("10.64.0.2", "127.255.255.255"),
    ("10.64.0.2", "0.0.0.0"),
    ("10.64.0.2", "0.1.2.3"),
    ("127.0.0.1", "9.9.9.9"),
    ("fd00::2", "::1"),
    ("fd00::2", "::"),
    ("fd00::2", "::ffff:127.0.0.1"),
    ("fd00::2", "::ffff:10.0.0.1"),
    ("fd00::2", "::127.0.0.1"),
    ("::1", "2620:fe::fe"),
    ("::ffff:127.0.0.1", "2620:fe::fe"),
]


@pytest.mark.parametrize(("source", "destination"), HARMLESS)
def test_honest_frames_pass(source: str, destination: str) -> None:
    assert sieve.harmless(frame(source, destination)[4:])


@pytest.mark.parametrize(("source", "destination"), HARMFUL)
def test_frames_that_mean_this_host_do_not(source: str, destination: str) -> None:
    assert not sieve.harmless(frame(source, destination)[4:])


def test_only_known_kinds_of_whole_frames_pass() -> None:
    good = frame("10.64.0.2", "9.9.9.9")[4:]
    assert sieve.harmless(good[:12] + b"\x08\x06" + bytes(28))
    for kind in (b"\x81\x00", b"\x88\xa8", b"\x86\xde", b"\x00\x2e"):  # tagged, twice tagged, unknown, a length
        assert not sieve.harmless(good[:12] + kind + good[14:])
    assert not sieve.harmless(good[:33])
    assert not sieve.harmless(frame("fd00::2", "fd00::3")[4:57])
    assert not sieve.harmless(b"")


@given(st.lists(st.sampled_from(HARMLESS + HARMFUL), max_size=8), st.lists(st.integers(1, 200)))
def test_the_stream_may_be_cut_anywhere(kinds: list[tuple[str, str]], cuts: list[int]) -> None:
    stream = b"".join(frame(*kind) for kind in kinds)
    sifter, out, at = sieve.Sifter(), b"", 0
    for cut in cuts:
        out += sifter.sift(stream[at : at + cut])
        at += cut
    out += sifter.sift(stream[at:])
    assert out == b"".join(frame(*kind) for kind in kinds if kind in HARMLESS)


def test_a_stream_of_nonsense_ends_the_connection() -> None:
    with pytest.raises(ValueError, match="4294967295"):
        sieve.Sifter().sift(b"\xff\xff\xff\xff")


async def test_the_relay_holds_back_when_one_side_does_not_read(short: Path) -> None:
    """A guest that floods while passt is slow must not fill the sieve's memory, and nothing may be lost."""
    received = 0
    go = asyncio.Event()
    wanted = 8 << 20

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        await go.wait()
        while data := await reader.read(1 << 16):
            received += len(data)
            if received == wanted:
                writer.write(b"\0\0\0\x04done")
                await writer.drain()
        writer.close()

    one = frame("10.64.0.2", "9.9.9.9", b"y" * 978)
    assert wanted % len(one) == 0
    inner, listen = short / "inner", short / "listen"
    async with await asyncio.start_unix_server(slow, str(inner)):
        argv = [sys.executable, "-I", "-S", sieve.__file__, str(listen), str(inner)]
        with spawn(argv) as process:
            try:
                async with asyncio.timeout(30):
                    while not listen.is_socket():
                        await asyncio.sleep(0.01)
                    reader, writer = await asyncio.open_unix_connection(str(listen))
                    writer.write(one * (wanted // len(one)))
                    while writer.transport.get_write_buffer_size() == wanted:
                        await asyncio.sleep(0.01)
                    stuck = writer.transport.get_write_buffer_size()
                    assert stuck > wanted - (4 << 20)
                    go.set()
                    assert await reader.readexactly(8) == b"\0\0\0\x04done"
                    writer.close()
            finally:
                process.kill()
                await process.wait_exit(10)
    assert received == wanted


# ---- the adapter


async def no_slirp(lack: MicaError) -> slirp.Slirp:
    raise lack


def vm(*nics: NicSpec, slot: int = 7) -> Vm:
    spec = VmSpec(nics=nics)
    return Vm(id="0b7c1f6e-0000-4000-8000-000000000007", name="a", spec=spec, slot=slot, created_at=0, created_by="t")


@needs_passt
async def test_nics_are_attached_watched_and_detached(found: passt.Passt, short: Path) -> None:
    async def find_passt() -> passt.Passt:
        return msgspec.structs.replace(found, place=str(short / "net"))

    networks = UserNetworks(places=[short / "net", short / "other"], find=find_passt, owner=owner, instead=no_slirp)
    machine = vm(NicSpec(name="a" * 63, publish=(Publish(guest_port=22),)), NicSpec(name="off", network="none"))
    nics: list[NicRuntime] = []
    try:
        nics = [await networks.attach(machine, nic.name) for nic in machine.spec.nics]
        assert nics[0].publish[0].host_port > 0
        assert Path(nics[0].handle["socket"]).is_socket()
        assert "socket" not in nics[1].handle
        again = await networks.attach(machine, "a" * 63)  # replaces the first
        assert not await networks.healthy(nics[0])
        nics[0] = again
        for nic in nics:
            assert await networks.healthy(msgspec.json.decode(msgspec.json.encode(nic), type=NicRuntime))
    finally:
        for nic in nics:
            await networks.detach(machine.id, nic)
            await networks.detach(machine.id, nic)
    assert not await networks.healthy(nics[0])
    with pytest.raises(MicaError) as caught:
        await networks.attach(vm(NicSpec(network="office")), "net0")
    assert "office" in caught.value.message


# ---- addresses and ports


def test_addresses_differ_between_vms_and_nics_and_stay_in_the_pool() -> None:
    from ipaddress import IPv4Interface, IPv4Network

    pool = IPv4Network("10.64.0.0/12")
    given = [
        addresses.nic_addresses(pool, slot, nic) for slot in (0, 1, 2, 999, addresses.SLOTS - 1) for nic in range(8)
    ]
    for field in addresses.NicAddresses.__struct_fields__:
        assert len({getattr(one, field) for one in given}) == len(given)
    networks = {IPv4Interface(one.address).network for one in given}
    assert len(networks) == len(given)
    assert all(network.subnet_of(pool) for network in networks)
    for one in given:
        network = IPv4Interface(one.address).network
        assert IPv4Address(one.gateway) in network
        assert IPv4Address(one.dns) in network
    for slot, nic in ((-1, 0), (addresses.SLOTS, 0), (0, 8)):
        with pytest.raises(MicaError):
            addresses.nic_addresses(pool, slot, nic)


def test_the_pool_keeps_clear_of_the_hosts_routes() -> None:
    from ipaddress import IPv4Network

    net = IPv4Network
    assert addresses.choose_pool([net("0.0.0.0/0"), net("192.168.1.0/24")]) == net("10.64.0.0/12")
    assert addresses.choose_pool([net("10.0.0.0/8")]) == net("172.16.0.0/12")
    assert addresses.choose_pool([net("10.0.0.0/8"), net("172.17.0.0/16")]) == net("100.64.0.0/12")
    everywhere = [net("10.0.0.0/8"), net("172.16.0.0/12"), net("172.17.0.0/16"), net("100.64.0.0/10")]
    assert addresses.choose_pool(everywhere) == net("10.64.0.0/12")


def test_two_wishes_for_any_port_are_given_two() -> None:
    given = ports.reserve((Publish(guest_port=1), Publish(guest_port=1), Publish(guest_port=1, host_address="0.0.0.0")))
    assert len({wish.host_port for wish in given}) == 3
    assert not ports.listening(given[0])


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        (Publish(guest_port=1, host_address="not an address"), Code.INVALID),
        (Publish(guest_port=1, host_address="203.0.113.7"), Code.INVALID),
    ],
)
def test_addresses_that_cannot_be_published_on_are_refused(wish: Publish, code: Code) -> None:
    with pytest.raises(MicaError) as caught:
        ports.reserve((wish,))
    assert caught.value.code is code
    assert wish.host_address in caught.value.message


def test_forged_frames_are_well_formed() -> None:
    """A checksum over a right packet with its checksum in place is zero (RFC 1071)."""
    data = frame("10.0.0.1", "10.0.0.2", b"odd")[4:]
    assert struct.unpack("!H", data[16:18])[0] == len(data) - 14
    assert frames.checksum(data[14:34]) == 0
    pseudo = data[26:34] + struct.pack("!BBH", 0, 17, len(data) - 34)
    assert frames.checksum(pseudo + data[34:]) == 0


async def test_what_somebody_else_may_have_made_is_not_removed(short: Path) -> None:
    """A place in /tmp can be made by anybody who is there first, with links out of it."""
    precious, place = short / "precious", short / "place"
    (precious / "n").mkdir(parents=True)
    place.mkdir()
    (place / "proof-1").symlink_to(precious)
    (place / "vm-1").symlink_to(precious)
    (place / "vm-2").mkdir()

    async def find_passt() -> passt.Passt:
        raise AssertionError("not asked")

    networks = UserNetworks(places=[place, short / "absent"], find=find_passt, owner=owner, instead=no_slirp)
    assert await networks.owners() == {"vm-2"}
    await proof.clear([place])
    await networks.remove("vm-1")
    place.chmod(0o777)  # no better than another's
    assert await networks.owners() == set()
    await networks.remove("vm-2")
    assert (precious / "n").is_dir()
    assert (place / "vm-2").is_dir()
