"""The life of a VM: how it stops and says so, what is pending, what dies by itself, what outlives a daemon."""

from __future__ import annotations

import asyncio
import math

import msgspec
import pytest

from mica.engine.definition import NoParams, Policy
from mica.engine.operations.stopping import REPEAT_S
from mica.engine.saga import UNDO_S
from mica.model.errors import Code, MicaError
from mica.model.operation import OperationState
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import VmCreate, VmDelete, VmSet, VmStart, VmStop
from mica.model.vm import AgentState, DiskSpec, IoLimits, NicSpec, Power, Publish, VmState
from mica.ports.hypervisor import RunState
from mica.testing.harness import BY, Rig
from mica.testing.simulated import Behaviour
from tests.engine.worlds import create, do, living, refused

DISK = DiskSpec(name="data", size=Bytes(GIB))
SLEEPY = Behaviour(agent_after_s=None, obeys_after_s=20.0)
DEAF = Behaviour(obeys_after_s=None)


# ── stopping ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("behaviour", "body", "how", "reason", "seconds"),
    [
        (Behaviour(), VmStop(), "guest", "the guest shut down after 2.0s", 2.0),
        (SLEEPY, VmStop(), "guest", "the guest shut down after 20s", 20.0),
        (SLEEPY, VmStop(timeout_s=5.0), "forced", "forced after 5.0s", 5.0),
        (DEAF, VmStop(), "forced", "forced after 30s", 30.0),
        (DEAF, VmStop(timeout_s=0), "forced", "forced", 0.0),
        (Behaviour(), VmStop(force=True), "forced", "forced", 0.0),
    ],
)
async def test_a_stop_asks_waits_forces_and_says_which(
    behaviour: Behaviour, body: VmStop, how: str, reason: str, seconds: float
) -> None:
    async with living() as life:
        life.rig.world.behave("a", behaviour)
        await create(life, "a", start=True, stop_timeout_s=30.0, disks=(DISK,))
        await life.advance(3.0)
        asked = life.rig.world.process("a")
        operation = await do(life, "vm.stop", "a", body)
        assert operation.result["how"] == how
        assert operation.result["after_s"] == pytest.approx(seconds)
        vm = await life.engine.views.vm("a")
        assert (vm.observed.state, vm.observed.reason, vm.intent) == (VmState.STOPPED, reason, Power.STOPPED)
        # A guest cannot be seen to have heard, so it is asked again for as long as it has time.
        assert asked.asked == math.ceil(seconds / REPEAT_S)
        # Only disks that QEMU closed in order need no check before the next start.
        assert (vm.id in life.rig.world.unclean) is (how == "forced")


async def test_a_guest_that_still_boots_is_asked_again() -> None:
    async with living() as life:
        life.rig.world.behave("a", Behaviour(agent_after_s=None, hears_after_s=3.0, obeys_after_s=1.0))
        await create(life, "a", start=True, stop_timeout_s=30.0, disks=(DISK,))
        asked = life.rig.world.process("a")
        operation = await do(life, "vm.stop", "a", VmStop())
        assert (operation.result["how"], asked.asked) == ("guest", 2)
        assert operation.result["after_s"] == pytest.approx(REPEAT_S + 1.0)
        assert life.rig.world.unclean == set()


async def test_a_guest_that_powers_off_while_it_is_asked_again_has_shut_down() -> None:
    async with living() as life:
        life.rig.world.behave("a", Behaviour(agent_after_s=None, obeys_after_s=REPEAT_S + 1.0))
        await create(life, "a", start=True, stop_timeout_s=30.0)
        asked = life.rig.world.process("a")
        life.rig.world.faults.fail("machine.power_button", MicaError(Code.QEMU_FAILED, "it has closed"), call=2)
        operation = await life.submit("vm.stop", "a", VmStop())
        await life.advance(REPEAT_S + 0.5)
        asked.power_off()
        ended = await life.finish(operation.id)
        assert (ended.result["how"], asked.asked) == ("guest", 1)


async def test_a_paused_guest_runs_again_for_its_shutdown() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await life.advance(3.0)
        await do(life, "vm.pause", "a", NoParams())
        assert (await do(life, "vm.stop", "a", VmStop())).result["how"] == "guest"


async def test_a_guest_whose_agent_lies_is_asked_by_the_button() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await life.advance(3.0)
        life.rig.world.faults.fail("guests.shutdown", MicaError(Code.AGENT_FAILED, "no"))
        assert (await do(life, "vm.stop", "a", VmStop())).result["how"] == "guest"
        assert "machine.power_button" in life.rig.world.faults.log


async def test_a_vm_whose_monitor_does_not_answer_can_be_stopped() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await life.advance(3.0)
        for method in ("machine.observe", "machine.kill", "machine.power_button", "hypervisor.attach"):
            life.rig.world.faults.hang(method, call=0)
        assert (await do(life, "vm.stop", "a", VmStop(timeout_s=10.0))).result["how"] == "forced"
        life.rig.world.faults.clear()


async def test_taking_a_stop_back_does_not_wait_as_long_as_a_stop_may() -> None:
    """The host does not answer while what is left of the machine is put away, in vain and then once more."""
    async with living() as life:
        await create(life, "a", start=True)
        life.rig.world.faults.fail("slices.remove")
        life.rig.world.faults.hang("slices.remove", call=2)
        operation = await life.submit("vm.stop", "a", VmStop(force=True))
        await life.advance(UNDO_S + 1.0)
        assert (await life.engine.views.operation(operation.id)).state is OperationState.STUCK
        await life.engine.resolve(operation.id, "retry", by=BY)
        await life.rest()
        assert (await life.engine.views.operation(operation.id)).state is OperationState.FAILED
        assert await life.rig.lies() == []


async def test_cancelling_a_stop_leaves_the_guest_running() -> None:
    async with living() as life:
        life.rig.world.behave("a", DEAF)
        await create(life, "a", start=True)
        await life.advance(3.0)
        operation = await life.submit("vm.stop", "a", VmStop())
        await life.advance(5.0)
        assert (await life.engine.views.vm("a")).observed.state is VmState.STOPPING
        await life.engine.cancel(operation.id, by=BY)
        assert (await life.finish(operation.id)).state is OperationState.CANCELLED
        assert (await life.engine.views.vm("a")).observed.state is VmState.RUNNING


async def test_force_stops_before_it_deletes() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await refused(life, Code.STATE_CONFLICT, "vm.delete", "a", VmDelete())
        await refused(life, Code.STATE_CONFLICT, "vm.purge", "a", VmDelete(purge=True))
        await do(life, "vm.delete", "a", VmDelete(force=True))
        assert life.rig.world.processes == {}


# ── starting ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_paused_start_holds_the_vcpus() -> None:
    async with living() as life:
        await create(life, "a")
        await do(life, "vm.start", "a", VmStart(paused=True))
        await life.advance(60.0)
        vm = await life.engine.views.vm("a")
        assert (vm.observed.state, vm.intent) == (VmState.PAUSED, Power.PAUSED)
        assert life.rig.world.process("a").run is RunState.PRELAUNCH
        await do(life, "vm.resume", "a", NoParams())
        assert (await life.engine.views.vm("a")).observed.state is VmState.RUNNING


async def test_a_start_that_fails_says_why_and_leaves_nothing() -> None:
    async with living() as life:
        await create(life, "a", disks=(DISK,))
        before = await life.rig.snapshot()
        words = MicaError(Code.QEMU_FAILED, "QEMU ended at once: could not open disk", hint="look at the log")
        life.rig.world.faults.fail("hypervisor.launch", words)
        operation = await life.run("vm.start", "a", VmStart())
        assert (operation.state, operation.problem) == (OperationState.FAILED, words.problem())
        vm = await life.engine.views.vm("a")
        assert vm.observed.reason == "it could not be started"
        assert vm.observed.problem == words.problem()
        assert await life.rig.snapshot() == before
        await do(life, "vm.start", "a", VmStart())
        assert (await life.engine.views.vm("a")).observed.problem is None


async def test_a_published_port_that_is_taken_is_named() -> None:
    async with living() as life:
        publish = (Publish(guest_port=22, host_port=2222),)
        await create(life, "a", start=True, publish=publish)
        assert (await life.engine.views.vm("a")).nics[0].publish == publish
        await create(life, "b", publish=publish)
        operation = await life.run("vm.start", "b", VmStart())
        assert operation.problem is not None
        assert operation.problem.code is Code.IN_USE
        assert "2222" in operation.problem.message
        await do(life, "vm.stop", "a", VmStop())
        await do(life, "vm.start", "b", VmStart())


async def test_a_creation_that_fails_leaves_nothing_and_its_name_is_free() -> None:
    async with living() as life:
        full = MicaError(Code.INSUFFICIENT_DISK, "no space left", hint="delete something")
        life.rig.world.faults.fail("volumes.create", full, call=2)
        two = (DISK, msgspec.structs.replace(DISK, name="more"))
        operation = await life.run("vm.create", "", VmCreate(name="a", image="micro", disks=two, start=True))
        assert (operation.state, operation.problem) == (OperationState.FAILED, full.problem())
        assert life.rig.world.volumes == {}
        await create(life, "a", disks=two, start=True)


# ── what is set ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_set_on_a_running_vm_is_live_or_pending() -> None:
    async with living() as life:
        await create(life, "a", start=True, disks=(DISK,))
        vm_id = (await life.engine.views.vm("a")).id
        limited = (msgspec.structs.replace(DISK, limits=IoLimits(iops=50)),)
        operation = await do(
            life, "vm.set", "a", VmSet(cpus=2, memory=Bytes(GIB), cpu_limit=0.5, disks=limited, autostart=True)
        )
        assert operation.result == {"pending": ["cpus", "memory"]}
        vm = await life.engine.views.vm("a")
        assert vm.pending == ("cpus", "memory")
        assert vm.running is not None
        assert (vm.spec.cpus, vm.spec.memory, vm.running.cpus) == (2, GIB, 1)
        assert vm.spec.autostart
        world = life.rig.world
        assert world.slices[vm_id].cpus == 0.5
        # The ceiling of memory stays that of the machine that runs.
        assert (world.slices[vm_id].memory or 0) < GIB
        assert world.process("a").applied.disks[0].limits.iops == 50
        await do(life, "vm.restart", "a", VmStop())
        assert (await life.engine.views.vm("a")).pending == ()
        assert world.process("a").plan.vm.spec.memory == GIB


async def test_a_device_that_is_set_while_a_vm_starts_waits_for_the_next_start() -> None:
    async with living() as life:
        await create(life, "a")
        start = await life.submit("vm.start", "a", VmStart())
        change = await life.submit("vm.set", "a", VmSet(nics=(NicSpec(), NicSpec(name="net1"))))
        assert (await life.finish(start.id)).state is OperationState.SUCCEEDED
        assert (await life.finish(change.id)).result == {"pending": ["nics"]}
        await do(life, "vm.restart", "a", VmStop())
        assert [n.name for n in (await life.engine.views.vm("a")).nics] == ["net0", "net1"]


async def test_labels_and_description_are_never_pending() -> None:
    async with living() as life:
        await create(life, "a", start=True, labels={"a": "1", "b": "2"})
        await do(life, "vm.set", "a", VmSet(labels={"a": None, "c": "3"}, description="d", name="z"))
        vm = await life.engine.views.vm("z")
        assert (vm.labels, vm.description, vm.pending) == ({"b": "2", "c": "3"}, "d", ())


# ── what happens by itself ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_guest_that_powers_off_by_itself_is_stopped_and_not_started_again() -> None:
    async with living() as life:
        life.rig.world.behave("a", Behaviour(power_off_after_s=60.0))
        await create(life, "a", start=True)
        await life.advance(59.0)
        assert (await life.engine.views.vm("a")).observed.state is VmState.RUNNING
        await life.advance(2.0)
        vm = await life.engine.views.vm("a")
        assert (vm.observed.state, vm.observed.reason) == (VmState.STOPPED, "the guest powered off")
        assert (vm.intent, vm.observed.problem, vm.process) == (Power.RUNNING, None, None)


async def test_a_qemu_that_is_killed_is_told_as_a_crash_with_its_last_words() -> None:
    async with living() as life:
        await create(life, "a", start=True, disks=(DISK,))
        vm_id = (await life.engine.views.vm("a")).id
        life.rig.world.process("a").kill("qemu: fatal: boo")
        await life.rest()
        seen = (await life.engine.views.vm("a")).observed
        assert seen.state is VmState.CRASHED
        assert seen.problem is not None
        assert "boo" in seen.problem.message
        assert "mica vm start" in seen.problem.hint
        assert life.rig.world.checked == []
        await do(life, "vm.start", "a", VmStart())
        assert life.rig.world.checked == [vm_id]


async def test_a_guest_that_qemu_pauses_by_itself_is_shown_so_with_the_reason() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        life.rig.world.process("a").pause("io-error")
        await life.rest()
        seen = (await life.engine.views.vm("a")).observed
        assert (seen.state, seen.reason) == (VmState.PAUSED, "io-error")
        await do(life, "vm.resume", "a", NoParams())


async def test_the_agent_is_seen_when_it_comes_and_goes_and_its_facts_are_shown() -> None:
    async with living() as life:
        life.rig.world.behave("a", Behaviour(agent_after_s=4.0))
        await create(life, "a", start=True)
        assert (await life.engine.views.vm("a")).observed.agent is AgentState.WAITING
        await life.advance(4.1)
        assert (await life.engine.views.vm("a")).observed.agent is AgentState.READY
        await life.advance(2.1)
        seen = (await life.engine.views.vm("a")).observed
        assert (seen.hostname, seen.os, seen.addresses) == ("a", "Simulated GNU/Linux 1", ("10.0.0.2",))
        life.rig.world.process("a").close_agent()
        await life.quiet()
        assert (await life.engine.views.vm("a")).observed.agent is AgentState.WAITING
        assert life.rig.world.ports_told == [True, False] or life.rig.world.ports_told == [False, True, False]


async def test_an_ephemeral_vm_is_gone_when_it_has_ended() -> None:
    async with living() as life:
        for name, behaviour in (("a", Behaviour(power_off_after_s=5.0)), ("b", Behaviour(killed_after_s=5.0))):
            life.rig.world.behave(name, behaviour)
            await create(life, name, start=True, ephemeral=True)
        await create(life, "never-started", ephemeral=True)
        await create(life, "stopped", start=True, ephemeral=True)
        await do(life, "vm.stop", "stopped", VmStop())
        await life.advance(100.0)
        assert sorted(v.name for v in (await life.engine.views.vms()).items) == ["never-started", "stopped"]


async def test_an_ephemeral_vm_is_gone_though_the_daemon_died_at_its_end() -> None:
    async with Rig() as rig:
        rig.world.add_image()
        async with rig.life() as life:
            await life.advance(1.0)
            await create(life, "a", start=True, ephemeral=True)
            life.rig.world.process("a").power_off()
            # It has seen the end, and is killed before it could ask for the purge.
            await life.until(lambda: _is(life.rig, VmState.STOPPED))
            life.store.crashed = True
        async with rig.life() as life:
            await life.advance(30.0)
            await life.rest()
        assert await rig.records.vms.scan() == {}
        assert await rig.lies() == []


async def _is(rig: Rig, state: VmState) -> bool:
    return all(s.value.observed.state is state for s in (await rig.records.statuses.scan()).values())


# ── over the death of a daemon ────────────────────────────────────────────────────────────────────────────────────


async def test_vms_live_on_without_a_daemon_and_are_adopted() -> None:
    async with Rig() as rig:
        rig.world.add_image()
        async with rig.life() as life:
            await life.advance(1.0)
            for name in "abcd":
                await create(life, name, start=True)
            await do(life, "vm.pause", "b", NoParams())
            pids = {p.plan.vm.name: p.ref for p in rig.world.processes.values()}
        rig.world.process("c").power_off()
        rig.world.process("d").kill()
        async with rig.life() as life:
            await life.advance(0.1)
            seen = {v.name: v for v in (await life.engine.views.vms()).items}
            assert {n: v.observed.state for n, v in seen.items()} == {
                "a": VmState.RUNNING,
                "b": VmState.PAUSED,
                "c": VmState.STOPPED,
                "d": VmState.CRASHED,
            }
            assert (seen["a"].process, seen["b"].process) == (pids["a"], pids["b"])
            assert seen["c"].observed.reason == "the guest powered off while no daemon was watching"
            assert "while no daemon was watching" in seen["d"].observed.reason
            await do(life, "vm.stop", "a", VmStop())
        assert await rig.lies() == []


async def test_a_daemon_that_is_told_to_end_leaves_what_one_that_is_killed_leaves() -> None:
    async with Rig() as rig:
        rig.world.add_image()
        rig.world.behave("a", SLEEPY)
        async with rig.life() as life:
            await life.advance(1.0)
            await create(life, "a", start=True)
            stop = await life.submit("vm.stop", "a", VmStop())
            await life.advance(1.0)
            before = await rig.store.revision()
        assert await rig.store.revision() == before
        async with rig.life() as life:
            ended = await life.finish(stop.id)
            assert (ended.state, ended.result["how"]) == (OperationState.SUCCEEDED, "guest")


async def test_a_stop_that_a_dead_daemon_had_begun_finds_the_guest_down() -> None:
    async with Rig() as rig:
        rig.world.add_image()
        async with rig.life() as life:
            await life.advance(1.0)
            await create(life, "a", start=True, disks=(DISK,))
            stop = await life.submit("vm.stop", "a", VmStop())
            await life.advance(1.0)
        rig.world.process("a").power_off()
        async with rig.life() as life:
            ended = await life.finish(stop.id)
            assert (ended.state, ended.result["how"]) == (OperationState.SUCCEEDED, "already")
            assert (await life.engine.views.vm("a")).observed.state is VmState.STOPPED
            # QEMU ended in order, whoever saw it.
            assert rig.world.unclean == set()


async def test_the_host_goes_down_under_everything() -> None:
    async with Rig(Policy(reserve=512 * MIB)) as rig:
        rig.world.add_image()
        async with rig.life() as life:
            await life.advance(1.0)
            await create(life, "a", start=True, disks=(DISK,))
            await create(life, "b", start=True, autostart=True)
            await create(life, "c", autostart=True)
            await create(life, "d")
            start = await life.submit("vm.start", "d", VmStart())
        rig.world.reboot()
        async with rig.life() as life:
            await life.advance(10.0)
            await life.rest()
            states = {v.name: v.observed.state for v in (await life.engine.views.vms()).items}
            # What was asked for is finished; what ran is told as it is; autostart brings up what is to run.
            assert (await life.engine.views.operation(start.id)).state is OperationState.SUCCEEDED
            assert states == {
                "a": VmState.CRASHED,
                "b": VmState.RUNNING,
                "c": VmState.RUNNING,
                "d": VmState.RUNNING,
            }
        assert await rig.lies() == []


@pytest.mark.parametrize("turns", range(0, 120, 4))
async def test_a_daemon_can_end_at_any_moment_of_a_start(turns: int) -> None:
    async with Rig() as rig:
        rig.world.add_image()
        async with rig.life() as life:
            await life.advance(1.0)
            await create(life, "a")
            async with asyncio.timeout(10.0):
                start = await life.submit("vm.start", "a", VmStart())
                for _ in range(turns):
                    await asyncio.sleep(0)
        async with asyncio.timeout(10.0), rig.life() as life:
            assert (await life.finish(start.id)).state is OperationState.SUCCEEDED
        assert await rig.lies() == []
