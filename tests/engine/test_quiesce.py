"""A guest whose file systems are frozen for a snapshot thaws, whatever happens in between."""

from __future__ import annotations

import pytest

from mica.engine.definition import NoParams
from mica.engine.operations.quiescing import FREEZE_S
from mica.engine.operations.snapshot_create import Take
from mica.engine.operations.snapshot_restore import Revert
from mica.model.errors import Code
from mica.model.operation import Operation, OperationState
from mica.model.snapshot import Snapshot
from mica.model.views import VmStart
from mica.testing.harness import BY, Hooks, Life, Rig, instrument
from mica.testing.simulated import Behaviour
from mica.testing.store_faults import Crash
from tests.engine.worlds import create, do, living, refused

QUIESCED = Take(name="s", quiesce=True)


async def running(life: Life, **guest: float | None) -> str:
    life.rig.world.behave("a", Behaviour(**{"agent_after_s": 0.2, **guest}))  # type: ignore[arg-type]
    vm = await create(life)
    await do(life, "vm.start", "a", VmStart())
    await life.advance(1.0)
    return vm.id


async def snapshots(life: Life) -> list[Snapshot]:
    return [row.value for row in (await life.records.snapshots.scan()).values()]


async def owed(life: Life, vm_id: str) -> str:
    return (await life.records.statuses.need(vm_id)).value.frozen


@pytest.mark.parametrize("memory", [True, False])
async def test_the_guest_is_frozen_while_it_is_captured_and_not_longer(memory: bool) -> None:
    async with living() as life:
        vm_id = await running(life)
        seen: list[bool] = []
        world = life.rig.world
        world.faults.do("machine.pause", lambda: seen.append(world.process("a").frozen))
        ended = await do(life, "snapshot.create", "a", Take(name="s", quiesce=True, memory=memory))
        assert seen == [True]
        assert (ended.result["frozen"], ended.result["thawed"]) == (0, True)
        assert not world.process("a").frozen
        assert await owed(life, vm_id) == ""
        (snapshot,) = await snapshots(life)
        assert snapshot.quiesced


async def test_a_stopped_guest_needs_no_freezing() -> None:
    async with living() as life:
        await create(life)
        ended = await do(life, "snapshot.create", "a", QUIESCED)
        assert ended.result["frozen"] is None
        assert life.rig.world.faults.calls["guests.freeze"] == 0
        assert [s.quiesced for s in await snapshots(life)] == [False]


async def test_a_paused_guest_cannot_freeze() -> None:
    async with living() as life:
        await running(life)
        await do(life, "vm.pause", "a", NoParams())
        error = await refused(life, Code.STATE_CONFLICT, "snapshot.create", "a", QUIESCED)
        assert "mica vm resume a" in error.hint


async def failed(life: Life) -> Operation:
    """The snapshot fails with nothing half done, and the VM goes on."""
    ended = await life.run("snapshot.create", "a", QUIESCED)
    assert ended.state is OperationState.FAILED
    assert await snapshots(life) == []
    assert life.rig.world.process("a").run == "running"
    return ended


async def test_without_an_agent_that_answers_there_is_no_snapshot() -> None:
    async with living() as life:
        vm_id = await running(life, agent_after_s=None)
        ended = await failed(life)
        assert ended.problem is not None
        assert ended.problem.code is Code.AGENT_UNAVAILABLE
        assert "could not be frozen" in ended.problem.message
        # Nobody knows what the guest has heard: it is asked to thaw as soon as it can be.
        assert await owed(life, vm_id) != ""
        life.rig.world.process("a").open_agent()
        await life.advance(5.0)
        assert await owed(life, vm_id) == ""


async def test_an_agent_that_never_answers_ends_the_snapshot_in_time() -> None:
    async with living() as life:
        vm_id = await running(life)
        life.rig.world.faults.hang("guests.freeze", after=True)
        began = life.rig.clock.monotonic()
        ended = await failed(life)
        assert ended.problem is not None
        assert ended.problem.code is Code.TIMEOUT
        assert FREEZE_S <= life.rig.clock.monotonic() - began < FREEZE_S + 5.0
        assert not life.rig.world.process("a").frozen
        assert await owed(life, vm_id) == ""


async def test_a_guest_that_does_not_thaw_at_once_is_asked_until_it_does() -> None:
    async with living() as life:
        vm_id = await running(life)
        life.rig.world.faults.fail("guests.thaw", call=0)
        ended = await do(life, "snapshot.create", "a", QUIESCED)
        assert ended.result["thawed"] is False
        assert await owed(life, vm_id) == ended.id
        assert life.rig.world.process("a").frozen
        again = await life.run("snapshot.create", "a", Take(name="t", quiesce=True))
        assert again.problem is not None
        assert (again.problem.code, again.problem.retryable) == (Code.STATE_CONFLICT, True)
        life.rig.world.faults.clear()
        await life.advance(30.0)
        assert not life.rig.world.process("a").frozen
        assert await owed(life, vm_id) == ""
        await do(life, "snapshot.create", "a", Take(name="u", quiesce=True))


@pytest.mark.parametrize("step", ["quiesce", "hold", "go-on", "thaw", "keep", "save"])
async def test_a_daemon_that_dies_in_between_leaves_no_guest_frozen(step: str) -> None:
    async with Rig() as rig:
        rig.world.add_image("micro")
        lives: list[Life] = []

        async def die(name: str, _: object) -> None:
            if name == step:
                lives[0].store.crashed = True
                raise Crash("in a step")

        async with rig.life() as life:
            await life.advance(0.1)
            await running(life)
        for moment in ("before_do", "after_do"):
            rig.crashes = 0
            lives.clear()
            hooks = Hooks(**{moment: die})
            async with rig.life(definitions=instrument("snapshot.create", hooks)) as life:
                lives.append(life)
                operation = await life.submit("snapshot.create", "a", Take(name=moment.replace("_", "-"), quiesce=True))
                await life.finish(operation.id)
            assert rig.crashes == 1
            async with rig.life() as life:
                ended = await life.finish(operation.id)
                assert ended.state is OperationState.SUCCEEDED, ended.problem
            assert not rig.world.process("a").frozen
            assert await rig.lies() == []


async def test_cancelling_while_it_freezes_thaws() -> None:
    async with living() as life:
        vm_id = await running(life)
        life.rig.world.faults.hang("guests.freeze", after=True)
        operation = await life.submit("snapshot.create", "a", QUIESCED)
        await life.quiet()
        assert life.rig.world.process("a").frozen
        await life.engine.cancel(operation.id, by=BY)
        ended = await life.finish(operation.id)
        assert ended.state is OperationState.CANCELLED
        assert not life.rig.world.process("a").frozen
        assert await owed(life, vm_id) == ""
        assert await snapshots(life) == []


async def test_a_machine_that_goes_back_to_a_quiesced_moment_thaws() -> None:
    async with living() as life:
        vm_id = await running(life)
        await do(life, "snapshot.create", "a", QUIESCED)
        (snapshot,) = await snapshots(life)
        await do(life, "snapshot.restore", "a", Revert(snapshot=snapshot.id))
        await life.advance(5.0)
        assert life.rig.world.faults.calls["guests.thaw"] >= 2
        assert not life.rig.world.process("a").frozen
        assert await owed(life, vm_id) == ""
