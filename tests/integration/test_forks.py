"""Snapshots and forks of one real machine: UEFI, a disk with a file system, published ports. It boots once.

The tests run in this order: what is told of the parent's first snapshot is only true of the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from mica.client import Client
from mica.client.execs import ExecStream
from mica.client.handle import VmHandle
from mica.client.snapshots import verdict
from mica.client.vms import make_create, vm_id
from mica.model.errors import Code, MicaError
from mica.model.identity import FIRST, REST, Trait
from mica.model.image import Firmware
from mica.model.snapshot import PartKind
from mica.model.units import MIB
from mica.model.vm import NVRAM, VmState
from mica.network import proof
from tests.fault.truth import honest, rows
from tests.integration.network import fetch
from tests.integration.world import World, new_world, wait_for

pytestmark = pytest.mark.guest

# The parts of the data disk and of memory that tests look at. What runs in the parent runs in every copy of it.
SETUP = """
set -e
mke2fs /dev/vda >/dev/null
mkdir -p /data /srv
mount /dev/vda /data
echo first >/data/word
sync
echo first >/tmp/word
until ip route | grep -q default; do usleep 100000; done
httpd -p 8080 -h /tmp
nc -ll -p 7 -e cat </dev/null >/dev/null 2>&1 &
until netstat -tln | grep -q :7; do usleep 50000; done
"""
# Numbers, ten in a second, for a stream and for the console.
TICKS = "n=0; while [ $n -lt $1 ]; do n=$((n+1)); echo tick-$n.; echo tock-$n. >/dev/console; usleep 100000; done"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A daemon of this module alone."""
    with new_world() as made:
        yield made


@pytest.fixture(scope="module")
def booted_parent(world: World) -> str:
    async def boot() -> str:
        async with world.client() as client:
            body = make_create(
                "micro",
                name="parent",
                memory="256M",
                disk="64M",
                publish=["0:8080", "0:7"],
                firmware=Firmware.UEFI,
                start=True,
            )
            vm = await client.vms.get(vm_id(await client.vms.create(body)))
            await vm.wait_agent(timeout_s=120)
            await vm.exec("sh", "-c", SETUP)
            return vm.name

    return asyncio.run(boot())


@pytest.fixture
async def parent(booted_parent: str, client: Client) -> VmHandle:
    return await client.vms.get(booted_parent)


@pytest.fixture
async def child(parent: VmHandle) -> AsyncIterator[VmHandle]:
    """A copy of the parent for this test alone."""
    (made,) = await parent.fork()
    try:
        yield made
    finally:
        await made.remove()


async def words(vm: VmHandle) -> tuple[str, str]:
    """What stands in its memory and on its disk, as the disk is and not as the guest remembers it."""
    said = await vm.exec("sh", "-c", "sync; echo 3 >/proc/sys/vm/drop_caches; cat /tmp/word /data/word")
    memory, disk = str(said).split()
    return memory, disk


async def write(vm: VmHandle, word: str) -> None:
    await vm.exec("sh", "-c", f"echo {word} >/tmp/word; echo {word} >/data/word; sync")


async def sums(vm: VmHandle) -> list[str]:
    """Checksums of everything in memory and on disk that tests wrote."""
    text = "sync; echo 3 >/proc/sys/vm/drop_caches; find /data /tmp -type f -exec md5sum {} + | sort -k2"
    return str(await vm.exec("sh", "-c", text)).splitlines()


def memfds(world: World) -> int:
    """Guest RAM that the daemon itself holds."""
    links = []
    for entry in Path(f"/proc/{world.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(entry))
    return sum("memfd:ram" in link for link in links)


def pid(vm: VmHandle) -> int:
    assert vm.view.process is not None
    return vm.view.process.pid


# ---- the first snapshot


class Peer:
    """A connection that is used now and then."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def echoes(self, line: str) -> None:
        self.writer.write(f"{line}\n".encode())
        async with asyncio.timeout(30):
            assert await self.reader.readline() == f"{line}\n".encode()

    def close(self) -> None:
        self.writer.close()


async def connected(port: int) -> Peer:
    """To the guest's echo server; a published port takes connections before the guest does."""
    async with asyncio.timeout(30):
        while True:
            peer = Peer(*await asyncio.open_connection("127.0.0.1", port))
            try:
                async with asyncio.timeout(3):
                    await peer.echoes("hello")
            except (TimeoutError, AssertionError, OSError):
                peer.close()
                await asyncio.sleep(0.1)
            else:
                return peer


@contextlib.asynccontextmanager
async def calls_home(vm: VmHandle) -> AsyncIterator[Peer | None]:
    """A connection that the guest has opened to this host; ``None`` where the host has no address for that."""
    own = proof._own_address()
    if own is None:
        yield None
        return
    came: asyncio.Queue[Peer] = asyncio.Queue(maxsize=1)

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.put_nowait(Peer(reader, writer))

    async with await asyncio.start_server(accept, str(own), 0) as server:
        port = server.sockets[0].getsockname()[1]
        await vm.exec("sh", "-c", f"nc {own} {port} -e cat </dev/null >/dev/null 2>&1 &")
        async with asyncio.timeout(30):
            peer = await came.get()
        try:
            yield peer
        finally:
            peer.close()


async def said(stream: ExecStream) -> list[str]:
    return b"".join([data async for channel, data in stream if channel == "stdout"]).decode().split()


async def test_everything_goes_on_through_the_first_snapshot(world: World, parent: VmHandle) -> None:
    """Its QEMU is another one then."""
    ticks, before = 40, pid(parent)
    async with contextlib.AsyncExitStack() as stack:
        echo = await connected(parent.view.nics[0].publish[1].host_port)
        stack.callback(echo.close)
        home = await stack.enter_async_context(calls_home(parent))
        console = await stack.enter_async_context(parent.console())
        stream = await stack.enter_async_context(parent.exec_stream("sh", "-c", TICKS, "sh", str(ticks)))
        output = asyncio.create_task(said(stream))
        taken = await parent.snapshot("first")
        await echo.echoes("still there")
        if home is not None:
            await home.echoes("still at home")
        assert await output == [f"tick-{n}." for n in range(1, ticks + 1)]
        assert stream.result().exit_code == 0
        text = ""
        async with asyncio.timeout(30):
            while f"tock-{ticks}." not in text:
                text += (await anext(console)).decode(errors="replace")
        assert [f"tock-{n}." for n in range(1, ticks + 1) if f"tock-{n}." not in text] == []
    await parent.refresh()
    assert (parent.state, pid(parent) != before) == (VmState.RUNNING, True)
    assert taken.snapshot.pause_s is not None
    assert 0 < taken.snapshot.pause_s < 10
    assert set(taken.snapshot.disks) == {"root", NVRAM}
    assert (taken.complete, taken.memory, taken.current) == (True, True, True)
    assert "pause: " in world.cli("snapshot", "show", "parent", "first").stdout
    assert await words(parent) == ("first", "first")
    assert await fetch(parent.view.nics[0].publish[0].host_port) is not None


# ---- forks


async def test_forks_differ_from_their_first_second_on(world: World, client: Client, parent: VmHandle) -> None:
    ask = "head -c 16 /dev/urandom | md5sum; cat /proc/sys/kernel/random/uuid /sys/class/net/eth0/address"
    await write(parent, "forked")
    forks = await parent.fork(2, name="twin")
    try:
        answers = await asyncio.gather(*(vm.exec("sh", "-c", ask) for vm in (parent, *forks)))
        for values in zip(*(str(answer).splitlines() for answer in answers), strict=True):
            assert len(set(values)) == 3, answers
        assert [vm.name for vm in forks] == ["twin-1", "twin-2"]
        for vm in forks:
            assert {item.what for item in vm.view.identity if item.done} >= set(FIRST)
            assert await words(vm) == ("forked", "forked")
        await asyncio.gather(*(becomes_itself(world, client, vm) for vm in forks))
        # The parent goes on, and nobody sees what the others write.
        await asyncio.gather(*(write(vm, f"of-{vm.name}") for vm in (parent, *forks)))
        for vm in (parent, *forks):
            assert await words(vm) == (f"of-{vm.name}", f"of-{vm.name}")
        # Their ports are their own, and lead to them.
        ports = [[p.host_port for p in vm.view.nics[0].publish] for vm in (parent, *forks)]
        assert len({port for pair in ports for port in pair}) == 6
        for vm, (web, echo) in zip((parent, *forks), ports, strict=True):
            await vm.exec("sh", "-c", "cp /tmp/word /tmp/index.html")
            assert await fetch(web) == f"of-{vm.name}"
            (await connected(echo)).close()
    finally:
        await asyncio.gather(*(vm.remove() for vm in forks))


async def becomes_itself(world: World, client: Client, vm: VmHandle) -> None:
    """Wait until all is told, and see that it is so."""
    everything = {*FIRST, *REST, Trait.PROGRAMS, Trait.FIRMWARE}
    vm.view = await client.vms.wait_until(
        vm.id, lambda view: {i.what for i in view.identity} == everything, timeout_s=60, what="an identity"
    )
    assert {item.what for item in vm.view.identity if not item.done} == {Trait.PROGRAMS, Trait.FIRMWARE}
    said = await vm.exec("sh", "-c", "hostname; cat /sys/class/net/eth0/address; ip -4 addr show dev eth0")
    name, mac, *address = str(said).splitlines()
    assert (name, mac) == (vm.name, vm.view.spec.nics[0].mac)
    assert f"inet {vm.view.nics[0].address}/" in "".join(address)
    assert "10.64.0.2/" not in "".join(address)
    shown = world.cli("vm", "show", vm.name).stdout
    assert "fork of:" in shown
    for word in ("hostname", "address", "random"):
        assert word in shown.partition("own by now:")[2].splitlines()[0]


# ---- there and back


async def test_changes_cost_what_they_are_and_going_back_brings_all_of_it(world: World, child: VmHandle) -> None:
    size = 50
    await child.exec("sh", "-c", "head -c 3000000 /dev/urandom >/data/old; echo before >/tmp/word; sync")
    old = await sums(child)
    first = await child.snapshot("one")
    await child.exec("sh", "-c", f"dd if=/dev/urandom of=/tmp/much bs=1M count={size} && rm /data/old")
    await child.exec("sh", "-c", "head -c 2000000 /dev/urandom >/data/new; echo after >/tmp/word; sync")
    new = await sums(child)
    second = await child.snapshot("two")
    costs = []
    for view in (first, second):
        assert view.snapshot.memory is not None
        assert view.snapshot.memory.changes
        costs.append((world.home / "parts" / view.snapshot.memory.changes).stat().st_blocks * 512)
    assert size * MIB <= costs[1] - costs[0] <= 1.3 * size * MIB
    await child.restore_snapshot("one")
    assert (await child.refresh()).observed.state is VmState.RUNNING
    assert await sums(child) == old
    (kept,) = [s for s in await child.snapshots() if s.snapshot.name == "before-restore-1"]
    await child.restore_snapshot(kept.snapshot.name, keep=False)
    assert await sums(child) == new
    assert [s.snapshot.name for s in await child.snapshots()] == ["one", "two", "before-restore-1"]
    # Without its memory: as after a power cut, and it has to start.
    await child.restore_snapshot("one", keep=False, memory=False)
    assert (await child.refresh()).observed.state is VmState.STOPPED


async def test_copies_of_copies_live_without_those_before(world: World, client: Client, parent: VmHandle) -> None:
    await write(parent, "root")
    line, above = [], parent
    for depth in range(1, 4):
        await above.snapshot(f"at-{depth}")
        (vm,) = await above.fork(name=f"depth-{depth}", snapshot=f"at-{depth}")
        assert await words(vm) == (f"depth-{depth - 1}" if depth > 1 else "root",) * 2
        await write(vm, vm.name)
        line.append(vm)
        above = vm
    try:
        # Snapshots go in no order, and machines before what was copied of them.
        await client.snapshots.delete("depth-1", "at-2")
        await line[0].remove()
        await client.snapshots.delete("parent", "at-1")
        await client.snapshots.delete("depth-2", "at-3")
        await line[1].remove()
        (last,) = await line[2].fork()
        line.append(last)
        assert await words(line[2]) == ("depth-3", "depth-3")
        await line[2].remove()
        assert await words(last) == ("depth-3", "depth-3")
        await last.exec("sh", "-c", "md5sum /data/* >/dev/null; echo more >/data/more; sync")
        await honest(world, client)
    finally:
        await asyncio.gather(*(vm.remove() for vm in line))
    assert await words(parent) == ("root", "root")


# ---- damage


@contextlib.contextmanager
def flipped(file: Path) -> Iterator[None]:
    """One bit of a part is another one."""

    def flip() -> None:
        at = file.stat().st_size // 2
        mode = file.stat().st_mode
        file.chmod(0o600)
        with file.open("r+b") as opened:
            opened.seek(at)
            (byte,) = opened.read(1)
            opened.seek(at)
            opened.write(bytes([byte ^ 0x10]))
        file.chmod(mode)

    flip()
    try:
        yield
    finally:
        flip()


async def refused(go_back: Callable[[], object], vm: VmHandle) -> None:
    """It goes on as it is."""
    before = pid(vm)
    with pytest.raises(MicaError) as caught:
        await go_back()  # type: ignore[misc]
    assert caught.value.code is Code.CORRUPT, caught.value
    await vm.refresh()
    assert (vm.state, pid(vm)) == (VmState.RUNNING, before)


async def test_a_flipped_bit_is_found_wherever_it_is(world: World, client: Client, child: VmHandle) -> None:
    await write(child, "whole")
    taken = (await child.snapshot("good")).snapshot
    assert taken.memory is not None
    places = {
        PartKind.DEVICES: taken.memory.devices,
        PartKind.CHANGES: taken.memory.changes,
        PartKind.RAM: taken.memory.ram,
        PartKind.DISK: taken.disks["root"],
        PartKind.NVRAM: taken.disks[NVRAM],
    }
    # The layer that it lies over was made for the fork, and is as much a part of it.
    below = rows(world, "part")[taken.disks["root"]]["base"]
    for kind, part in [*places.items(), (PartKind.DISK, below)]:
        file = world.home / "parts" / part
        with flipped(file):
            if kind in (PartKind.DEVICES, PartKind.CHANGES, PartKind.NVRAM):  # looked at whenever one goes back
                await refused(lambda: child.restore_snapshot("good", keep=False), child)
            with pytest.raises(MicaError) as caught:
                await client.snapshots.verify(child.name, "good")
            assert caught.value.code is Code.CORRUPT
            assert str(file) in caught.value.message
            assert list(caught.value.details["damaged"]) == [part]
            view = await client.snapshots.get(child.name, "good")
            assert any(kind in words for words in view.damaged), view.damaged
            await refused(lambda: child.restore_snapshot("good", keep=False), child)
        assert not verdict(await client.snapshots.verify(child.name, "good")).result["damaged"]
    await child.restore_snapshot("good", keep=False)
    assert await words(child) == ("whole", "whole")


# ---- the end


async def test_nothing_is_left_of_all_that(world: World, client: Client, parent: VmHandle) -> None:
    await parent.remove()
    assert await client.snapshots.list(forks=True) == []
    await asyncio.to_thread(wait_for, "a clean host", lambda: not world.leftovers(), timeout_s=60)
    await asyncio.to_thread(wait_for, "no guest RAM held", lambda: memfds(world) == 0, timeout_s=60)
    assert rows(world, "part") == {}
