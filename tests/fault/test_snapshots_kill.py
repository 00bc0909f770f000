"""``kill -9`` while snapshots are taken, copies begin and machines go back: memory and disk are those of one moment."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable

import pytest

from mica.client import Client
from mica.client.handle import VmHandle
from mica.client.vms import make_create, vm_id
from mica.model.errors import Code, MicaError
from mica.model.operation import OperationState
from mica.model.snapshot import SnapshotState
from mica.model.views import SnapshotCreate, SnapshotRestore, VmFork
from mica.model.vm import VmState
from tests.fault.truth import all_vms, honest
from tests.integration.world import World, wait_for

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

KILLS = 10
NAME = "anna"
# A word in memory, and the same on disk, where the guest remembers nothing of it.
WRITE = "echo $0 >/tmp/word; echo $0 | dd of=/dev/vda bs=512 conv=fsync,sync 2>/dev/null"
READ = "echo 3 >/proc/sys/vm/drop_caches; cat /tmp/word; dd if=/dev/vda bs=512 count=1 2>/dev/null | tr -d '\\0'"


async def booted(client: Client) -> VmHandle:
    operation = await client.vms.create(make_create("micro", name=NAME, memory="128M", disk="16M", start=True))
    return await (await client.vms.get(vm_id(operation))).wait_agent(timeout_s=120)


async def words(vm: VmHandle) -> str:
    """What it has in memory and on disk, which is the same."""
    await vm.wait_agent(timeout_s=120)
    memory, disk = str(await vm.exec("sh", "-c", READ)).split()
    assert memory == disk, f"{vm.name} has {memory} in memory and {disk} on disk"
    return memory


async def began(asking: Awaitable[object]) -> None:
    """Ask, and wait for no more than the answer; the daemon may die before it comes."""
    try:
        await asking
    except MicaError as error:
        if error.code is not Code.DAEMON_UNREACHABLE:
            raise


class Life:
    """One VM, what it has been, and what snapshots of it must bring back."""

    def __init__(self, world: World, client: Client, vm: VmHandle, dice: random.Random) -> None:
        self.world, self.client, self.vm, self.dice = world, client, vm, dice
        self.word = ""
        self.taken: dict[str, str] = {}
        self.round = 0

    async def write(self) -> None:
        self.round += 1
        self.word = f"word-{self.round}"
        await self.vm.exec("sh", "-c", WRITE, self.word)

    async def ask(self) -> str:
        """Begin something; returns the snapshot that it goes back to, empty when it stays where it is."""
        snapshots, name = self.client.snapshots, f"s{self.round}"
        verb = self.dice.choice(["snapshot", "fork", "restore", "fork-of"] if self.taken else ["snapshot", "fork"])
        old = self.dice.choice(sorted(self.taken)) if self.taken else ""
        print(self.round, verb, old)
        match verb:
            case "snapshot":
                await began(snapshots.create(NAME, SnapshotCreate(name=name), wait=False))
            case "fork":
                await began(snapshots.fork(NAME, VmFork(count=2, name=f"now-{self.round}")))
            case "fork-of":
                await began(snapshots.fork(NAME, VmFork(name=f"as-{old}-{self.round}", snapshot=old)))
            case _:
                await began(snapshots.restore(NAME, old, SnapshotRestore(), wait=False))
                return old
        return ""

    async def check(self, back_to: str) -> None:
        """Everything is as it was, or as it was to be."""
        await honest(self.world, self.client)
        await self.vm.refresh()
        if self.vm.view.observed.state is not VmState.RUNNING:
            # Only going back ends it, and then it has gone there, and can again.
            assert back_to, self.vm.view.observed
            await self.vm.restore_snapshot(back_to, keep=False)
        before, self.word = self.word, await words(self.vm)
        assert self.word in {before, *([self.taken[back_to]] if back_to else [])}
        complete = {s.snapshot.name for s in await self.vm.snapshots() if s.snapshot.state is SnapshotState.COMPLETE}
        assert complete >= self.taken.keys(), "a snapshot that was complete is gone"
        for name in sorted(complete - self.taken.keys()):
            self.taken[name] = before  # taken in this round, the state before going back among them
        for copy in [v for v in await self.client.vms.list() if v.id != self.vm.id]:
            if copy.view.observed.state is VmState.RUNNING:
                origin = copy.name.removeprefix("as-").rpartition("-")[0]
                assert await words(copy) == (self.taken[origin] if copy.name.startswith("as-") else before)
            await copy.remove()


async def unexpected(client: Client) -> list[str]:
    return [
        f"{o.verb} {o.target_name}: {o.problem}"
        for o in await client.operations.list(limit=1000)
        if o.state is OperationState.STUCK or (o.problem is not None and o.problem.code is Code.INTERNAL)
    ]


async def test_the_daemon_is_killed_while_states_are_taken(world: World) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    async with world.client() as client:
        life = Life(world, client, await booted(client), random.Random(seed))
        for _ in range(KILLS):
            await life.write()
            back_to = await life.ask()
            await asyncio.sleep(life.dice.random() * 0.8)
            await asyncio.to_thread(world.restart)
            await life.check(back_to)
            assert await unexpected(client) == [], f"seed {seed}"
        for name, word in sorted(life.taken.items()):
            await client.snapshots.verify(NAME, name)
            await life.vm.restore_snapshot(name, keep=False)
            assert await words(life.vm) == word, f"seed {seed}"
        await life.vm.remove()
        assert await honest(world, client) == []
    await asyncio.to_thread(wait_for, "a clean host", lambda: not world.leftovers(), timeout_s=90)


async def test_qemus_are_killed_while_states_are_taken(world: World) -> None:
    """Whichever it hits, the VM's own, the one that was to go on or a copy's: what is complete stays good."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    dice = random.Random(seed)
    async with world.client() as client:
        vm = await booted(client)
        await vm.exec("sh", "-c", WRITE, "good")
        await vm.snapshot("good")
        for number in range(5):
            await client.snapshots.fork(NAME, VmFork(name=f"copy-{number}"))
            await asyncio.sleep(dice.random() * 0.5)
            os.kill(dice.choice(world.qemus()), signal.SIGKILL)
            await honest(world, client)
            assert await unexpected(client) == [], f"seed {seed}"
            await vm.restore_snapshot("good", keep=False)
            assert await words(vm) == "good"
            for copy in await all_vms(client):
                if copy.id != vm.id:
                    await client.vms.delete(copy.id, purge=True, force=True)
        await vm.remove()
        assert await honest(world, client) == []
    await asyncio.to_thread(wait_for, "a clean host", lambda: not world.leftovers(), timeout_s=90)
