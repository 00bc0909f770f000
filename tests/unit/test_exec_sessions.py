"""The commands of all guests under one daemon after the other: what is made ready, taken over, and cleared away."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from mica.guest.guests import AgentGuests
from mica.guest.sessions import ExecSessions
from mica.host.local import SystemClock
from mica.model.errors import Code, MicaError
from mica.model.exec import ExecRecord, ExecSpec, ExecState
from mica.model.units import MIB, Bytes
from mica.model.vm import ProcessRef, VmRuntime, VmSpec
from mica.testing.agent_server import FakeAgent
from tests.unit.test_exec import processes

VM = "0f1e2d3c-0000-4000-8000-000000000001"


class Rows:
    """Records that outlive the daemons of a test."""

    def __init__(self) -> None:
        self.rows: dict[str, ExecRecord] = {}

    async def save(self, record: ExecRecord) -> None:
        self.rows[record.id] = record

    async def all(self) -> list[ExecRecord]:
        return list(self.rows.values())

    async def remove(self, ids: list[str]) -> None:
        for id_ in ids:
            self.rows.pop(id_, None)


class World:
    """One guest, and daemons that come and go."""

    def __init__(self, tmp_path: Path, server: FakeAgent) -> None:
        self.server = server
        self.rows = Rows()
        self.spool = tmp_path / "spool"
        self.guest = tmp_path / "run"
        self.guest.mkdir()
        self.runtime = VmRuntime(
            process=ProcessRef(1, 1, "boot"),
            spec=VmSpec(cpus=1, memory=Bytes(128 * MIB)),
            run_dir=str(tmp_path),
            accelerator="tcg",
            started_at=0.0,
        )

    @asynccontextmanager
    async def daemon(self, *, opened: bool = True) -> AsyncIterator[tuple[AgentGuests, ExecSessions]]:
        async with AsyncExitStack() as stack:
            guests = AgentGuests()
            stack.push_async_callback(guests.close)
            if opened:
                guests.port_changed(VM, self.runtime, opened=True)
            sessions = ExecSessions(guests, self.rows, self.spool, SystemClock(), directories=[str(self.guest)])
            yield guests, await stack.enter_async_context(sessions.running({VM: ("a", self.runtime)}))

    async def start(self, sessions: ExecSessions, *argv: str) -> ExecRecord:
        return await sessions.start(VM, "a", self.runtime, ExecSpec(argv=argv))

    def directories(self) -> set[str]:
        return {str(entry) for entry in self.guest.iterdir()}


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.01)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with FakeAgent(tmp_path / "agent") as server:
        yield World(tmp_path, server)


async def settled(world: World, sessions: ExecSessions) -> None:
    await until(lambda: not sessions._preparing)


async def test_a_runner_waits_before_the_first_command(world: World) -> None:
    async with world.daemon() as (_, sessions):
        await settled(world, sessions)
        assert len(world.directories()) == 1
        before = world.server.calls.count("guest-exec")
        record = await sessions.wait(VM, (await world.start(sessions, "true")).id)
        assert record.exit_code == 0
        assert world.server.calls.count("guest-exec") == before


async def test_a_first_command_takes_the_runner_that_is_being_made_ready(world: World) -> None:
    world.server.delay_s = 0.02
    async with world.daemon() as (_, sessions):
        await until(lambda: "guest-exec" in world.server.calls)
        await sessions.wait(VM, (await world.start(sessions, "true")).id)
        await settled(world, sessions)
        assert len(world.directories()) == 1


async def test_messages_call_a_vm_by_the_name_that_it_has_now(world: World) -> None:
    """Its agent is known before anybody has named it, and it may get another name."""
    async with world.daemon() as (_, sessions):
        for name in ("web", "db"):
            record = await sessions.start(VM, name, world.runtime, ExecSpec(argv=("no-such-program",)))
            problem = (await sessions.wait(VM, record.id)).error
            assert problem is not None
            assert problem.message == f"there is no program 'no-such-program' in VM {name}"


async def test_runners_do_not_pile_up_over_many_daemons(world: World) -> None:
    seen: set[str] = set()
    for _ in range(4):
        async with world.daemon() as (_, sessions):
            results = await asyncio.gather(*(world.start(sessions, "true") for _ in range(3)))
            for record in results:
                assert (await sessions.wait(VM, record.id)).exit_code == 0
            await settled(world, sessions)
            await until(lambda: len(world.directories()) <= 2)
            assert not seen & world.directories()
        seen |= world.directories()


async def test_a_command_of_a_former_daemon_ends_with_its_output_whole(world: World) -> None:
    async with world.daemon() as (_, sessions):
        await settled(world, sessions)
        going = await world.start(sessions, "sh", "-c", "echo before; sleep 1; echo after")
        await until(lambda: sessions.get(VM, going.id).state is ExecState.RUNNING)
    async with world.daemon() as (_, sessions):
        await settled(world, sessions)
        assert world.rows.rows[going.id].guest_dir in world.directories()
        ended = await sessions.wait(VM, going.id)
        assert (ended.state, ended.exit_code) == (ExecState.EXITED, 0)
        out = b"".join([piece async for piece in sessions.follow(VM, going.id, "stdout", 0)])
        assert out == b"before\nafter\n"
        await until(lambda: world.rows.rows[going.id].guest_dir not in world.directories())


async def test_a_command_that_no_row_names_is_ended(world: World) -> None:
    marker = f"7{os.getpid()}.5"
    async with world.daemon() as (_, sessions):
        await world.start(sessions, "sleep", marker)
        await until(lambda: processes(marker))
    world.rows.rows.clear()
    async with world.daemon() as (_, sessions):
        await settled(world, sessions)
        await until(lambda: not processes(marker))
        assert len(world.directories()) == 1


async def test_starts_during_the_sweep_are_left_alone(world: World) -> None:
    for _ in range(2):
        async with world.daemon() as (_, sessions):
            await asyncio.gather(*(world.start(sessions, "true") for _ in range(3)))
    world.server.delay_s = 0.003
    async with world.daemon() as (_, sessions):
        records: list[ExecRecord] = []
        while sessions._preparing:
            records.append(await world.start(sessions, "echo", str(len(records))))
        assert records
        for number, record in enumerate(records):
            assert (await sessions.wait(VM, record.id)).exit_code == 0
            out = b"".join([piece async for piece in sessions.follow(VM, record.id, "stdout", 0)])
            assert out == f"{number}\n".encode()


async def test_what_waited_for_the_agent_before_its_restart_is_cleared_away(world: World) -> None:
    async with world.daemon() as (guests, sessions):
        await settled(world, sessions)
        before = world.directories()
        guests.port_changed(VM, world.runtime, opened=False)
        world.server.forget()
        guests.port_changed(VM, world.runtime, opened=True)
        await settled(world, sessions)
        await until(lambda: len(world.directories()) == 1)
        assert not before & world.directories()
        record = await sessions.wait(VM, (await world.start(sessions, "true")).id)
        assert record.guest_dir in world.directories()


async def test_a_guest_that_did_not_answer_is_made_ready_by_its_next_command(world: World) -> None:
    async with world.daemon() as (_, sessions):
        await settled(world, sessions)
        old = world.directories()
    world.server.frozen = True
    async with world.daemon() as (_, sessions):
        await settled(world, sessions)
        assert world.directories() == old
        world.server.frozen = False
        await sessions.wait(VM, (await world.start(sessions, "true")).id)
        await until(lambda: not old & world.directories())


async def test_a_guest_that_forbids_commands_says_so_to_whoever_starts_one(world: World) -> None:
    world.server.policy = frozenset({"guest-exec"})
    async with world.daemon() as (_, sessions):
        await settled(world, sessions)
        with pytest.raises(MicaError, match="policy") as caught:
            await world.start(sessions, "true")
        assert caught.value.code is Code.AGENT_FAILED


async def test_a_guest_whose_agent_comes_later_is_made_ready_then(world: World) -> None:
    async with world.daemon(opened=False) as (guests, sessions):
        assert not sessions._preparing
        guests.port_changed(VM, world.runtime, opened=True)
        await until(world.directories)
        await guests.forget(VM)
        await settled(world, sessions)
