"""Templates: VMs frozen under a name of their own, which outlive them and which others begin at."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mica.engine.definition import NoParams
from mica.engine.operations.snapshot_create import Take
from mica.model.errors import Code, MicaError
from mica.model.image import ImportRecipe, MicroRecipe
from mica.model.operation import OperationState
from mica.model.snapshot import SnapshotKind
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import ImageMake, SnapshotSet, SnapshotView, VmCreate, VmDelete
from mica.model.vm import DiskSpec, Machine, NicSpec, Publish, VmState
from mica.testing.harness import Life
from tests.engine.worlds import create, do, living, refused

DISK = DiskSpec(name="data", size=Bytes(GIB))


async def template(life: Life, vm: str = "a", name: str = "golden", **how: Any) -> SnapshotView:
    await do(life, "snapshot.create", vm, Take(kind=SnapshotKind.TEMPLATE, name=name, **how))
    return await life.engine.views.template(name or vm)


async def running(life: Life, name: str = "a", **body: Any) -> None:
    await create(life, name, start=True, disks=(DISK,), **body)
    await life.advance(5.0)


def write(life: Life, word: str) -> None:
    """The guest of ``a`` writes to its memory and to its disk."""
    process = life.rig.world.process("a")
    process.memory.append(word)
    life.rig.world.write(process.vm_id, "data", word)


async def test_a_template_has_a_name_of_its_own_and_is_no_past_of_its_vm() -> None:
    async with living() as life:
        await running(life)
        made = await template(life, description="as installed")
        assert (made.memory, made.complete, made.current, made.forks) == (True, True, False, ())
        views = life.engine.views
        assert [v.snapshot.name for v in (await views.templates()).items] == ["golden"]
        assert await views.template(made.snapshot.id[:8]) == made
        assert (await views.snapshots("a", forks=True)).items == ()
        assert (await views.vm("a")).snapshot == ""
        with pytest.raises(MicaError) as caught:
            await views.snapshot("a", "golden")
        assert caught.value.code is Code.NOT_FOUND


async def test_what_is_run_from_it_is_a_copy_of_it_memory_and_all() -> None:
    async with living() as life:
        await running(life, publish=(Publish(80, 8080),), labels={"x": "y"})
        write(life, "kept")
        made = await template(life)
        write(life, "after")
        await do(life, "vm.create", "", VmCreate(image="golden", name="b", start=True, publish=(Publish(22),)))
        copy = await life.engine.views.vm("b")
        assert life.rig.world.process("b").memory == ["kept"]
        assert life.rig.world.content(copy.id, "data") == ("kept",)
        assert (copy.forked_from, copy.image_name, copy.snapshot) == ("golden", "micro", made.snapshot.id)
        assert (copy.labels, copy.spec.nics[0].publish) == ({}, (Publish(22),))
        nameless = await do(life, "vm.create", "", VmCreate(image="golden", start=True))
        assert nameless.target_name == "golden-1"
        assert (await life.engine.views.template("golden")).forks == ("b", "golden-1")


async def test_it_outlives_its_vm_and_holds_its_image() -> None:
    async with living() as life:
        await running(life)
        write(life, "kept")
        await template(life)
        await do(life, "vm.purge", "a", VmDelete(purge=True, force=True))
        await life.advance(120.0)  # whoever reaps has been there
        error = await refused(life, Code.IN_USE, "image.delete", "micro", NoParams())
        assert "template golden" in error.message
        await do(life, "vm.create", "", VmCreate(image="golden", name="b", start=True))
        assert life.rig.world.process("b").memory == ["kept"]
        made = await life.engine.views.template("golden")
        assert (made.damaged, made.forks) == ((), ("b",))
        await do(life, "snapshot.delete", made.snapshot.id, NoParams())
        assert (await life.engine.views.templates()).items == ()
        assert (await life.engine.views.vm("b")).snapshot == ""
        await do(life, "vm.purge", "b", VmDelete(purge=True, force=True))
        await life.advance(120.0)
        assert not life.rig.world.storage.parts
        await do(life, "image.delete", "micro", NoParams())


async def test_one_of_a_stopped_vm_boots_and_may_be_of_another_size() -> None:
    async with living() as life:
        vm = await create(life, "a", disks=(DISK,))
        life.rig.world.write(vm.id, "data", "installed")
        assert not (await template(life)).memory
        body = VmCreate(image="golden", name="b", start=True, cpus=2, memory=Bytes(512 * MIB))
        await do(life, "vm.create", "", body)
        copy = await life.engine.views.vm("b")
        assert (copy.spec.cpus, copy.spec.memory) == (2, 512 * MIB)
        assert (copy.observed.state, copy.usage.shared) == (VmState.RUNNING, None)
        assert life.rig.world.content(copy.id, "data") == ("installed",)


@pytest.mark.parametrize(
    ("option", "body"),
    [
        ("--cpus", {"cpus": 2}),
        ("--memory", {"memory": Bytes(512 * MIB)}),
        ("--disk", {"disk": Bytes(GIB)}),
        ("--disk", {"disks": (DISK,)}),
        ("--network", {"nics": (NicSpec(),)}),
        ("--machine", {"machine": Machine.MINIMAL}),
        ("--no-display", {"display": False}),
    ],
)
async def test_what_is_in_its_memory_cannot_differ(option: str, body: dict[str, Any]) -> None:
    async with living() as life:
        await running(life)
        await template(life)
        error = await refused(life, Code.INVALID, "vm.create", "", VmCreate(image="golden", start=True, **body))
        assert error.message == f"{option} cannot differ from what template golden has"
        same: dict[str, Any] = {"cpus": 1, "memory": Bytes(256 * MIB)}
        await do(life, "vm.create", "", VmCreate(image="golden", start=True, **same))


async def test_a_name_means_one_thing() -> None:
    async with living() as life:
        await running(life)
        await template(life)

        def take(name: str) -> Take:
            return Take(kind=SnapshotKind.TEMPLATE, name=name)

        for name in ("golden", "micro", "debian"):  # a template, an image, one that is built when it is asked for
            await refused(life, Code.EXISTS, "snapshot.create", "a", take(name))
        await refused(life, Code.INVALID, "snapshot.create", "a", take("Not A Name"))
        await refused(life, Code.EXISTS, "image.make", "", ImageMake(ImportRecipe("golden", "/disk.raw")))
        # Snapshots have their names within their VM.
        await do(life, "snapshot.create", "a", Take(name="golden"))
        assert (await template(life, name="")).snapshot.name == "a"
        await do(life, "snapshot.create", "a", take(""))
        assert [v.snapshot.name for v in (await life.engine.views.templates()).items] == ["a", "a-2", "golden"]


async def test_an_image_comes_before_a_template_of_its_name() -> None:
    async with living() as life:
        await running(life)
        made = await template(life)
        # As by an image that was being built while the template was made.
        life.rig.world.add_image("golden")
        await life.advance(3700.0)
        await do(life, "vm.create", "", VmCreate(image="golden", name="b"))
        assert (await life.engine.views.vm("b")).snapshot != made.snapshot.id


async def test_it_is_renamed_described_and_protected() -> None:
    async with living() as life:
        await running(life)
        id_ = (await template(life)).snapshot.id
        await template(life, name="other")
        for name in ("other", "micro"):
            await refused(life, Code.EXISTS, "snapshot.set", id_, SnapshotSet(name=name))
        operation = await do(life, "snapshot.set", id_, SnapshotSet(name="fresh", description="d", protected=True))
        assert operation.target_name == "golden"
        seen = (await life.engine.views.template("fresh")).snapshot
        assert (seen.id, seen.description, seen.protected) == (id_, "d", True)
        error = await refused(life, Code.PROTECTED, "snapshot.delete", id_, NoParams())
        assert error.hint == "`mica template set fresh --no-protected` lifts that"
        await do(life, "vm.create", "", VmCreate(image="fresh", name="b", start=True))
        await refused(life, Code.NOT_FOUND, "vm.create", "", VmCreate(image="golden", start=True))
        await do(life, "snapshot.set", id_, SnapshotSet(protected=False))
        await do(life, "snapshot.delete", id_, NoParams())
        assert (await template(life, name="fresh")).snapshot.id != id_


async def test_a_damaged_one_is_refused_by_name() -> None:
    async with living() as life:
        await running(life)
        made = (await template(life)).snapshot
        part = made.disks["data"]
        await life.records.parts.update(part, lambda p: msgspec.structs.replace(p, damaged="its checksum is another"))
        error = await refused(life, Code.CORRUPT, "vm.create", "", VmCreate(image="golden", start=True))
        assert error.message.startswith("template golden is damaged: disk data: ")


async def test_a_snapshot_that_is_the_last_good_one_may_go_for_all_that_templates_say() -> None:
    async with living() as life:
        await running(life)
        made = (await template(life)).snapshot
        await do(life, "snapshot.create", "a", Take(name="clean"))
        part = made.memory.devices if made.memory else ""
        await life.records.parts.update(part, lambda p: msgspec.structs.replace(p, damaged="gone"))
        clean = await life.engine.views.snapshot("a", "clean")
        await do(life, "snapshot.delete", clean.snapshot.id, NoParams())


async def test_an_image_that_is_built_again_takes_no_name_of_a_template() -> None:
    async with living() as life:
        await running(life)
        await template(life)
        operation = await life.run("image.make", "", ImageMake(MicroRecipe()))
        assert operation.state is OperationState.SUCCEEDED
