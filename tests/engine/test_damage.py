"""Damaged parts of snapshots are found, named with all that depends on them, and good again when they are."""

from __future__ import annotations

from typing import Any

from mica.engine.damage import dependents
from mica.engine.definition import NoParams, Policy
from mica.engine.operations.snapshot_create import Take
from mica.model.errors import Code
from mica.model.operation import OperationState
from mica.model.snapshot import PartKind, Snapshot
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import VmCreate, VmStart, VmStop
from mica.model.vm import DiskSpec
from mica.testing.harness import Life, Rig
from tests.engine.worlds import create, do, living, refused

DISK = DiskSpec(name="data", size=Bytes(GIB))
SLOW = Policy(scrub_rate=MIB, scrub_every_s=60.0)


async def taken(life: Life, *names: str) -> dict[str, Snapshot]:
    for name in names:
        await do(life, "snapshot.create", "a", Take(name=name))
    return {row.value.name: row.value for row in (await life.records.snapshots.scan()).values()}


def damage(life: Life, part_id: str, how: str = "a bit") -> None:
    life.rig.world.storage.parts[part_id].damage = how


async def test_scrubbing_finds_damage_and_names_all_that_depends_on_it(logs: list[dict[str, Any]]) -> None:
    async with living(SLOW) as life:
        await create(life, disks=(DISK,))
        snapshots = await taken(life, "one", "two")
        await do(life, "vm.create", "", VmCreate(name="b", snapshot=snapshots["one"].id))
        below = snapshots["one"].disks["data"]
        damage(life, below)
        since = await life.rig.store.revision()
        await life.advance(400.0)
        (told,) = [entry for entry in logs if entry["event"] == "a part of snapshots is damaged"]
        assert told["needed_by"] == ("snapshot a/one", "snapshot a/two", "VM a", "VM b")
        for name in ("one", "two"):
            assert (await life.engine.views.snapshot("a", name)).damaged
        for name in ("a", "b"):
            assert "checksum" in (await life.engine.views.vm(name)).damaged[0]
        changed = {(c.key.kind, c.key.id) for c in await life.rig.store.changes(since)}
        assert {("snapshot", s.id) for s in snapshots.values()} <= changed
        # Somebody restores the file.
        damage(life, below, "")
        await life.advance(400.0)
        assert not (await life.engine.views.snapshot("a", "two")).damaged
        assert (await life.engine.views.vm("b")).damaged == ()


async def test_scrubbing_reads_slowly_and_goes_on_where_it_was() -> None:
    async with Rig(SLOW) as rig:
        rig.world.add_image("micro")

        async def read() -> int:
            now = rig.clock.now()
            return sum(now - (r.value.verified_at or 0.0) < 10.0 for r in (await rig.records.parts.scan()).values())

        async with rig.life() as life:
            await life.advance(0.1)
            await create(life, disks=(DISK,))
            await taken(life, "one", "two", "three")
        async with rig.life() as life:
            await life.advance(121.5)
            assert await read() == 1
        async with rig.life() as life:  # where it was, and not from the beginning
            await life.advance(122.5)
            assert await read() == 2
            verified = [r.value.verified_at for r in (await rig.records.parts.scan()).values()]
            assert min(v or 0.0 for v in verified) > rig.clock.now() - 200.0


async def test_a_part_that_is_gone_is_damage_and_one_that_nobody_needs_is_not() -> None:
    async with living(SLOW) as life:
        await create(life, disks=(DISK,))
        snapshots = await taken(life, "one")
        part = snapshots["one"].disks["data"]
        path = life.engine.env.parts.path(part)
        file = life.rig.world.storage.there.pop(path)
        ended = await life.run("snapshot.verify", snapshots["one"].id, NoParams())
        assert list(ended.result["damaged"]) == [part]
        assert (await life.engine.views.snapshot("a", "one")).damaged
        life.rig.world.storage.there[path] = file
        ended = await life.run("snapshot.verify", snapshots["one"].id, NoParams())
        assert ended.result["damaged"] == {}
        assert not (await life.engine.views.snapshot("a", "one")).damaged


async def test_what_runs_on_frozen_memory_depends_on_it() -> None:
    async with living() as life:
        vm = await create(life)
        await do(life, "vm.start", "a", VmStart())
        await life.advance(2.0)
        snapshots = await taken(life, "one")
        memory = snapshots["one"].memory
        assert memory is not None
        assert (await dependents(life.engine.env, memory.ram)).names == ("snapshot a/one", f"VM {vm.name}")
        assert (await dependents(life.engine.env, memory.devices)).names == ("snapshot a/one",)
        rows = await life.records.parts.scan()
        assert rows[memory.ram].value.kind is PartKind.RAM


async def test_a_vm_over_a_damaged_layer_does_not_start_and_names_the_last_valid_snapshot() -> None:
    async with living() as life:
        await create(life, disks=(DISK,))
        snapshots = await taken(life, "one", "two")
        damage(life, snapshots["two"].disks["data"])
        await life.run("snapshot.verify", snapshots["two"].id, NoParams())
        ended = await life.run("vm.start", "a", VmStart())
        assert ended.state is OperationState.FAILED
        assert ended.problem is not None
        assert ended.problem.code is Code.CORRUPT
        assert "last valid snapshot is one" in ended.problem.message
        assert "--last-valid" in ended.problem.hint
        assert (await life.engine.views.vm("a")).observed.problem == ended.problem
        damage(life, snapshots["two"].disks["data"], "")
        await do(life, "vm.start", "a", VmStart())
        assert (await life.engine.views.vm("a")).damaged == ()


async def test_a_running_vm_over_a_damaged_layer_is_not_stopped_to_restart_it() -> None:
    async with living() as life:
        vm = await create(life, disks=(DISK,))
        snapshots = await taken(life, "one")
        await do(life, "vm.start", "a", VmStart())
        damage(life, snapshots["one"].disks["data"])
        await life.run("snapshot.verify", snapshots["one"].id, NoParams())
        await refused(life, Code.CORRUPT, "vm.restart", "a", VmStop())
        assert vm.id in life.rig.world.processes
