"""States of real machines: forks of forks see the memory and the disk of their moment, and nobody can change it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mica.guest.agent import GuestAgent
from mica.model.image import DiskFormat
from mica.model.units import MIB, Bytes
from mica.model.vm import DiskSpec, Vm, VmRuntime, VmSpec
from mica.ports.hypervisor import Captured, Origin, StatefulMachine
from mica.ports.volumes import Volume
from mica.qemu.command_line import Sockets
from mica.qemu.hypervisor import QemuHypervisor
from mica.qemu.jail import JailUsers
from tests.contract.test_hypervisor import IDS, QemuStand, real
from tests.contract.test_hypervisor import micro as micro
from tests.contract.test_hypervisor import place as place

pytestmark = pytest.mark.guest

SIZE = 64 * MIB
SPEC = VmSpec(memory=Bytes(128 * MIB), nics=(), disks=(DiskSpec(name="data", size=Bytes(SIZE)),))


class Lab:
    """Machines of one hypervisor, each with a disk, and a way to run commands in them."""

    def __init__(self, stand: QemuStand) -> None:
        self.stand = stand
        assert isinstance(stand.hypervisor, QemuHypervisor)
        self.hypervisor = stand.hypervisor
        self.parts = stand.settings.home / "parts"
        self.parts.mkdir(mode=0o711)

    def vm(self, number: int) -> Vm:
        return Vm(id=IDS[number], name=f"vm{number}", spec=SPEC, slot=number, created_at=0.0, created_by="test")

    def disk(self, vm: Vm, name: str, base: Volume | None = None) -> Volume:
        path = self.parts / f"{name}.qcow2"
        below = ["-b", str(base.path), "-F", "qcow2", "-u"] if base else []
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *below, str(path), str(SIZE)], check=True)
        user = JailUsers().vm(vm.slot)
        if os.geteuid() == 0:
            os.chown(path, user.uid, user.gid)
        backing = (base.path, *base.backing) if base else ()
        return Volume(name="data", path=path, format=DiskFormat.QCOW2, size=Bytes(SIZE), backing=backing)

    async def launch(self, vm: Vm, volume: Volume, origin: Origin | None = None, incarnation: int = 0) -> VmRuntime:
        plan = self.stand.plan(vm, boots=True)
        plan = msgspec.structs.replace(plan, volumes=(volume,), origin=origin, incarnation=incarnation)
        return await self.hypervisor.launch(plan)

    async def machine(self, runtime: VmRuntime) -> StatefulMachine:
        machine = await self.hypervisor.attach(runtime)
        assert machine is not None
        return machine

    def origin(self, ram: str, captured: Captured) -> Origin:
        return Origin(
            ram=ram,
            ram_file=self.parts / ram,
            devices=captured.devices,
            changes=captured.changes,
            build=captured.build,
        )


@pytest.fixture
async def lab(request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    async with real(request) as stand:
        yield Lab(stand)


async def sh(runtime: VmRuntime, script: str) -> str:
    """Run a script in the guest, by its agent."""
    agent = GuestAgent(Sockets(Path(runtime.run_dir)).agent)
    try:
        await agent.wait_ready(60)
        pid = await agent.exec_raw("/bin/sh", ["-c", script])
        status = await agent.exec_wait(pid, timeout_s=60)
        return f"{status.out_data.decode()}{status.exitcode}"
    finally:
        await agent.close()


async def booted(lab: Lab) -> tuple[VmRuntime, StatefulMachine, Volume]:
    volume = lab.disk(lab.vm(0), "first")
    runtime = await lab.launch(lab.vm(0), volume)
    machine = await lab.machine(runtime)
    await machine.resume()
    assert (await sh(runtime, "echo one > /tmp/word; echo disk1 | dd of=/dev/vda conv=fsync 2>/dev/null")).endswith("0")
    return runtime, machine, volume


async def as_child(lab: Lab, runtime: VmRuntime, machine: StatefulMachine, volume: Volume) -> tuple[Any, ...]:
    """Freeze a machine's own memory and go on as a child of it, as a first snapshot does."""
    await lab.hypervisor.ram.hold(runtime, "ram1")
    state = lab.stand.settings.home / "state1"
    state.mkdir()
    pending = Origin(
        ram="ram1", ram_file=lab.parts / "ram1", devices=state / "devices", build=lab.hypervisor.build_of(SPEC)
    )
    above = lab.disk(lab.vm(0), "second", volume)
    spare = await lab.launch(lab.vm(0), above, pending, incarnation=1)
    child = await lab.machine(spare)
    # Written while the other machine has the disk open already: its table of clusters is new to that one.
    late = "head -c 4194304 /dev/urandom > /tmp/late; dd if=/tmp/late of=/dev/vda bs=1M seek=20 conv=fsync"
    assert (await sh(runtime, late)).endswith("0")
    began = time.monotonic()
    await machine.pause()
    await machine.capture(state)
    captured = await machine.capture(state)  # as a daemon does that takes over from one that died here
    origin = lab.origin("ram1", captured)
    await child.load(origin)
    await lab.hypervisor.retire(lab.vm(0).id, runtime.incarnation)
    await child.resume()
    print(f"paused for {time.monotonic() - began:.3f} s")
    return spare, child, above, origin


def digest(lab: Lab) -> str:
    (fd,) = [lab.hypervisor.ram._held["ram1"]]
    with Path(f"/proc/self/fd/{fd}").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def test_a_fork_of_a_fork_has_the_memory_and_disk_of_its_moment(lab: Lab) -> None:
    runtime, machine, volume = await booted(lab)
    spare, child, above, origin = await as_child(lab, runtime, machine, volume)
    sealed = digest(lab)
    assert await sh(spare, "cat /tmp/word; head -c5 /dev/vda") == "one\ndisk10"
    same = "dd if=/dev/vda bs=1M skip=20 count=4 iflag=direct 2>/dev/null | cmp - /tmp/late && echo same"
    assert await sh(spare, f"echo 3 > /proc/sys/vm/drop_caches; {same}") == "same\n0"

    # A sibling of the same moment, while the parent goes on.
    await sh(spare, "echo two > /tmp/word; echo disk2 | dd of=/dev/vda conv=fsync 2>/dev/null")
    fork = await lab.launch(lab.vm(1), lab.disk(lab.vm(1), "fork", volume), origin)
    sibling = await lab.machine(fork)
    await sibling.load(origin)
    await sibling.resume()
    assert await sh(fork, "cat /tmp/word; head -c5 /dev/vda") == "one\ndisk10"
    assert await sh(spare, "cat /tmp/word; head -c5 /dev/vda") == "two\ndisk20"
    await lab.hypervisor.cleanup(lab.vm(1).id, fork)

    # The second generation: only what changed, and the machine stays where it is.
    await sh(spare, "dd if=/dev/urandom of=/tmp/x bs=1M count=20 2>/dev/null; md5sum /tmp/x > /tmp/sum; sync")
    state = lab.stand.settings.home / "state2"
    state.mkdir()
    third = lab.disk(lab.vm(0), "third", above)
    began = time.monotonic()
    await child.pause()
    captured = await child.capture(state)
    await child.switch((third,))
    await child.switch((third,))
    await child.resume()
    print(f"paused for {time.monotonic() - began:.3f} s, {captured.changed / MIB:.1f} MiB changed")
    assert 20 * MIB < captured.changed < 64 * MIB
    await sh(spare, "echo three > /tmp/word; rm /tmp/x; echo disk3 | dd of=/dev/vda conv=fsync 2>/dev/null")
    second = lab.origin("ram1", captured)
    fork = await lab.launch(lab.vm(1), lab.disk(lab.vm(1), "fork2", above), second)
    grandchild = await lab.machine(fork)
    await grandchild.load(second)
    await grandchild.resume()
    assert await sh(fork, "cat /tmp/word; head -c5 /dev/vda; md5sum -c /tmp/sum") == "two\ndisk2/tmp/x: OK\n0"
    assert await sh(spare, "cat /tmp/word; head -c5 /dev/vda") == "three\ndisk30"
    assert digest(lab) == sealed


async def test_much_change_is_folded_into_a_new_image_while_the_guest_runs(lab: Lab) -> None:
    runtime, machine, volume = await booted(lab)
    spare, child, above, origin = await as_child(lab, runtime, machine, volume)
    sealed, ram = digest(lab), lab.hypervisor.ram
    make = "dd if=/dev/urandom of=/tmp/{0} bs=1M count={1} 2>/dev/null; md5sum /tmp/{0} > /tmp/{0}.sum; sync"
    await sh(spare, make.format("x", 32))
    assert (await child.forecast()).changed > 32 * MIB

    done: list[float] = []
    await ram.prepare(spare, "ram2", done.append)
    assert done
    assert "ram2" not in ram.held()
    state = lab.stand.settings.home / "folded"
    state.mkdir()
    third = lab.disk(lab.vm(0), "third", above)
    pending = Origin(
        ram="ram2", ram_file=lab.parts / "ram2", devices=state / "devices", build=lab.hypervisor.build_of(SPEC)
    )
    second = await lab.launch(lab.vm(0), third, pending, incarnation=2)
    waiting = await lab.machine(second)
    assert "ram2" not in ram.held()  # as for a daemon that finds it there: it is no image yet
    await sh(spare, f"echo late > /tmp/word; rm /tmp/x; {make.format('y', 16)}")
    began = time.monotonic()
    await child.pause()
    ram.discard("ram2")  # as with the daemon that made it
    await ram.fill(spare, second)
    ram.release("ram2")
    await ram.fill(spare, second)  # again, by one that takes over from a daemon that died here
    assert "ram2" in ram.held()
    captured = await child.capture(state, folded=True)
    folded = lab.origin("ram2", captured)
    await waiting.load(folded)
    await lab.hypervisor.retire(lab.vm(0).id, spare.incarnation)
    await waiting.resume()
    print(f"paused for {time.monotonic() - began:.3f} s")
    assert captured.changed < 32 * MIB
    assert await sh(second, "cat /tmp/word; md5sum -c /tmp/y.sum; ls /tmp/x 2>/dev/null") == "late\n/tmp/y: OK\n1"

    # From there on little has changed again.
    await sh(second, f"echo later > /tmp/word; {make.format('z', 4)}")
    after = lab.stand.settings.home / "after"
    after.mkdir()
    fourth = lab.disk(lab.vm(0), "fourth", third)
    await waiting.pause()
    captured = await waiting.capture(after)
    await waiting.switch((fourth,))
    await waiting.resume()
    assert 4 * MIB < captured.changed < 32 * MIB
    later = lab.origin("ram2", captured)
    await sh(second, "rm /tmp/y /tmp/z; echo last > /tmp/word")

    for name, where, base, words in (
        ("at-fold", folded, above, "late\n/tmp/y: OK\n0"),
        ("since", later, third, "later\n/tmp/y: OK\n0"),
        ("before", origin, volume, "one\nmd5sum"),
    ):
        fork = await lab.launch(lab.vm(1), lab.disk(lab.vm(1), name, base), where)
        copy = await lab.machine(fork)
        await copy.load(where)
        await copy.resume()
        found = await sh(fork, "cat /tmp/word; md5sum -c /tmp/y.sum 2>&1")
        assert found.startswith(words), (name, found)
        if name == "since":
            assert await sh(fork, "md5sum -c /tmp/z.sum") == "/tmp/z: OK\n0"
        await lab.hypervisor.cleanup(lab.vm(1).id, fork)
    assert digest(lab) == sealed


async def test_no_fork_can_change_the_image(lab: Lab) -> None:
    """A balloon in a private mapping would punch holes into the file that all others map."""
    runtime, machine, volume = await booted(lab)
    spare, child, _, origin = await as_child(lab, runtime, machine, volume)
    sealed = digest(lab)
    await child.monitor.run("balloon", {"value": 64 * MIB})
    await asyncio.sleep(1.0)
    assert await sh(spare, "cat /tmp/word") == "one\n0"
    assert digest(lab) == sealed
    fork = await lab.launch(lab.vm(1), lab.disk(lab.vm(1), "fork", volume), origin)
    sibling = await lab.machine(fork)
    await sibling.load(origin)
    await sibling.resume()
    assert await sh(fork, "cat /tmp/word") == "one\n0"


async def test_an_image_is_saved_and_read_back(lab: Lab) -> None:
    runtime, machine, volume = await booted(lab)
    _, _, _, origin = await as_child(lab, runtime, machine, volume)
    sealed = digest(lab)
    await lab.hypervisor.ram.save("ram1", lab.parts / "ram1", lambda _: None)
    assert (lab.parts / "ram1").stat().st_blocks * 512 < SPEC.memory
    await lab.hypervisor.cleanup(lab.vm(0).id, None)
    lab.hypervisor.ram.release("ram1")
    fork = await lab.launch(lab.vm(1), lab.disk(lab.vm(1), "fork", volume), origin)
    sibling = await lab.machine(fork)
    await sibling.load(origin)
    await sibling.resume()
    assert await sh(fork, "cat /tmp/word; head -c5 /dev/vda") == "one\ndisk10"
    assert digest(lab) == sealed
