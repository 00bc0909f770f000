"""A VM that went back is checked in full while it runs, and paused when it runs on damage."""

from __future__ import annotations

import pytest

from mica.engine.definition import NoParams
from mica.engine.operations.snapshot_create import Take
from mica.engine.operations.snapshot_restore import Revert
from mica.model.errors import Code
from mica.model.snapshot import Snapshot
from mica.model.units import GIB, Bytes
from mica.model.views import VmStart
from mica.model.vm import DiskSpec, VmState
from mica.testing.harness import Life, Rig
from tests.engine.worlds import create, do, living

DISK = DiskSpec(name="data", size=Bytes(GIB))


async def two_snapshots(life: Life) -> dict[str, Snapshot]:
    await create(life, disks=(DISK,))
    await do(life, "vm.start", "a", VmStart())
    await life.advance(2.0)
    for name in ("one", "two"):
        await do(life, "snapshot.create", "a", Take(name=name))
        await life.advance(1.0)
    return {row.value.name: row.value for row in (await life.records.snapshots.scan()).values()}


def large(snapshot: Snapshot, what: str) -> str:
    assert snapshot.memory is not None
    return snapshot.memory.ram if what == "ram" else snapshot.disks["data"]


@pytest.mark.parametrize("what", ["ram", "disk"])
async def test_a_vm_that_turns_out_to_run_on_damage_is_paused_and_says_why(what: str) -> None:
    async with living() as life:
        snapshots = await two_snapshots(life)
        life.rig.world.storage.parts[large(snapshots["two"], what)].damage = "a bit"
        await do(life, "snapshot.restore", "a", Revert(snapshot=snapshots["two"].id))
        await life.advance(10.0)
        view = await life.engine.views.vm("a")
        assert view.observed.state is VmState.PAUSED
        assert "damage was found" in view.observed.reason
        assert view.observed.problem is not None
        assert view.observed.problem.code is Code.CORRUPT
        assert "checksum" in view.observed.problem.message
        assert ("snapshot restore a one" in view.observed.problem.hint) is (what == "disk")  # both have the same RAM
        assert (await life.records.statuses.need(view.id)).value.checking == ""
        # It stays so until somebody decides.
        await life.advance(60.0)
        assert "damage was found" in (await life.engine.views.vm("a")).observed.reason
        await do(life, "vm.resume", "a", NoParams())
        await life.advance(60.0)
        seen = (await life.engine.views.vm("a")).observed
        assert (seen.state, seen.reason, seen.problem) == (VmState.RUNNING, "", None)


async def test_a_vm_that_runs_on_what_was_written_runs_on() -> None:
    async with living() as life:
        snapshots = await two_snapshots(life)
        before = life.rig.world.faults.calls["parts.verify"]
        await do(life, "snapshot.restore", "a", Revert(snapshot=snapshots["two"].id))
        await life.advance(10.0)
        view = await life.engine.views.vm("a")
        assert view.observed.state is VmState.RUNNING
        assert (await life.records.statuses.need(view.id)).value.checking == ""
        # devices and changes before it ran; then the RAM image and both layers
        assert life.rig.world.faults.calls["parts.verify"] - before == 5


async def test_a_daemon_that_dies_meanwhile_checks_again() -> None:
    async with Rig() as rig:
        rig.world.add_image("micro")
        async with rig.life() as life:
            await life.advance(0.1)
            snapshots = await two_snapshots(life)
            rig.world.storage.parts[large(snapshots["two"], "ram")].damage = "a bit"
            operation = await life.submit("snapshot.restore", "a", Revert(snapshot=snapshots["two"].id))
            while not (await life.records.operations.need(operation.id)).value.state.ended:
                await life.advance(0.01)
        async with rig.life() as life:
            await life.advance(10.0)
            assert (await life.engine.views.vm("a")).observed.state is VmState.PAUSED
        assert await rig.lies() == []
