"""Boot once: who runs an image after it has booted on this host begins where it had booted."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mica.engine import boots
from mica.engine.definition import NoParams, Policy
from mica.model.errors import Code
from mica.model.operation import OperationState
from mica.model.snapshot import MachineBuild, Snapshot
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import VmCreate, VmDelete
from mica.model.vm import DiskSpec, NicSpec, Publish, VmState
from mica.testing.harness import BY, Life, Rig
from mica.testing.simulated import Behaviour
from tests.engine.worlds import do, living, refused

replace = msgspec.structs.replace

ON = Policy(reserve=512 * MIB, boot_space=4 * GIB, warm=GIB)
DISK = DiskSpec(name="data", size=Bytes(GIB))
# By then a hidden VM has booted, is frozen and gone.
BOOTED_S = 60.0


async def run(life: Life, name: str = "", **body: Any) -> str:
    """As `mica run micro` does; returns the VM's name."""
    return (await do(life, "vm.create", "", VmCreate(name=name, image="micro", start=True, **body))).target_name


async def states(life: Life) -> list[Snapshot]:
    return [row.value for row in await boots.states(life.engine.env)]


async def hidden(life: Life) -> list[str]:
    return [id_ for id_, row in (await life.records.vms.scan()).items() if row.value.hidden]


def begun(life: Life, name: str) -> bool:
    """Whether the VM began where its image had booted."""
    return life.rig.world.process(name).plan.origin is not None


async def booted(life: Life, **body: Any) -> Snapshot:
    """The state that is there after a first start."""
    await run(life, "first", **body)
    await life.advance(BOOTED_S)
    (state,) = await states(life)
    assert not begun(life, "first")
    return state


async def test_the_second_start_begins_where_the_first_had_booted() -> None:
    async with living(ON) as life:
        state = await booted(life, disks=(DISK,))
        assert (await hidden(life), await life.records.boots.scan()) == ([], {})
        body: dict[str, Any] = {"publish": (Publish(80),), "labels": {"x": "y"}, "hostname": "other", "cpu_limit": 0.5}
        name = await run(life, disks=(DISK,), **body)
        assert begun(life, name)
        vm = await life.engine.views.vm(name)
        assert (vm.observed.state, vm.image_name, vm.snapshot, vm.forked_from) == (VmState.RUNNING, "micro", "", "")
        assert (vm.labels, vm.spec.hostname, vm.spec.cpu_limit) == ({"x": "y"}, "other", 0.5)
        assert vm.spec.nics[0].publish == (Publish(80),)
        assert vm.identity, "it has become a machine of its own"
        assert vm.usage.shared == vm.spec.memory // 2, "as much as it had touched when it had booted"
        (image,) = (await life.engine.views.images()).items
        assert [(b.id, b.spec.memory, b.used_at is not None) for b in image.booted] == [(state.id, 256 * MIB, True)]
        assert image.used_by == ("first", name)
        assert image.booted[0].size > 0


async def test_nobody_sees_who_boots_it() -> None:
    async with living(ON) as life:
        life.rig.world.default = Behaviour(agent_after_s=30.0)
        await run(life, "first", nics=(NicSpec(publish=(Publish(80, 8080),)),), labels={"secret": "x"})
        await life.advance(20.0)
        (id_,) = await hidden(life)
        process = life.rig.world.process(id_)
        spec = process.plan.vm.spec
        # Nothing of whoever wanted it is in the one that all others begin at.
        assert (process.plan.vm.labels, spec.nics[0].publish, spec.hostname) == ({}, (), "boot-of-micro")
        views = life.engine.views
        assert [vm.name for vm in (await views.vms()).items] == ["first"]
        assert [name for name, _ in (await views.running()).values()] == ["first"]
        assert (await views.image("micro")).used_by == ("first",)
        assert set(await life.records.names.scan()) == {"first"}
        await life.advance(BOOTED_S)
        assert await hidden(life) == []
        assert (await views.snapshots(forks=True)).items == ()
        assert (await views.templates()).items == ()


@pytest.mark.parametrize(
    "body",
    [
        {"cpus": 2},
        {"memory": Bytes(512 * MIB)},
        {"disks": (DISK,)},
        {"nics": (NicSpec(), NicSpec(name="net1"))},
        {"nics": (NicSpec(network="none"),)},
        {"display": False},
        {"cpu_model": "Nehalem"},
    ],
)
async def test_another_shape_boots_and_gets_a_state_of_its_own(body: dict[str, Any]) -> None:
    async with living(ON) as life:
        await booted(life)
        name = await run(life, **body)
        assert not begun(life, name)
        await life.advance(BOOTED_S)
        assert len(await states(life)) == 2
        assert begun(life, await run(life, **body))
        assert begun(life, await run(life))


async def test_cold_insists_and_what_is_not_started_boots_later() -> None:
    async with living(ON) as life:
        await run(life, "first", cold=True)
        await life.advance(BOOTED_S)
        assert await states(life) == [], "whoever insists on a boot wishes for nothing"
        await run(life, "second")
        await life.advance(BOOTED_S)
        assert not begun(life, await run(life, cold=True))
        await do(life, "vm.create", "", VmCreate(name="off", image="micro"))
        assert (await life.engine.views.vm("off")).observed.state is VmState.STOPPED
        assert begun(life, await run(life))


async def test_another_qemu_boots_and_freezes_anew() -> None:
    async with living(ON) as life:
        first = await booted(life)
        life.rig.world.build = MachineBuild(qemu="newer", machine="m", cpu="c", accelerator="a")
        assert not begun(life, await run(life))
        await life.advance(BOOTED_S)
        (second,) = await states(life)
        assert second.id != first.id
        assert begun(life, await run(life))


async def test_a_new_image_of_the_same_name_boots() -> None:
    async with living(ON) as life:
        await booted(life)
        life.rig.world.add_image("micro", n=1)
        await life.advance(3700.0)
        assert not begun(life, await run(life))


async def test_an_image_is_deleted_with_its_states() -> None:
    async with living(ON) as life:
        await booted(life)
        await refused(life, Code.IN_USE, "image.delete", "micro", NoParams())
        await do(life, "vm.purge", "first", VmDelete(purge=True, force=True))
        await do(life, "image.delete", "micro", NoParams())
        await life.advance(120.0)
        assert (await states(life), life.rig.world.storage.parts) == ([], {})
        assert await life.records.boots.scan() == {}


async def test_it_stands_in_the_way_of_no_deletion_while_it_boots() -> None:
    async with living(ON) as life:
        life.rig.world.default = Behaviour(agent_after_s=None)
        await run(life, "first")
        await do(life, "vm.purge", "first", VmDelete(purge=True, force=True))
        await life.advance(20.0)
        assert len(await hidden(life)) == 1
        await do(life, "image.delete", "micro", NoParams())
        await life.advance(20.0)
        assert (await hidden(life), await states(life), await life.records.boots.scan()) == ([], [], {})


async def test_a_damaged_state_is_not_begun_at() -> None:
    async with living(ON) as life:
        state = await booted(life)
        assert state.memory is not None
        parts = life.rig.world.storage.parts
        parts[state.memory.devices].damage = "a flipped bit"
        name = await run(life)
        assert not begun(life, name), "it boots instead, although it was to begin there"
        assert (await life.engine.views.vm(name)).observed.state is VmState.RUNNING
        await life.advance(BOOTED_S)
        assert state.id not in {s.id for s in await states(life)}
        await run(life)
        await life.advance(BOOTED_S)
        assert begun(life, await run(life))


async def test_states_take_no_more_disk_than_they_may() -> None:
    async with living(replace_policy(boot_space=600 * MIB)) as life:
        size = 0
        for cpus in (1, 2, 3):
            await run(life, cpus=cpus)
            await life.advance(BOOTED_S)
            # What a simulated state takes is next to nothing: say that it were as large as its memory.
            for state in await states(life):
                assert state.memory is not None
                await life.records.parts.update(state.memory.ram, lambda p: replace(p, size=Bytes(256 * MIB)))
            if cpus == 2:  # so that the second is the one that nobody has begun at for longest
                await run(life, cpus=1)
            await life.advance(BOOTED_S)
            size = sum((await boots.sizes(life.engine.env)).values())
        assert sorted(state.spec.cpus for state in await states(life)) == [1, 3]
        assert size <= 600 * MIB


def replace_policy(**fields: Any) -> Policy:
    return Policy(**{"reserve": 512 * MIB, "boot_space": 4 * GIB, **fields})


async def test_a_guest_whose_agent_never_answers_is_given_up_and_tried_again_later() -> None:
    async with living(ON) as life:
        life.rig.world.default = Behaviour(agent_after_s=None)
        await run(life, "first")
        await life.advance(700.0)
        (row,) = (await life.records.boots.scan()).values()
        assert (row.value.vm_id, row.value.failures, row.value.why) == ("", 1, "its agent does not answer")
        assert await hidden(life) == []
        life.rig.world.default = Behaviour()
        await life.advance(700.0)
        assert len(await states(life)) == 1


async def test_a_guest_that_dies_while_it_boots_is_no_state() -> None:
    async with living(ON) as life:
        life.rig.world.default = Behaviour(agent_after_s=30.0)
        await run(life, "first")
        await life.advance(15.0)
        (id_,) = await hidden(life)
        life.rig.world.process(id_).kill()
        await life.advance(10.0)
        (row,) = (await life.records.boots.scan()).values()
        assert (row.value.failures, await hidden(life), await states(life)) == (1, [], [])


@pytest.mark.parametrize(
    "world",
    [
        {"memory": GIB + 256 * MIB, "host_used": 128 * MIB},
        {"cpus": 1},
    ],
)
async def test_a_host_with_nothing_to_spare_boots_nothing_for_nobody(world: dict[str, Any]) -> None:
    async with living(ON, **world) as life:
        life.rig.world.default = Behaviour(cpu=1.0)
        await run(life, "first")
        await life.advance(BOOTED_S)
        assert (await hidden(life), await states(life)) == ([], [])
        await do(life, "vm.purge", "first", VmDelete(purge=True, force=True))
        await life.advance(BOOTED_S)
        assert len(await states(life)) == 1


async def test_it_gives_way_to_whoever_needs_its_memory() -> None:
    async with living(ON, memory=4 * GIB, host_used=256 * MIB) as life:
        life.rig.world.default = Behaviour(agent_after_s=None)
        await run(life, "first", memory=Bytes(GIB))
        await life.advance(20.0)
        (id_,) = await hidden(life)
        await run(life, "large", memory=Bytes(2 * GIB - 256 * MIB), cold=True)
        await life.advance(10.0)
        assert id_ not in await life.records.vms.scan()
        rows = (await life.records.boots.scan()).values()
        assert all(not row.value.failures for row in rows), "that was no failure of its own"
        # And what does not fit even so is refused, without a word of somebody whom nobody knows.
        error = await refused(
            life, Code.INSUFFICIENT_MEMORY, "vm.create", "", VmCreate(image="micro", memory=Bytes(3 * GIB), start=True)
        )
        assert "boot" not in str(error)


async def test_switched_off_it_leaves_nothing() -> None:
    async with Rig(ON) as rig:
        rig.world.add_image("micro")
        async with rig.life() as life:
            await life.advance(0.1)
            await booted(life)
            await run(life, "other", cpus=2)
        rig.policy = Policy(reserve=512 * MIB)
        async with rig.life() as life:
            assert not begun(life, await run(life))
            await life.advance(200.0)
            assert (await states(life), await hidden(life), await life.records.boots.scan()) == ([], [], {})
            await life.rest()
        assert await rig.lies() == []


@pytest.mark.parametrize("after_s", [0.5, 3.5, 5.5, 6.5, 7.5, 8.5, 9.5, 11.0])
async def test_a_daemon_that_dies_on_the_way_leaves_nothing_hidden(after_s: float) -> None:
    async with Rig(ON) as rig:
        rig.world.add_image("micro")
        async with rig.life() as life:
            await life.advance(0.1)
            await run(life, "first")
            await life.advance(after_s)
        async with rig.life() as life:
            await life.advance(BOOTED_S)
            await life.rest()
            assert len(await states(life)) == 1
            assert await hidden(life) == []
            assert begun(life, await run(life))
        assert await rig.lies() == []


async def test_a_host_that_goes_down_while_it_boots_tries_again() -> None:
    async with Rig(ON) as rig:
        rig.world.add_image("micro")
        rig.world.default = Behaviour(agent_after_s=20.0)
        async with rig.life() as life:
            await life.advance(0.1)
            await run(life, "first")
            await life.advance(15.0)
            assert len(await hidden(life)) == 1
        rig.world.reboot()
        async with rig.life() as life:
            await life.advance(1500.0)
            assert len(await states(life)) == 1
            assert await hidden(life) == []
        assert await rig.lies() == []


async def test_a_state_that_is_begun_at_is_not_deleted_under_it() -> None:
    async with living(ON) as life:
        state = await booted(life)
        operation = await life.submit("vm.create", "", VmCreate(name="b", image="micro", start=True))
        await refused(life, Code.IN_USE, "snapshot.delete", state.id, NoParams())
        assert (await life.finish(operation.id)).state is OperationState.SUCCEEDED
        await do(life, "snapshot.delete", state.id, NoParams(), by=BY)
        await life.advance(120.0)
        assert begun(life, "b")
        assert state.memory is not None
        assert state.memory.ram in life.rig.world.ram_images
        await do(life, "vm.purge", "b", VmDelete(purge=True, force=True))
        await life.advance(120.0)
        assert state.memory.ram not in life.rig.world.ram_images


async def test_memory_that_nothing_maps_is_kept_for_the_next_up_to_a_bound() -> None:
    async with living(ON) as life:
        state = await booted(life)
        assert state.memory is not None
        ram = state.memory.ram
        await life.advance(120.0)
        assert ram in life.engine.env.ram.held()
        await life.records.parts.update(ram, lambda p: replace(p, size=Bytes(2 * GIB)))
        await life.advance(120.0)
        assert ram not in life.engine.env.ram.held()
        assert begun(life, await run(life)), "it is read from disk then"
