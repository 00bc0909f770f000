"""Templates of real guests: what begins at one goes on in its memory, as a machine of its own."""

from __future__ import annotations

import asyncio

import pytest

from mica.client import Client
from mica.client.handle import VmHandle
from mica.model.views import SnapshotSet, TemplateCreate
from mica.model.vm import VmState
from tests.integration.world import World

pytestmark = pytest.mark.guest


async def test_a_template_outlives_its_vm_and_is_run(
    booted: VmHandle, shared_client: Client, shared_world: World
) -> None:
    # In memory alone: micro has no disk.
    await booted.exec("sh", "-c", "echo kept >/tmp/word")
    made = await shared_client.templates.create(TemplateCreate(vm=booted.id, name="golden"))
    try:
        assert made.result["pause_s"] is not None
        view = await shared_client.templates.get("golden")
        assert (view.complete, view.memory, view.damaged) == (True, True, ())
        await booted.remove()
        done = shared_world.cli("run", "--rm", "golden", "--", "cat", "/tmp/word", "/proc/sys/kernel/hostname")
        assert (done.returncode, done.stdout.split()[0]) == (0, "kept"), done.stderr
        assert shared_world.cli("run", "--rm", "golden", "--", "sh", "-c", "exit 7").returncode == 7
        copies = [await shared_client.run("golden") for _ in range(2)]
        try:
            assert [copy.state for copy in copies] == [VmState.RUNNING] * 2
            random = {(await copy.exec("head", "-c", "16", "/dev/urandom")).stdout for copy in copies}
            assert len(random) == 2
            await shared_client.templates.delete("golden")
            for copy in copies:  # what they lie over stays
                assert (await copy.exec("cat", "/tmp/word")).stdout == b"kept\n"
        finally:
            for copy in copies:
                await copy.remove()
    finally:
        for view in await shared_client.templates.list():
            await shared_client.templates.delete(view.snapshot.id)


async def _standing_by(client: Client, number: int) -> None:
    async with asyncio.timeout(120):
        while (await client.templates.get("waiting")).standing_by != number:
            await asyncio.sleep(0.1)


async def test_one_that_stands_by_is_taken_and_becomes_a_machine_of_its_own(
    booted: VmHandle, shared_client: Client
) -> None:
    await booted.exec("sh", "-c", "echo kept >/tmp/word")
    made = await shared_client.templates.create(TemplateCreate(vm=booted.id, name="waiting"))
    copies: list[VmHandle] = []
    try:
        await shared_client.templates.set("waiting", SnapshotSet(standby=1))
        random = set()
        for _ in range(2):
            await _standing_by(shared_client, 1)
            copy = await shared_client.run("waiting")
            copies.append(copy)
            operation = (await shared_client.operations.list(vm=copy.id))[0]
            assert [entry.step for entry in operation.journal if entry.event == "started"] == ["record", "run"]
            view = await copy.refresh()
            assert (copy.state, view.forked_from) == (VmState.RUNNING, "waiting")
            words = "cat /tmp/word /sys/class/net/eth0/address; head -c 16 /dev/urandom | md5sum"
            kept, address, seeded = str(await copy.exec("sh", "-c", words)).splitlines()
            assert (kept, address) == ("kept", view.spec.nics[0].mac)
            random.add(seeded)
        assert len(random) == 2
        await shared_client.templates.set("waiting", SnapshotSet(standby=0))
        await _standing_by(shared_client, 0)
    finally:
        for copy in copies:
            await copy.remove()
        await shared_client.templates.delete(made.result["id"])
