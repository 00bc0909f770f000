"""``kill -9`` at random moments: afterwards the world is what the store says, and nothing is lost or left over."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter

import pytest

from mica.client import Client
from mica.client.handle import VmHandle
from mica.client.vms import make_create
from mica.model.errors import Code, MicaError
from mica.model.operation import OperationState
from mica.model.views import VmSet
from mica.model.vm import VmState
from tests.fault.truth import all_vms, honest
from tests.integration.conftest import create
from tests.integration.world import World

pytestmark = pytest.mark.guest

DAEMON_S = 30.0
QEMU_S = 8.0
NAMES = ("anna", "bert", "cleo", "dora")

# How often each is asked for.
VERBS = {
    "create": 4,
    "start": 6,
    "stop": 3,
    "restart": 3,
    "pause": 2,
    "resume": 2,
    "set": 2,
    "delete": 1,
    "purge": 2,
    "restore": 1,
}

# What a request may be answered when it comes at the wrong moment. Never "internal", never "stuck".
EXPECTED = {
    Code.DAEMON_UNREACHABLE,
    Code.STATE_CONFLICT,
    Code.NOT_FOUND,
    Code.EXISTS,
    Code.TIMEOUT,
    Code.BUSY,
    Code.QEMU_FAILED,
    Code.CANCELLED,
}


class Chaos:
    """Asks one daemon for random things, without waiting for what comes of them."""

    def __init__(self, client: Client, dice: random.Random) -> None:
        self.client, self.dice = client, dice
        self.asked: Counter[str] = Counter()

    async def ask(self) -> None:
        name = self.dice.choice(NAMES)
        verb = self.dice.choices(list(VERBS), list(VERBS.values()))[0]
        vms = self.client.vms
        try:
            match verb:
                case "create":
                    start = self.dice.random() < 0.7
                    body = make_create("micro", name=name, memory="96M", disk="4M", publish=["0:80"], start=start)
                    await vms.create(body, wait=False)
                case "start":
                    await vms.start(name, paused=self.dice.random() < 0.2, wait=False)
                case "stop":
                    await vms.stop(name, force=True, wait=False)
                case "restart":
                    await vms.restart(name, force=True, wait=False)
                case "pause":
                    await vms.pause(name, wait=False)
                case "resume":
                    await vms.resume(name, wait=False)
                case "set":
                    await vms.set(name, VmSet(cpu_limit=self.dice.choice([0.3, 0.9, None])), wait=False)
                case "delete" | "purge":
                    await vms.delete(name, purge=verb == "purge", force=True, wait=False)
                case "restore":
                    trashed = await vms.list(trashed=True)
                    if trashed:
                        await vms.restore(self.dice.choice(trashed).id, wait=False)
        except MicaError as error:
            if error.code not in EXPECTED:
                pytest.fail(f"{verb} {name}: {error.code} {error.message}")
        else:
            self.asked[verb] += 1

    async def for_a_while(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await self.ask()
            await asyncio.sleep(self.dice.random() * 0.08)


async def failures(client: Client) -> list[str]:
    """Operations that ended in a way in which none should."""
    return [
        f"{operation.verb} {operation.target_name}: {operation.problem}"
        for operation in await client.operations.list(limit=1000)
        if operation.problem is not None and operation.problem.code not in EXPECTED
    ]


async def test_the_daemon_is_killed_at_any_moment(world: World) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    dice = random.Random(seed)
    began, kills, asked = time.monotonic(), 0, Counter[str]()
    while time.monotonic() < began + DAEMON_S:
        async with world.client() as client:
            chaos = Chaos(client, dice)
            asking = {asyncio.create_task(chaos.for_a_while(5.0)) for _ in range(2)}
            await asyncio.wait(asking, timeout=0.1 + dice.random() * 1.5)
            world.kill()
            kills += 1
            for task in asking:
                task.cancel()
            for outcome in await asyncio.gather(*asking, return_exceptions=True):
                assert isinstance(outcome, asyncio.CancelledError | None), outcome
            asked += chaos.asked
        await asyncio.to_thread(world.start)
        async with world.client() as client:
            # Killed again while it recovers, now and then.
            if dice.random() < 0.3:
                world.kill()
                kills += 1
                await asyncio.to_thread(world.start)
            try:
                await honest(world, client)
            except (AssertionError, TimeoutError) as error:
                pytest.fail(f"seed {seed}, after {kills} kills: {error}")
            assert await failures(client) == []
    print(f"{kills} kills; {asked}")
    assert kills >= 5
    async with world.client() as client:
        for vm in await all_vms(client):
            await client.vms.delete(vm.id, purge=True, force=True)
        assert await honest(world, client) == []
    assert world.leftovers() == []


async def test_qemus_are_killed_at_any_moment(world: World) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    dice = random.Random(seed)
    began, kills = time.monotonic(), 0
    async with world.client() as client:
        chaos = Chaos(client, dice)
        while time.monotonic() < began + QEMU_S:
            asking = asyncio.create_task(chaos.for_a_while(1.5))
            while not asking.done():
                await asyncio.wait({asking}, timeout=dice.random() * 0.3)
                for pid in world.qemus():
                    if dice.random() < 0.3:
                        kills += 1
                        try:
                            os.kill(pid, signal.SIGKILL)
                        except ProcessLookupError:
                            kills -= 1
            asking.result()
            try:
                await honest(world, client)
            except (AssertionError, TimeoutError) as error:
                pytest.fail(f"seed {seed}, after {kills} kills: {error}")
        assert await failures(client) == []
        assert kills >= 3
        for vm in await all_vms(client):
            await client.vms.delete(vm.id, purge=True, force=True)
        assert await honest(world, client) == []
    assert world.leftovers() == []


# ---- a QEMU that hangs


async def test_hung_qemus_hold_up_nobody(world: World) -> None:
    """Stopped by SIGSTOP they answer nothing: others are served, and each of them can be got rid of."""
    async with world.client() as client:
        names = ("fine", "forced", "asked", "woken")
        fine, *hung = await asyncio.gather(*(started(client, name) for name in names))
        for vm in hung:
            os.kill(pid_of(vm), signal.SIGSTOP)
        for _ in range(3):
            for ask in (client.vms.list(), client.vms.view("forced"), client.host(), client.vms.pause("fine")):
                began = time.monotonic()
                await ask
                assert time.monotonic() - began < 1.0
            await client.vms.resume("fine")
        # A new daemon starts, lists and serves as quickly, although it cannot speak with those.
        began = time.monotonic()
        await asyncio.to_thread(world.restart)
        assert {vm.name: vm.state for vm in await client.vms.list()} == dict.fromkeys(names, VmState.RUNNING)
        await client.vms.pause("fine")
        assert time.monotonic() - began < 10
        await asyncio.gather(forced(client, hung[0]), asked(client, hung[1]), woken(client, hung[2]))
        assert (await fine.refresh()).observed.state is VmState.PAUSED
        await honest(world, client)


async def started(client: Client, name: str) -> VmHandle:
    return await (await create(client, name)).start()


def pid_of(vm: VmHandle) -> int:
    assert vm.view.process is not None
    return vm.view.process.pid


async def forced(client: Client, vm: VmHandle) -> None:
    began = time.monotonic()
    await client.vms.stop(vm.id, force=True)
    assert time.monotonic() - began < 25  # a look that had begun may wait for its own deadline
    assert (await client.vms.view(vm.id)).observed.state is VmState.STOPPED


async def asked(client: Client, vm: VmHandle) -> None:
    """It is asked, cannot be, and its time-out is waited for as with any guest that does not react."""
    operation = await client.vms.stop(vm.id, timeout_s=13)
    assert operation.result["how"] == "forced"
    assert (await client.vms.view(vm.id)).observed.state is VmState.STOPPED


async def woken(client: Client, vm: VmHandle) -> None:
    """What it cannot do is told, and when it answers again it obeys."""
    with pytest.raises(MicaError) as caught:
        await client.vms.pause(vm.id)
    assert caught.value.code in (Code.TIMEOUT, Code.STUCK)
    os.kill(pid_of(vm), signal.SIGCONT)
    async with asyncio.timeout(60):
        if caught.value.code is Code.STUCK:  # taking the pause back was not possible either
            (stuck,) = [o for o in await vm.operations() if o.state is OperationState.STUCK]
            await client.operations.resolve(stuck.id, "retry")
            await client.operations.settle(stuck.id)
        await client.vms.wait_until(vm.id, lambda v: not v.operations, timeout_s=30, what="rest")
        await client.vms.pause(vm.id)
    assert (await client.vms.view(vm.id)).observed.state is VmState.PAUSED
