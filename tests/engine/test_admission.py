"""May this start, and if not, what would make it start."""

from __future__ import annotations

import asyncio

import pytest

from mica.engine.admission import Candidate, Ways, admit, room
from mica.engine.definition import Policy
from mica.engine.records import Ledger, Reservation
from mica.model.errors import Code, MicaError
from mica.model.operation import OperationState
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import VmCreate, VmSet, VmStart, VmStop
from mica.model.vm import VmSpec
from mica.ports.host import Capacity
from tests.engine.worlds import create, do, living, refused

RESERVE = 512 * MIB


def capacity(memory: int = 8 * GIB, *, used: int = GIB, cpus: int = 4) -> Capacity:
    return Capacity(cpus, Bytes(memory), Bytes(memory - used), Bytes(GIB))


def reservation(ram: int, overhead: int = 100 * MIB) -> Reservation:
    return Reservation(Bytes(ram), Bytes(overhead))


def ask(
    memory: int,
    host: Capacity,
    ledger: dict[str, Reservation] | None = None,
    running: list[Candidate] | None = None,
    *,
    cpus: int = 1,
    overcommit: bool = False,
) -> None:
    spec = VmSpec(memory=Bytes(memory), cpus=cpus)
    book = Ledger(ledger or {})
    admit("web", spec, reservation(memory), host, book, running or [], reserve=RESERVE, overcommit=overcommit)


def refusal(*args: object, **how: object) -> MicaError:
    with pytest.raises(MicaError) as caught:
        ask(*args, **how)  # type: ignore[arg-type]
    return caught.value


def test_the_last_byte_is_admitted_and_the_one_beyond_it_is_not() -> None:
    free = 8 * GIB - GIB - RESERVE - 100 * MIB
    ask(free, capacity())
    error = refusal(free + MIB, capacity())
    assert error.code is Code.INSUFFICIENT_MEMORY


def test_the_message_names_the_numbers_and_the_ways_out() -> None:
    idle = Candidate("id-1", "build-3", Bytes(4 * GIB), Bytes(4 * GIB), 6 * 86400.0)
    busy = Candidate("id-2", "db", Bytes(2 * GIB), Bytes(2 * GIB))
    ledger = {"id-1": reservation(4 * GIB - 100 * MIB), "id-2": reservation(2 * GIB - 100 * MIB)}
    error = refusal(4 * GIB, capacity(used=7 * GIB), ledger, [busy, idle])
    assert error.message == (
        "web needs 4.1 GiB (4 GiB of RAM, 100 MiB for QEMU); 512 MiB of 8 GiB is free for VMs "
        "(512 MiB is kept for the host)"
    )
    ways = error.hint.split("; ")
    assert ways[0] == "it would start with 412 MiB (`--memory 412M`)"
    assert ways[1] == "stopping build-3 (4 GiB, idle 6d) would make it fit"
    assert ways[2] == "`--overcommit` insists"
    assert error.details["need"] == 4 * GIB + 100 * MIB
    assert error.details["free"] == 512 * MIB
    assert [c["name"] for c in error.details["candidates"]] == ["db", "build-3"]


def test_the_way_out_by_less_memory_is_one_that_is_admitted() -> None:
    host = capacity()
    error = refusal(16 * GIB, host)
    suggested = int(error.hint.split("--memory ")[1].split("M")[0]) * MIB
    ask(suggested, host)
    assert refusal(suggested + MIB, host).code is Code.INSUFFICIENT_MEMORY


def test_stopping_is_not_offered_when_all_together_do_not_suffice() -> None:
    small = Candidate("id", "tiny", Bytes(GIB), Bytes(GIB), 100.0)
    error = refusal(32 * GIB, capacity(used=2 * GIB), {"id": reservation(GIB - 100 * MIB)}, [small])
    assert "stopping" not in error.hint


def test_what_was_promised_and_not_touched_yet_is_not_free() -> None:
    """The host counts it as available, but it was promised."""
    host = capacity(used=GIB)
    ledger = {"id": reservation(5 * GIB)}
    untouched = [Candidate("id", "new", Bytes(5 * GIB + 100 * MIB), Bytes(0))]
    left = room(host, Ledger(ledger), untouched, RESERVE)
    assert left.free == 7 * GIB - RESERVE - (5 * GIB + 100 * MIB)
    assert refusal(2 * GIB, host, ledger, untouched).code is Code.INSUFFICIENT_MEMORY


def test_overcommit_insists_on_memory_and_on_processors() -> None:
    ask(16 * GIB, capacity(), overcommit=True)
    error = refusal(GIB, capacity(), cpus=5)
    assert error.code is Code.INSUFFICIENT_CPU
    assert error.message == "web has 5 vCPUs and this host has 4 processors"
    assert "--cpus 4" in error.hint
    ask(GIB, capacity(), cpus=5, overcommit=True)


def test_a_vm_that_has_not_touched_what_it_was_promised_could_do_with_less() -> None:
    """What is offered would make it fit: 4.1 GiB are wanted, 1 GiB is free, and 3.1 GiB are taken from one of 6 GiB."""
    large = Candidate("id", "large", Bytes(6 * GIB + 100 * MIB), Bytes(2 * GIB), 100.0)
    ledger = {"id": reservation(6 * GIB)}
    host = capacity(used=2 * GIB)
    error = refusal(4 * GIB, host, ledger, [large])
    assert (
        "less memory for large (2 GiB of 6.1 GiB touched) would make it fit: `mica vm set large --memory " in error.hint
    )
    left = int(error.hint.partition("vm set large --memory ")[2].partition("M")[0]) * MIB
    ask(4 * GIB, host, {"id": reservation(left)}, [large])
    assert refusal(4 * GIB, host, {"id": reservation(left + MIB)}, [large]).code is Code.INSUFFICIENT_MEMORY
    unseen = Candidate("id", "large", Bytes(6 * GIB + 100 * MIB), Bytes(0))
    assert "less memory for" not in refusal(4 * GIB, host, ledger, [unseen]).hint
    full = Candidate("id", "large", Bytes(6 * GIB + 100 * MIB), Bytes(6 * GIB), 100.0)
    assert "less memory for" not in refusal(4 * GIB, capacity(used=6 * GIB), ledger, [full]).hint


def test_the_ways_out_are_those_of_whoever_asked() -> None:
    def hint(ways: Ways, *, cpus: int = 1) -> str:
        spec = VmSpec(memory=Bytes(16 * GIB), cpus=cpus)
        with pytest.raises(MicaError) as caught:
            admit("web", spec, reservation(16 * GIB), capacity(), Ledger({}), [], reserve=RESERVE, ways=ways)
        return caught.value.hint

    assert "(`mica vm set web --memory " in hint(Ways("mica vm set web "))
    assert "`mica vm set web --cpus 4`" in hint(Ways("mica vm set web "), cpus=5)
    for cpus in (1, 5):  # what goes on with its memory is as large as that
        assert hint(Ways(change=None), cpus=cpus) == "`--overcommit` insists"
    assert hint(Ways(insist="this insists"), cpus=5).endswith("; this insists")


async def test_a_start_that_does_not_fit_touches_nothing() -> None:
    async with living() as life:
        await create(life, "a", memory=Bytes(16 * GIB))
        before = await life.rig.snapshot()
        await refused(life, Code.INSUFFICIENT_MEMORY, "vm.start", "a", VmStart())
        assert await life.rig.snapshot() == before
        await refused(
            life, Code.INSUFFICIENT_MEMORY, "vm.create", "", VmCreate(image="micro", memory=Bytes(16 * GIB), start=True)
        )
        assert await life.rig.snapshot() == before


async def test_two_starts_never_both_take_the_last_memory() -> None:
    async with living(memory=4 * GIB) as life:
        for name in ("a", "b"):
            await create(life, name, memory=Bytes(1536 * MIB))
        accepted, refusals = [], []
        # Both are judged before either has been written: the second commit loses and is judged anew.
        life.rig.world.faults.slow("hypervisor.check", 1.0)

        async def start(name: str) -> None:
            try:
                accepted.append(await life.submit("vm.start", name, VmStart()))
            except MicaError as error:
                refusals.append(error)

        async with asyncio.TaskGroup() as group:
            group.create_task(start("a"))
            group.create_task(start("b"))
            group.create_task(life.advance(5.0))
        assert len(accepted) == 1
        assert [e.code for e in refusals] == [Code.INSUFFICIENT_MEMORY]
        # By its name, though nobody has looked at it yet.
        assert accepted[0].target_name
        assert f"stopping {accepted[0].target_name} (" in refusals[0].hint
        life.rig.world.faults.clear()
        await life.rest()
        assert len(life.rig.world.processes) == 1


async def test_what_is_refused_at_its_creation_is_told_without_naming_what_is_not_there() -> None:
    async with living(memory=4 * GIB) as life:
        error = await refused(
            life, Code.INSUFFICIENT_MEMORY, "vm.create", "", VmCreate(name="a", memory=Bytes(5 * GIB), start=True)
        )
        assert "(`--memory " in error.hint
        assert "mica vm set" not in error.hint
        await create(life, "b", memory=Bytes(5 * GIB))
        assert (
            "(`mica vm set b --memory "
            in (await refused(life, Code.INSUFFICIENT_MEMORY, "vm.start", "b", VmStart())).hint
        )


async def test_overcommit_starts_what_was_refused() -> None:
    async with living(memory=4 * GIB) as life:
        await create(life, "a", memory=Bytes(5 * GIB))
        await refused(life, Code.INSUFFICIENT_MEMORY, "vm.start", "a", VmStart())
        await do(life, "vm.start", "a", VmStart(overcommit=True))


async def test_the_name_and_idleness_of_a_candidate_are_what_was_sampled() -> None:
    async with living(memory=4 * GIB) as life:
        await create(life, "sleeper", memory=Bytes(2 * GIB), start=True)
        await create(life, "b", memory=Bytes(2 * GIB))
        await life.advance(3 * 60.0)
        error = await refused(life, Code.INSUFFICIENT_MEMORY, "vm.start", "b", VmStart())
        assert "stopping sleeper (2.1 GiB, idle 3m" in error.hint or "stopping sleeper (2.1 GiB, idle 2m" in error.hint


async def test_a_stop_makes_room_and_an_accepted_start_keeps_its_own() -> None:
    async with living(memory=4 * GIB) as life:
        await create(life, "a", memory=Bytes(2 * GIB), start=True)
        await create(life, "b", memory=Bytes(2 * GIB))
        stop = await life.submit("vm.stop", "a", VmStop())
        again = await life.submit("vm.start", "a", VmStart())
        # While it goes down and comes up again, its memory is not anybody else's.
        await refused(life, Code.INSUFFICIENT_MEMORY, "vm.start", "b", VmStart())
        assert (await life.finish(stop.id)).state is OperationState.SUCCEEDED
        await refused(life, Code.INSUFFICIENT_MEMORY, "vm.start", "b", VmStart())
        assert (await life.finish(again.id)).state is OperationState.SUCCEEDED
        await do(life, "vm.stop", "a", VmStop())
        await do(life, "vm.start", "b", VmStart())


async def test_a_restart_with_more_memory_is_admitted_too() -> None:
    async with living(memory=4 * GIB) as life:
        await create(life, "a", memory=Bytes(GIB), start=True)
        await life.advance(10.0)
        await do(life, "vm.set", "a", VmSet(memory=Bytes(16 * GIB)))
        error = await refused(life, Code.INSUFFICIENT_MEMORY, "vm.restart", "a", VmStop())
        # What it has now is free by then, so it is no candidate for being stopped.
        assert "stopping" not in error.hint
        assert "`mica vm set a --memory " in error.hint
        # The verb itself cannot insist.
        assert error.hint.endswith("`mica vm stop a` and `mica vm start --overcommit a` insist")
        await do(life, "vm.set", "a", VmSet(memory=Bytes(2 * GIB)))
        await do(life, "vm.restart", "a", VmStop())
        assert life.rig.world.process("a").plan.vm.spec.memory == 2 * GIB


async def test_what_is_set_while_a_start_waits_does_not_slip_past_admission() -> None:
    async with living(memory=4 * GIB) as life:
        await create(life, "a", memory=Bytes(GIB))
        started = await life.submit("vm.start", "a", VmStart())
        changed = await life.submit("vm.set", "a", VmSet(memory=Bytes(64 * GIB)))
        await life.finish(started.id)
        assert (await life.finish(changed.id)).result == {"pending": ["memory"]}
        assert life.rig.world.process("a").plan.vm.spec.memory == GIB
        assert (await life.engine.views.vm("a")).pending == ("memory",)


async def test_the_host_reserve_is_kept() -> None:
    async with living(Policy(reserve=3 * GIB), memory=4 * GIB, host_used=GIB // 2) as life:
        await create(life, "a", memory=Bytes(GIB))
        error = await refused(life, Code.INSUFFICIENT_MEMORY, "vm.start", "a", VmStart())
        assert "3 GiB is kept for the host" in error.message
