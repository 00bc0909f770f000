"""Snapshots that can be trusted, on real guests."""

from __future__ import annotations

import pytest

from mica.client import Client
from mica.client.handle import VmHandle
from mica.model.errors import Code, MicaError
from mica.model.units import MIB, Bytes
from mica.model.views import SnapshotCreate
from mica.model.vm import DiskSpec, VmState
from tests.integration.conftest import create
from tests.integration.world import World

pytestmark = pytest.mark.guest


async def test_a_quiesced_guest_goes_on(booted: VmHandle) -> None:
    taken = await booted.snapshot("still", quiesce=True)
    assert taken.snapshot.quiesced
    assert taken.snapshot.pause_s is not None
    # Its agent refuses commands while file systems are frozen.
    result = await booted.exec("echo", "thawed")
    assert result.stdout == b"thawed\n"
    again = await booted.snapshot("again", quiesce=True, memory=False)
    assert again.snapshot.quiesced
    await booted.restore_snapshot("still", keep=False)
    result = await booted.exec("echo", "here")
    assert result.stdout == b"here\n"


async def test_a_damaged_disk_goes_back_to_the_last_valid_snapshot(shared_world: World, shared_client: Client) -> None:
    vm = await create(shared_client, disks=(DiskSpec(name="data", size=Bytes(64 * MIB)),))
    try:
        await vm.snapshot("good")
        (top,) = (shared_world.home / "volumes" / vm.id).glob("data*.qcow2")
        with top.open("r+b") as file:
            file.write(b"\0" * 512)
        with pytest.raises(MicaError) as caught:
            await vm.start()
        assert caught.value.code is Code.CORRUPT
        assert "last valid snapshot is good" in caught.value.message
        await vm.start(last_valid=True)
        assert (await vm.refresh()).observed.state is VmState.RUNNING
        kept = next(s for s in await vm.snapshots() if s.snapshot.name == "damaged-1")
        assert kept.damaged
    finally:
        await vm.remove()


async def test_what_a_snapshot_takes_is_known_before(booted: VmHandle, shared_client: Client) -> None:
    takes = [await shared_client.snapshots.create(booted.id, SnapshotCreate(name=name)) for name in ("one", "two")]
    first, second = (operation.result["expected"] for operation in takes)
    # The first one writes what the guest has touched of its memory, the second what has changed since.
    assert 20 * MIB < first["size"] <= 140 * MIB
    assert 0 < second["size"] < first["size"]
    assert abs(second["size"] - takes[1].result["changed"]) < 48 * MIB
    for operation in takes:
        taken = await shared_client.snapshots.get(booted.id, operation.result["id"])
        assert taken.size < operation.result["expected"]["size"] + 48 * MIB
