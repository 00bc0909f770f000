"""What readers see of snapshots: sizes, damage, descent, forks, events."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mica.engine.definition import NoParams
from mica.engine.forking import fork, restore
from mica.engine.operations.snapshot_create import Take
from mica.engine.records import Draft
from mica.model.errors import Code, MicaError
from mica.model.snapshot import (
    MachineBuild,
    MemoryState,
    Part,
    PartKind,
    Snapshot,
    SnapshotKind,
    SnapshotState,
)
from mica.model.units import MIB, Bytes
from mica.model.views import SnapshotRestore, SnapshotSet, SnapshotView, VmDelete, VmFork
from mica.model.vm import VmSpec
from mica.ports.store import ABSENT
from mica.testing.harness import BY, Life
from tests.engine.test_views import take
from tests.engine.worlds import create, do, living

replace = msgspec.structs.replace
BUILD = MachineBuild(qemu="7.2.0", machine="pc-q35-7.2", cpu="max", accelerator="tcg")


async def snapshot(life: Life, vm: str, name: str, **how: Any) -> SnapshotView:
    await do(life, "snapshot.create", vm, Take(name=name, **how))
    return await life.engine.views.snapshot(vm, name)


# ── taken by the engine ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_snapshot_that_was_taken_is_seen_whole() -> None:
    async with living() as life:
        vm = await create(life, "a", start=True)
        await life.advance(5.0)
        seen = await snapshot(life, "a", "clean", description="as installed")
        assert (seen.memory, seen.complete, seen.current, seen.damaged, seen.forks) == (True, True, True, (), ())
        assert seen.snapshot.description == "as installed"
        assert seen.verified_at is not None
        assert seen.size > 0
        assert await life.engine.views.snapshot("a", seen.snapshot.id[:8]) == seen
        after = await life.engine.views.vm("a")
        assert (after.snapshot, after.id) == (seen.snapshot.id, vm.id)
        # It reads the memory of that moment now, as all that begin there do.
        assert after.usage.shared == after.spec.memory // 2, "as much as it had touched"
        with pytest.raises(MicaError) as caught:
            await life.engine.views.snapshot("a", "nothing")
        assert caught.value.code is Code.NOT_FOUND


async def test_snapshots_of_one_vm_and_of_all_are_told_oldest_first() -> None:
    async with living() as life:
        await create(life, "a")
        await create(life, "b")
        for vm, name in (("a", "zero"), ("b", "one"), ("a", "two")):
            await snapshot(life, vm, name)
            await life.advance(1.0)
        views = life.engine.views
        assert [v.snapshot.name for v in (await views.snapshots("a")).items] == ["zero", "two"]
        assert [v.snapshot.name for v in (await views.snapshots()).items] == ["zero", "one", "two"]
        assert [v.current for v in (await views.snapshots()).items] == [False, True, True]
        assert not any(v.memory for v in (await views.snapshots()).items)
        assert (await views.snapshots()).revision == await life.rig.store.revision()


async def test_the_moment_at_which_forks_begin_is_not_told_unless_asked() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await life.advance(5.0)
        accepted = await fork(life.engine, "a", VmFork(count=2, name="w"), by=BY)
        views = life.engine.views
        (moment,) = (await views.snapshots("a", forks=True)).items
        assert (moment.snapshot.kind, moment.complete) == (SnapshotKind.FORK, False)
        await life.rest()
        assert (await views.snapshots()).items == ()
        copy = await views.vm("w-1")
        assert (copy.forked_from, copy.snapshot) == ("a", "")
        assert f"vm/{copy.id}" == accepted.operations[0].target
        assert copy.usage.shared == copy.spec.memory // 2


async def test_a_snapshot_names_the_vms_that_began_at_it() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await life.advance(5.0)
        seen = await snapshot(life, "a", "clean")
        await fork(life.engine, "a", VmFork(count=2, name="w", snapshot="clean"), by=BY)
        await life.rest()
        assert (await life.engine.views.snapshot("a", "clean")).forks == ("w-1", "w-2")
        assert (await life.engine.views.vm("w-2")).snapshot == seen.snapshot.id


async def test_going_back_and_every_verb_are_seen() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await life.advance(5.0)
        clean = await snapshot(life, "a", "clean")
        await life.advance(1.0)
        operation = await restore(life.engine, "a", "clean", SnapshotRestore(), by=BY)
        await life.finish(operation.id)
        views = life.engine.views
        first, second = (await views.snapshots("a")).items
        assert (first.current, second.current, second.snapshot.kind) == (True, False, SnapshotKind.SAFETY)
        await do(life, "snapshot.set", clean.snapshot.id, SnapshotSet(name="fresh", protected=True))
        fresh = await views.snapshot("a", "fresh")
        assert (fresh.snapshot.protected, fresh.generation > clean.generation) == (True, True)
        before = fresh.verified_at
        await life.advance(60.0)
        await do(life, "snapshot.verify", clean.snapshot.id, NoParams())
        verified = (await views.snapshot("a", "fresh")).verified_at
        assert before is not None
        assert verified is not None
        assert verified > before
        await do(life, "snapshot.delete", second.snapshot.id, NoParams())
        assert [v.snapshot.name for v in (await views.snapshots("a")).items] == ["fresh"]


async def test_events_tell_of_snapshots_until_they_are_gone() -> None:
    async with living() as life:
        await create(life, "a")
        since = await life.rig.store.revision()
        seen = await snapshot(life, "a", "clean")
        events = await take(life, since, await life.rig.store.revision())
        told = [e.object for e in events if (e.kind, e.id) == ("snapshot", seen.snapshot.id)]
        assert told[-1] == seen
        await do(life, "snapshot.delete", seen.snapshot.id, NoParams())
        events = await take(life, since, await life.rig.store.revision())
        assert [e.object for e in events if e.kind == "snapshot"] == [None]


# ── rows as they may lie ──────────────────────────────────────────────────────────────────────────────────────────


def row(name: str, vm: str, *, disk: str, ram: str = "", at: float = 0.0, **more: Any) -> Snapshot:
    memory = MemoryState(ram=ram, devices=f"{name}-devices", build=BUILD) if ram else None
    return Snapshot(
        id=name,
        vm_id=vm,
        vm_name="a",
        name=name,
        spec=VmSpec(),
        created_at=at,
        created_by="root",
        disks={"root": disk},
        memory=memory,
        **{"state": SnapshotState.COMPLETE, **more},
    )


def part(id_: str, kind: PartKind, mib: int, **more: Any) -> Part:
    return Part(id=id_, kind=kind, created_at=0.0, size=Bytes(mib * MIB), **{"digest": "d", "verified_at": 9.0, **more})


async def written(life: Life, snapshots: list[Snapshot], parts: list[Part]) -> dict[str, SnapshotView]:
    """What is seen of these rows, which are gone again afterwards: no file belongs to them."""
    records = life.engine.env.records
    draft = Draft()
    for snapshot in snapshots:
        draft.put(records.snapshots, snapshot.id, snapshot, ABSENT)
    for one in parts:
        draft.put(records.parts, one.id, one, ABSENT)
    await records.commit(draft)
    try:
        return {v.snapshot.name: v for v in (await life.engine.views.snapshots(forks=True)).items}
    finally:
        undo = Draft()
        for snapshot in snapshots:
            undo.delete(records.snapshots, snapshot.id)
        for one in parts:
            undo.delete(records.parts, one.id)
        await records.commit(undo)


PARTS = [
    part("l1", PartKind.DISK, 10, name="root"),
    part("l2", PartKind.DISK, 20, name="root", base="l1"),
    part("r", PartKind.RAM, 256, verified_at=5.0),
    *(part(f"{name}-devices", PartKind.DEVICES, 1) for name in ("moment", "one", "two")),
]


async def test_a_part_that_several_have_counts_once_and_not_to_the_moment_of_a_fork() -> None:
    async with living() as life:
        vm = (await create(life, "a")).id
        seen = await written(
            life,
            [
                row("moment", vm, disk="l1", ram="r", at=1, kind=SnapshotKind.FORK),
                row("one", vm, disk="l1", ram="r", at=2),
                row("two", vm, disk="l2", ram="r", at=3),
            ],
            PARTS,
        )
        assert {name: v.size // MIB for name, v in seen.items()} == {"moment": 1, "one": 267, "two": 21}
        assert {name: v.verified_at for name, v in seen.items()} == dict.fromkeys(seen, 5.0)


async def test_damage_below_is_damage_of_all_that_lies_over_it() -> None:
    async with living() as life:
        vm = (await create(life, "a")).id
        parts = [replace(PARTS[0], damaged="its checksum is another"), *PARTS[1:]]
        seen = await written(life, [row("one", vm, disk="l1", at=1), row("two", vm, disk="l2", at=2)], parts)
        assert {v.damaged for v in seen.values()} == {("disk root: its checksum is another",)}


async def test_what_is_missing_or_was_never_checked_is_not_called_whole() -> None:
    async with living() as life:
        vm = (await create(life, "a")).id
        parts = [replace(PARTS[0], verified_at=None, digest=""), PARTS[1]]
        seen = await written(
            life,
            [
                row("one", vm, disk="l2", at=1),
                row("two", vm, disk="lost-for-ever", at=2),
                row("new", vm, disk="to-come", at=3, state=SnapshotState.TAKING),
            ],
            parts,
        )
        assert (seen["one"].damaged, seen["one"].verified_at) == ((), None)
        assert seen["two"].damaged == ("part lost-for is not there",)
        assert (seen["new"].damaged, seen["new"].complete) == ((), False)


async def test_a_damaged_image_is_told_by_name_of_the_disk() -> None:
    async with living() as life:
        vm = await create(life, "a")
        digest = vm.spec.image or ""
        records = life.engine.env.records
        await records.images.update(digest, lambda i: replace(i, damaged="a bit is another"))
        seen = await written(
            life, [row("one", vm.id, disk="l", at=1)], [part("l", PartKind.DISK, 1, name="root", image=digest)]
        )
        assert seen["one"].damaged == ("image of root: a bit is another",)
        await records.images.update(digest, lambda i: replace(i, damaged=""))


async def test_the_last_of_a_thousand_layers_is_told_too() -> None:
    async with living() as life:
        vm = (await create(life, "a")).id
        parts = [part(f"l{n}", PartKind.DISK, 1, base=f"l{n - 1}" if n else "") for n in range(2000)]
        parts[0] = replace(parts[0], damaged="gone bad")
        seen = await written(life, [row("one", vm, disk="l1999")], parts)
        assert seen["one"].damaged == ("disk: gone bad",)


async def test_a_vm_in_the_trash_has_its_snapshots_still() -> None:
    async with living() as life:
        vm = await create(life, "a")
        await snapshot(life, "a", "clean")
        await do(life, "vm.delete", "a", VmDelete())
        assert [v.snapshot.name for v in (await life.engine.views.snapshots(vm.id)).items] == ["clean"]
