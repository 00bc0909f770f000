"""Real QEMUs in real jails: what somebody who has taken over one would find.

The first tests enter the namespaces and the user id of a running QEMU and look around there; the last ones look from
inside a guest. Nothing of Mica's daemon is needed: these are the adapters alone, put together as it puts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from mica.host import slices
from mica.host.processes import usage
from mica.images.directory import DirectoryImages
from mica.model.image import Image, MicroRecipe
from mica.model.units import MIB, Bytes
from mica.model.vm import Publish
from mica.network import addresses, passt, proof
from mica.ports.progress import no_progress
from mica.ports.slices import SliceLimits
from mica.qemu.jail import Jail, JailKind, JailSpec, JailUsers, detect, hand_over
from mica.qemu.jailed import Jailed, start

QEMU = shutil.which("qemu-system-x86_64")
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
as_root = os.geteuid() == 0
USERS = JailUsers()

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not as_root, reason="entering another user's namespaces needs root"),
    pytest.mark.skipif(QEMU is None or shutil.which("bwrap") is None, reason="QEMU and bubblewrap are not installed"),
]


class Cell:
    """A jailed QEMU with a directory, a network and a control group of its own."""

    def __init__(self, base: Path, slot: int) -> None:
        self.slot = slot
        self.user = USERS.vm(slot)
        self.directory = base / f"vm{slot}"
        self.directory.mkdir(mode=0o700)
        self.disk = self.directory / "disk"
        self.disk.write_text(f"the disk of {slot}")
        hand_over(self.directory, self.user)
        self.output = base / f"output{slot}"
        self.status_file = base / f"status{slot}"
        self.network: passt.PasstHandle | None = None
        self.slice: dict[str, object] = {}
        self.jailed: Jailed | None = None

    @property
    def pid(self) -> int:
        assert self.jailed is not None
        return self.jailed.process.pid

    async def enter(self, script: str) -> str:
        """Run a script in QEMU's namespaces as QEMU's user, with what QEMU has of rights: none."""
        become = ["setpriv", f"--reuid={self.user.uid}", f"--regid={self.user.gid}", "--clear-groups"]
        become += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        process = await asyncio.create_subprocess_exec(
            *("nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--wd=/"),
            *become,
            *("sh", "-c", script),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": "/usr/bin:/usr/sbin"},
        )
        async with asyncio.timeout(30):
            output, _ = await process.communicate()
        return output.decode()


class Block:
    """Starts cells and clears everything away whatever happens."""

    def __init__(self, base: Path, jail: Jail, found: passt.Passt, groups: slices.HostSlices) -> None:
        self.base, self.jail, self.found, self.groups = base, jail, found, groups
        self.cells: list[Cell] = []
        self.closing: list[asyncio.StreamWriter] = []

    async def start(
        self, slot: int, *options: str, readable: tuple[Path, ...] = (), publish: tuple[Publish, ...] = ()
    ) -> Cell:
        assert QEMU is not None
        cell = Cell(self.base, slot)
        self.cells.append(cell)
        own, vm = USERS.network(slot), USERS.vm(slot)
        pool = addresses.choose_pool([network for _, network in addresses.read_routes()])
        link = passt.Link(
            directory=self.base / f"net{slot}",
            addresses=addresses.nic_addresses(pool, slot, 0),
            publish=publish,
            owner=passt.Owner(own.uid, own.gid, vm.gid),
        )
        cell.network = await passt.start(self.found, link)
        cell.slice = await self.groups.create(f"vm{slot}", SliceLimits(2.0, Bytes(768 * MIB)))
        argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-accel", "tcg"]
        argv += ["-m", "256", "-sandbox", SANDBOX]
        argv += ["-netdev", f"stream,id=n,server=off,addr.type=unix,addr.path={cell.network.socket}"]
        argv += ["-device", "virtio-net-pci,netdev=n,romfile=", *options]
        cell.jailed = await start(
            self.jail,
            argv,
            JailSpec(
                writable=(cell.directory,), readable=(Path(cell.network.socket).parent, *readable), user=cell.user
            ),
            status_file=cell.status_file,
            output=cell.output,
            before=lambda pid: self.groups.join(cell.slice, pid),
        )
        return cell

    async def clear(self) -> None:
        for writer in self.closing:
            writer.close()
        for cell in self.cells:
            if cell.jailed is not None:
                cell.jailed.process.kill()
                await cell.jailed.wait_exit(10)
                cell.jailed.close()
            if cell.network is not None:
                await passt.stop(cell.network)
            await self.groups.remove(cell.slice)


@pytest.fixture
async def block() -> AsyncIterator[Block]:
    with tempfile.TemporaryDirectory(prefix="m") as name:
        base = Path(name)
        base.chmod(0o711)
        found = await proof.prove(
            await passt.detect(), base, lambda: passt.Owner(USERS.network(0).uid, USERS.network(0).gid, USERS.vm(0).gid)
        )
        groups = await slices.detect(root=True, prefix=f"mica-test-{os.getpid()}")
        block = Block(base, await detect(root=True), found, groups)
        try:
            yield block
        finally:
            await block.clear()
            for path in Path("/sys/fs/cgroup").glob(f"**/mica-test-{os.getpid()}"):
                with contextlib.suppress(FileNotFoundError):
                    path.rmdir()


async def connect(cell: Cell, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """To one of QEMU's sockets, as soon as there is one: QEMU tells nobody when it listens."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await asyncio.open_unix_connection(str(cell.directory / name))
            except (FileNotFoundError, ConnectionRefusedError):
                assert cell.jailed is not None
                assert cell.jailed.process.alive, cell.output.read_text()
                await asyncio.sleep(0.02)


async def monitor(cell: Cell) -> None:
    """Wait until QEMU's monitor greets: then its sandbox is up."""
    reader, writer = await connect(cell, "qmp")
    async with asyncio.timeout(30):
        assert b"QMP" in await reader.readline()
    writer.close()
    await writer.wait_closed()


def qmp(base: Path, slot: int) -> tuple[str, ...]:
    return ("-S", "-qmp", f"unix:{base}/vm{slot}/qmp,server=on,wait=off")


async def test_the_jail_of_a_running_qemu_from_inside(block: Block) -> None:
    first = await block.start(1, *qmp(block.base, 1))
    second = await block.start(2, *qmp(block.base, 2))
    await monitor(first)
    await monitor(second)
    with socket.socket(socket.AF_UNIX) as daemon, socket.create_server(("127.0.0.1", 0)) as loopback:
        daemon.bind(str(block.base / "daemon.sock"))
        (block.base / "daemon.sock").chmod(0o777)
        daemon.listen()
        port = loopback.getsockname()[1]
        seen = await first.enter(
            f"echo files:; ls {block.base}; cat {first.disk}; echo; cat {second.disk}; ls {block.base}/daemon.sock;"
            f"echo processes:; ls /proc | grep '^[0-9]' | wc -l; kill -0 {second.pid}; kill -0 {os.getpid()};"
            "echo net:; cat /proc/net/dev | grep -c :; "
            f"perl -MSocket -e 'socket(S,PF_INET,SOCK_STREAM,0); print connect(S, sockaddr_in({port},"
            'inet_aton("127.0.0.1"))) ? "reached" : "not reached: $!"\'; echo;'
            "echo roots:; ls -A /home /root /var /run /sys 2>&1; echo write:; touch /x /usr/x /etc/x; id -u"
        )
        reached = loopback  # still listening: a refusal was the namespace's, not a closed port's
        assert reached.fileno() >= 0
    parts = dict(zip(*[iter(re.split(r"^(\w+):\n", seen, flags=re.M)[1:])] * 2, strict=True))
    assert f"the disk of {first.slot}" in parts["files"]
    assert f"the disk of {second.slot}" not in seen
    assert parts["files"].splitlines()[0:2] == [f"net{first.slot}", f"vm{first.slot}"]
    assert parts["files"].count("No such file") == 2
    assert int(parts["processes"].splitlines()[0]) <= 6  # QEMU and this script
    assert parts["processes"].count("No such process") == 2
    assert parts["net"].splitlines()[0] == "1"
    assert "not reached" in parts["net"]
    assert parts["roots"].count("No such file") == 5
    assert parts["write"].count("Read-only file system") == 3
    assert parts["write"].splitlines()[-1] == str(first.user.uid)


async def test_no_right_is_left_and_seccomp_filters(block: Block) -> None:
    first = await block.start(1, *qmp(block.base, 1))
    second = await block.start(2, *qmp(block.base, 2))
    await monitor(first)
    await monitor(second)
    namespaces = ("mnt", "pid", "net", "ipc", "uts", "cgroup")
    for cell, other in ((first, second), (second, first)):
        status = Path(f"/proc/{cell.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(fields[name], 16) == 0, name
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"
        assert fields["Uid"].split() == fields["Gid"].split() == [str(cell.user.uid)] * 4
        assert fields["Groups"].split() == []
        for name in namespaces:
            mine = os.readlink(f"/proc/{cell.pid}/ns/{name}")
            assert mine not in (os.readlink(f"/proc/self/ns/{name}"), os.readlink(f"/proc/{other.pid}/ns/{name}"))
        assert Path(f"/proc/{cell.pid}/oom_score_adj").read_text() == "500\n"


async def test_its_control_group_holds_it(block: Block) -> None:
    if block.groups.reduced:
        pytest.skip(block.groups.reduced[0])
    cell = await block.start(1, *qmp(block.base, 1))
    await monitor(cell)
    assert "vm1" in Path(f"/proc/{cell.pid}/cgroup").read_text()
    seen = await block.groups.usage(cell.slice)
    assert seen.cpu_s is not None
    assert seen.cpu_s > 0
    assert seen.memory is not None
    used = usage(cell.jailed.process.ref, pss=True) if cell.jailed else None
    assert used is not None
    assert used.pss is not None


# ---- from inside a guest


@pytest.fixture(scope="module")
def micro() -> tuple[Image, Callable[[Image, str], Path]]:
    """The micro image, built once per checkout (or taken from MICA_TEST_IMAGES)."""
    default = Path(__file__).parents[2] / ".cache" / "images"
    images = DirectoryImages(Path(os.environ.get("MICA_TEST_IMAGES", default)))

    async def get() -> Image:
        for image in await images.present():
            if image.name == "micro":
                return image
        return await images.make(MicroRecipe(), no_progress)

    return asyncio.run(get()), images.path


class Console:
    """A root shell on a serial line: send a command, read up to its end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._count = 0

    async def run(self, command: str, timeout_s: float = 60) -> str:
        self._count += 1
        # The echo of the command line itself must not look like its end.
        self._writer.write(f"{command}; echo end-''{self._count}-$?\n".encode())
        async with asyncio.timeout(timeout_s):
            text = await self._reader.readuntil(f"end-{self._count}-".encode())
            await self._reader.readuntil(b"\n")
        lines = text.decode(errors="replace").replace("\r", "").splitlines()
        return "\n".join(line for line in lines[:-1] if "echo end-''" not in line)


async def boot(
    block: Block, micro: tuple[Image, Callable[[Image, str], Path]], *publish: Publish
) -> tuple[Cell, Console]:
    image, path = micro
    direct = image.direct_boot
    assert direct is not None
    kernel, initrd = path(image, direct.kernel), path(image, direct.initrd)
    serial = block.base / "vm1" / "serial"
    cell = await block.start(
        1,
        *("-cpu", "Nehalem", "-serial", f"unix:{serial},server=on,wait=off"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", direct.cmdline, *qmp(block.base, 1)[1:]),
        readable=(kernel, initrd),
        publish=publish,
    )
    await monitor(cell)
    reader, writer = await connect(cell, "serial")
    block.closing.append(writer)
    console = Console(reader, writer)
    async with asyncio.timeout(90):
        while True:
            with contextlib.suppress(TimeoutError):
                if "ready" in await console.run("echo ready", timeout_s=2):
                    break
        while "default" not in await console.run("ip route"):
            await asyncio.sleep(0.2)
    return cell, console


class Web:
    """A server that greets whoever connects, on every address of this host, and notes on which it was reached."""

    def __init__(self) -> None:
        self.port = 0
        self.reached_on: list[str] = []

    def greet(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reached_on.append(writer.get_extra_info("sockname")[0])
        writer.write(b"hello from the host\n")
        writer.close()


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    web = Web()
    async with await asyncio.start_server(web.greet, "0.0.0.0", 0) as server:
        web.port = server.sockets[0].getsockname()[1]
        yield web


@pytest.mark.guest
@pytest.mark.parametrize("guarded", [True, False])
async def test_a_guest_has_its_network_and_not_the_hosts_loopback(
    block: Block, micro: tuple[Image, Callable[[Image, str], Path]], web: Web, guarded: bool
) -> None:
    """Without the sieve, on a passt that needs it, the same guest does reach the loopback: the attack is a real one."""
    if not guarded:
        if not block.found.sieve:
            pytest.skip("this passt drops such frames itself")
        block.found = msgspec.structs.replace(block.found, sieve=False)
    _, console = await boot(block, micro)
    pool = addresses.choose_pool([network for _, network in addresses.read_routes()])
    given = addresses.nic_addresses(pool, 1, 0)
    assert given.address in await console.run("ip -4 addr")
    assert f"default via {given.gateway}" in await console.run("ip route")
    resolvers = passt.read_host_network().dns
    told = await console.run("cat /etc/resolv.conf")
    assert all(f"nameserver {server}" in told for server in resolvers if "." in server)

    own = proof._own_address()

    async def reached(address: str) -> bool:
        return "hello from the host" in await console.run(f"timeout 5 nc -w 4 {address} {web.port} < /dev/null")

    if own is not None:
        assert await reached(str(own))
    assert not await reached(given.gateway)
    # An honest kernel keeps its loopback's addresses to itself; a hostile one sends them out over the wire.
    for command in (
        "echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet",
        "ip link set lo down",
        "ip route flush table local 127.0.0.0/8",
        "ip route del local 127.0.0.1 dev lo table local",
        f"ip route add 127.0.0.0/8 via {given.gateway}",
    ):
        await console.run(command)
    assert "dev eth0" in await console.run("ip route get 127.0.0.1")
    await reached("127.0.0.1")
    assert ("127.0.0.1" in web.reached_on) == (not guarded)


@pytest.mark.guest
async def test_a_published_port_reaches_the_guest(
    block: Block, micro: tuple[Image, Callable[[Image, str], Path]]
) -> None:
    cell, console = await boot(block, micro, Publish(guest_port=8080))
    assert cell.network is not None
    port = cell.network.publish[0].host_port
    await console.run("echo from the guest > /tmp/index.html; busybox httpd -p 8080 -h /tmp")
    assert ":8080" in await console.run("netstat -ltn")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    block.closing.append(writer)
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    async with asyncio.timeout(30):
        assert b"from the guest" in await reader.read()
    assert block.jail.kind is JailKind.ROOT
