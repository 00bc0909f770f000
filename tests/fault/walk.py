"""A random walk over real machines, and a model of what each one's disk and memory must contain.

Steps write, snapshot, restore, fork, suspend and delete, in any order, while now and then the daemon or a QEMU is
killed in the middle. The model is a dictionary; layers, RAM images, changed pages and merges are held against it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
from collections.abc import Awaitable, Callable

import msgspec

from mica.client import Client
from mica.client.handle import VmHandle
from mica.client.vms import make_create, vm_id
from mica.model.operation import OperationState
from mica.model.views import SnapshotCreate, SnapshotRestore, VmFork
from mica.model.vm import VmState
from tests.fault.truth import honest
from tests.integration.world import World

SLOTS, BLOCKS = 4, 6
SLOT_BYTES, BLOCK_BYTES = 192 * 1024, 64 * 1024
# Machines that live at once, and snapshots that are kept.
MOST_VMS, MOST_SNAPSHOTS = 3, 6
BOOT_S = 90.0

# Block 0 is never written: from it the sum of an empty one is known.
READ = f"""
sync; echo 3 >/proc/sys/vm/drop_caches
for s in $(seq 1 {SLOTS}); do md5sum </tmp/walk-$s 2>/dev/null || echo none; done
for b in $(seq 0 {BLOCKS}); do
    dd if=/dev/vda bs={BLOCK_BYTES} skip=$((b * 16)) count=1 2>/dev/null | md5sum
done
"""
WRITE = """
fill() { yes "$1" | head -c "$2"; }
fill $1 %d >/tmp/walk-$2
fill $1 %d | dd of=/dev/vda bs=%d seek=$(($3 * 16)) conv=fsync,notrunc 2>/dev/null
""" % (SLOT_BYTES, BLOCK_BYTES, BLOCK_BYTES)  # noqa: UP031 - the braces are the shell's


class Content(msgspec.Struct, frozen=True):
    """What a machine holds: words in slots of its memory and in blocks of its disk; 0 is nothing."""

    memory: tuple[int, ...] = (0,) * SLOTS
    disk: tuple[int, ...] = (0,) * BLOCKS

    def written(self, word: int, slot: int, block: int) -> Content:
        memory, disk = list(self.memory), list(self.disk)
        memory[slot - 1], disk[block - 1] = word, word
        return Content(tuple(memory), tuple(disk))

    def booted(self) -> Content:
        """Memory does not survive the end of its machine."""
        return Content(disk=self.disk)


class Taken(msgspec.Struct, frozen=True):
    """A snapshot: of which VM, by which id, what it must bring back. ``memory``: it is of a machine that ran."""

    vm: str
    id: str
    content: Content
    memory: bool


class Walk:
    """One walk. What it does is printed, so that a failure tells the way there."""

    def __init__(self, world: World, client: Client, seed: int) -> None:
        self._world, self._client = world, client
        self._random = random.Random(seed)
        self._words = 0
        self.vms: dict[str, Content] = {}
        self.snapshots: list[Taken] = []

    async def begin(self) -> None:
        body = make_create("micro", name="walker", memory="128M", disk="32M", start=True)
        vm = await self._client.vms.get(vm_id(await self._client.vms.create(body)))
        await vm.wait_agent(timeout_s=BOOT_S)
        self.vms[vm.id] = Content()
        await self._write(vm.id)

    async def step(self) -> None:
        ways: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (5, self._write_somewhere),
            (3, self._snapshot),
            (3 if self.snapshots else 0, self._restore),
            (3 if len(self.vms) < MOST_VMS else 0, self._fork),
            (2 if len(self.vms) > 1 else 0, self._delete_vm),
            (2 if self.snapshots else 0, self._delete_snapshot),
            (1, self._suspend),
            (1, self._kill_daemon),
        ]
        (way,) = self._random.choices([w for _, w in ways], [weight for weight, _ in ways])
        await way()

    async def end(self) -> None:
        """Everything is as the model says, and every snapshot that is left still brings back what it should."""
        for id_ in self.vms:
            await self.check(id_)
        for taken in self.snapshots:
            self._say("at last", taken.id[:8])
            if not taken.memory:
                continue
            (vm,) = await (await self._client.vms.get(taken.vm)).fork(snapshot=taken.id)
            await self._holds(vm, taken.content)
            await vm.remove()
        await honest(self._world, self._client)
        for id_ in list(self.vms):
            await (await self._client.vms.get(id_)).remove()
            del self.vms[id_]

    async def crash(self) -> None:
        """A QEMU dies: what was written to the disk is there when the machine has booted again."""
        vm = await self._any()
        assert vm.view.process is not None
        self._say("kill QEMU of", vm.name)
        os.kill(vm.view.process.pid, signal.SIGKILL)
        await self._client.vms.wait_until(
            vm.id, lambda v: v.observed.state is VmState.CRASHED, timeout_s=20, what="crashed"
        )
        await (await vm.start()).wait_agent(timeout_s=BOOT_S)
        self.vms[vm.id] = self.vms[vm.id].booted()
        await self.check(vm.id)

    # ---- the model and the machine

    async def check(self, id_: str) -> None:
        await self._holds(await self._client.vms.get(id_), self.vms[id_])

    async def _holds(self, vm: VmHandle, content: Content) -> None:
        said = str(await vm.exec("sh", "-c", READ)).splitlines()
        sums = [line.split()[0] for line in said]
        memory, empty, disk = sums[:SLOTS], sums[SLOTS], sums[SLOTS + 1 :]
        assert memory == [_sum(w, SLOT_BYTES) if w else "none" for w in content.memory], (vm.name, content)
        assert disk == [_sum(w, BLOCK_BYTES) if w else empty for w in content.disk], (vm.name, content)

    async def _write(self, id_: str) -> None:
        self._words += 1
        slot, block = self._random.randint(1, SLOTS), self._random.randint(1, BLOCKS)
        vm = await self._client.vms.get(id_)
        self._say("write", self._words, "to", vm.name, slot, block)
        await vm.exec("sh", "-c", WRITE, "sh", str(self._words), str(slot), str(block))
        self.vms[id_] = self.vms[id_].written(self._words, slot, block)

    # ---- steps

    async def _any(self) -> VmHandle:
        return await self._client.vms.get(self._random.choice(sorted(self.vms)))

    async def _write_somewhere(self) -> None:
        await self._write((await self._any()).id)

    async def _snapshot(self) -> None:
        vm, memory = await self._any(), self._random.random() < 0.8
        if len(self.snapshots) >= MOST_SNAPSHOTS:
            await self._delete_snapshot()
        self._say("snapshot", vm.name, memory)
        operation = await self._client.snapshots.create(vm.id, SnapshotCreate(memory=memory), wait=False)
        id_ = operation.params["snapshot_id"]
        await self._perhaps_kill_daemon()
        await self._succeeded(operation.id)
        self.snapshots.append(Taken(vm.id, id_, self.vms[vm.id], memory))
        await self.check(vm.id)

    async def _restore(self) -> None:
        here = [t for t in self.snapshots if t.vm in self.vms]
        if not here:
            return
        taken = self._random.choice(here)
        vm = await self._client.vms.get(taken.vm)
        self._say("restore", vm.name, "to", taken.id[:8], taken.memory)
        operation = await self._client.snapshots.restore(vm.id, taken.id, SnapshotRestore(keep=False), wait=False)
        await self._perhaps_kill_daemon()
        await self._succeeded(operation.id)
        self.vms[vm.id] = taken.content
        if not taken.memory:
            self.vms[vm.id] = taken.content.booted()
            await (await vm.start()).wait_agent(timeout_s=BOOT_S)
        await self.check(vm.id)

    async def _fork(self) -> None:
        vm = await self._any()
        self._say("fork", vm.name)
        accepted = await self._client.snapshots.fork(vm.id, VmFork())
        await self._perhaps_kill_daemon()
        (made,) = await self._client.snapshots.forked(accepted)
        self.vms[vm_id(made)] = self.vms[vm.id]
        await self.check(vm_id(made))
        await self.check(vm.id)

    async def _delete_vm(self) -> None:
        vm = await self._any()
        self._say("delete", vm.name)
        await vm.remove()
        del self.vms[vm.id]
        self.snapshots = [t for t in self.snapshots if t.vm != vm.id]  # they went with it

    async def _delete_snapshot(self) -> None:
        taken = self.snapshots.pop(self._random.randrange(len(self.snapshots)))
        self._say("delete snapshot", taken.id[:8])
        await self._client.snapshots.delete(taken.vm, taken.id)

    async def _suspend(self) -> None:
        vm = await self._any()
        self._say("suspend", vm.name)
        await vm.suspend()
        await self._perhaps_kill_daemon()
        await vm.start()
        await self.check(vm.id)

    async def _kill_daemon(self) -> None:
        self._say("kill the daemon")
        await asyncio.to_thread(self._world.restart)

    async def _perhaps_kill_daemon(self) -> None:
        if self._random.random() < 0.3:
            await asyncio.sleep(self._random.uniform(0.0, 0.3))
            await self._kill_daemon()

    async def _succeeded(self, operation_id: str) -> None:
        ended = await self._client.operations.wait(operation_id, timeout_s=120)
        assert ended.state is OperationState.SUCCEEDED, ended

    def _say(self, *words: object) -> None:
        print(f"[{self._words}]", *words)


def _sum(word: int, length: int) -> str:
    line = f"{word}\n".encode()
    return hashlib.md5((line * (length // len(line) + 1))[:length], usedforsecurity=False).hexdigest()
