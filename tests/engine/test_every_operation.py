"""The automatic crash harness: every verb of the engine, hit at every place there is.

For each: a step fails, a step is repeated, the daemon dies at every commit (and again while it recovers), an undo fails
or is repeated, somebody cancels, QEMU dies, a port fails or hangs or stays broken, the store conflicts or fails.
Afterwards the store tells the truth about the world, and nothing is left that was not there before.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import pytest

from mica.engine.actor import LOOK_S
from mica.engine.definition import Context
from mica.engine.registry import DEFINITIONS
from mica.model.errors import Code, MicaError
from mica.model.operation import Operation, OperationState, StepEvent
from mica.testing.harness import BY, Hooks, Life, Rig, instrument
from mica.testing.store_faults import Crash, Fault, When, conflict, io_error
from tests.engine import scenarios
from tests.engine.scenarios import Scenario
from tests.engine.snapshot_scenarios import SNAPSHOT_SCENARIOS

SCENARIOS = (*scenarios.SCENARIOS, *SNAPSHOT_SCENARIOS)
every = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)

# By then every loop that corrects something has come round.
CURED_S = 40.0

# How much of what is long is enough.
LONG, DEATHS, FEW, CALLS = 6, 6, 6, 12

T = TypeVar("T")
FAULT = MicaError(Code.COMMAND_FAILED, "the test wanted it")


class Run:
    """One run of a scenario: prepared, and asked for in a life of its own."""

    def __init__(
        self, scenario: Scenario, rig: Rig, target: str, params: msgspec.Struct, before: dict[str, Any]
    ) -> None:
        self.scenario, self.rig, self.target, self.params, self.before = scenario, rig, target, params, before
        self.operation_id = ""
        self.life_now: Life | None = None
        self.known: set[str] = set()

    @asynccontextmanager
    async def life(self, faults: Iterable[Fault] = (), hooks: Hooks | None = None) -> AsyncIterator[Life]:
        definitions = instrument(self.scenario.verb, hooks) if hooks else DEFINITIONS
        async with self.rig.life(faults=faults, definitions=definitions) as life:
            self.life_now = life
            yield life

    async def submit(self, life: Life) -> None:
        if self.scenario.attached:
            await life.quiet()
        operation = await life.submit(self.scenario.verb, self.target, self.params)
        self.operation_id = operation.id

    async def operation(self) -> Operation | None:
        """The operation asked for, whether or not somebody was told its id; ``None`` when it was never accepted."""
        rows = [r.value for r in (await self.rig.records.operations.scan()).values()]
        return next((o for o in rows if o.verb == self.scenario.verb and o.by == BY and o.id not in self.known), None)

    async def recover(self) -> None:
        """The next life finishes whatever there is."""
        async with self.rig.life() as life:
            await life.rest()

    async def check(self, where: str, *states: OperationState) -> Operation | None:
        """Nothing lies, nothing is left over, and the operation has ended in one of ``states``."""
        operation = await self.operation()
        assert await self.rig.lies() == [], (where, operation)
        assert await self.rig.litter() == [], (where, operation)
        if operation is None:
            assert await self.rig.snapshot() == self.before, where
            return None
        assert operation.state in states, (where, operation)
        if operation.state is OperationState.SUCCEEDED:
            await self.scenario.check(self.rig)
        elif self.scenario.restores and not any(e.step == self.scenario.until for e in operation.journal):
            assert await self.rig.snapshot() == self.before, (where, operation)
        elif self.scenario.otherwise:
            seen = {r.value.observed.state for r in (await self.rig.records.statuses.scan()).values()}
            assert seen <= self.scenario.otherwise, (where, operation)
        return operation


@asynccontextmanager
async def prepared(scenario: Scenario) -> AsyncIterator[Run]:
    async with Rig() as rig:
        async with rig.life() as life:
            target = await scenario.prepare(life)
            await life.advance(0.5)
            params = await scenario.asks(life)
        assert [*await rig.lies(), *await rig.litter()] == []
        run = Run(scenario, rig, target, params, await rig.snapshot())
        run.known = set(await rig.records.operations.scan())
        rig.world.faults.clear()
        yield run


_clean: dict[str, tuple[list[str], int, list[str]]] = {}


async def clean_run(scenario: Scenario) -> tuple[list[str], int, list[str]]:
    """The steps in their order, the number of commits, and the calls of ports, of a run without trouble."""
    if scenario.name not in _clean:
        _clean[scenario.name] = await _run_clean(scenario)
    return _clean[scenario.name]


def thinned(places: list[T], most: int) -> list[T]:
    """At most so many of the places, evenly: what is long is not hit everywhere by what is dear."""
    return places if len(places) <= most else [places[i * len(places) // most] for i in range(most)]


def pairs(steps: list[str]) -> list[tuple[str, str]]:
    """A step that fails, and one whose undo does. Of long sagas those that fail there, and at the end."""
    if len(steps) <= LONG:
        return [(failing, undone) for n, failing in enumerate(steps, 1) for undone in steps[:n]]
    return sorted({(step, step) for step in steps} | {(steps[-1], step) for step in steps})


async def _run_clean(scenario: Scenario) -> tuple[list[str], int, list[str]]:
    async with prepared(scenario) as run:
        async with run.life() as life:
            await run.submit(life)
            await life.finish(run.operation_id)
            commits = life.store.commits
        calls = list(run.rig.world.faults.log)
        operation = await run.check("clean run", OperationState.SUCCEEDED)
        assert operation is not None
        return [e.step for e in operation.journal if e.event is StepEvent.STARTED], commits, calls


@every
async def test_every_step_tells_a_reader_what_it_does(scenario: Scenario) -> None:
    async with prepared(scenario) as run, run.life() as life:
        await run.submit(life)
        operation = (await run.rig.records.operations.need(run.operation_id)).value
        steps = DEFINITIONS[scenario.verb].steps(operation)
        assert [step.name for step in steps if " " not in step.words] == [], "Step(…, words='making its disks')"
        await life.finish(operation.id)


def at(wanted: str, act: Callable[[Context], Awaitable[None]]) -> Callable[[str, Context], Awaitable[None]]:
    """A hook that acts at one step, once."""
    done: list[str] = []

    async def hook(step: str, context: Context) -> None:
        if step == wanted and not done:
            done.append(step)
            await act(context)

    return hook


async def fail(_: Context) -> None:
    raise FAULT


def dying(run: Run, *, cancelled: bool = False) -> Callable[[Context], Awaitable[None]]:
    async def die(context: Context) -> None:
        assert run.life_now is not None
        if cancelled:
            await run.life_now.engine.cancel(context.operation.id, by=BY)
        run.life_now.store.crashed = True
        raise Crash("in a step")

    return die


def cancelling(run: Run) -> Callable[[Context], Awaitable[None]]:
    async def cancel(context: Context) -> None:
        assert run.life_now is not None
        await run.life_now.engine.cancel(context.operation.id, by=BY)
        await asyncio.sleep(0)

    return cancel


def test_every_verb_has_a_scenario() -> None:
    assert {s.verb for s in SCENARIOS} == set(DEFINITIONS)


@every
async def test_a_step_fails(scenario: Scenario) -> None:
    steps, _, _ = await clean_run(scenario)
    for step in steps:
        for hooks in (Hooks(before_do=at(step, fail)), Hooks(after_do=at(step, fail))):
            async with prepared(scenario) as run:
                async with run.life(hooks=hooks) as life:
                    await run.submit(life)
                    await life.finish(run.operation_id)
                operation = await run.check(f"{step} fails", OperationState.FAILED)
                assert operation is not None
                assert operation.problem == FAULT.problem()


@every
async def test_a_step_is_repeated(scenario: Scenario) -> None:
    steps, _, _ = await clean_run(scenario)
    for step in steps:
        async with prepared(scenario) as run:
            async with run.life(hooks=Hooks(after_do=at(step, dying(run)))) as life:
                await run.submit(life)
                await life.finish(run.operation_id)
            assert run.rig.crashes == 1
            await run.recover()
            await run.check(f"{step} is repeated", OperationState.SUCCEEDED)


@every
@pytest.mark.parametrize("when", When)
async def test_the_daemon_dies_at_every_commit(scenario: Scenario, when: When) -> None:
    _, commits, _ = await clean_run(scenario)
    for n in range(1, commits + 1):
        async with prepared(scenario) as run:
            async with run.life([Fault(n, when)]) as life:
                await run.submit(life)
                await life.finish(run.operation_id)
            assert run.rig.crashes == 1
            await run.recover()
            await run.check(f"dies {when} commit {n}", OperationState.SUCCEEDED)


@every
async def test_the_daemon_dies_again_while_it_recovers(scenario: Scenario) -> None:
    _, commits, _ = await clean_run(scenario)
    # Every second commit for the first death, every one for the second, of long ones fewer: all places in between.
    for n in thinned(list(range(1, commits + 1, 2)), DEATHS):
        for second in range(1, 2 * commits, 1 + commits // FEW):
            async with prepared(scenario) as run:
                async with run.life([Fault(n, When.AFTER)]) as life:
                    await run.submit(life)
                    await life.finish(run.operation_id)
                async with run.life([Fault(second, When.AFTER)]) as life:
                    await life.rest()
                if run.rig.crashes < 2:
                    break
                await run.recover()
                await run.check(f"dies after commit {n}, and {second} in recovery", OperationState.SUCCEEDED)


@every
async def test_an_undo_fails(scenario: Scenario) -> None:
    steps, _, _ = await clean_run(scenario)
    for failing, undone in pairs(steps):
        for how in ("retry", "accept"):
            await _undo_fails(scenario, failing, undone, how)


async def _undo_fails(scenario: Scenario, failing: str, undone: str, how: str) -> None:
    hooks = Hooks(after_do=at(failing, fail), before_undo=at(undone, fail))
    where = f"{failing} fails, then the undo of {undone}; {how}"
    async with prepared(scenario) as run:
        async with run.life(hooks=hooks) as life:
            await run.submit(life)
            stuck = await life.finish(run.operation_id)
            if stuck.state is OperationState.FAILED:
                return  # that step has no undo
            assert stuck.state is OperationState.STUCK, where
            assert await run.rig.lies(stuck=True, leftovers=True) == [], where
            await life.engine.resolve(stuck.id, how, by=BY)
            ended = await life.finish(stuck.id)
            if how == "accept":
                await life.advance(CURED_S)
                await life.reap()
        if how == "retry":
            await run.check(where, OperationState.FAILED)
        else:
            assert ended.state is OperationState.FAILED, where
            assert await run.rig.lies(leftovers=True) == [], where


@every
async def test_an_undo_is_repeated(scenario: Scenario) -> None:
    steps, _, _ = await clean_run(scenario)
    for failing, undone in pairs(steps):
        async with prepared(scenario) as run:
            hooks = Hooks(after_do=at(failing, fail), after_undo=at(undone, dying(run)))
            async with run.life(hooks=hooks) as life:
                await run.submit(life)
                await life.finish(run.operation_id)
            if run.rig.crashes:
                await run.recover()
            await run.check(f"{failing} fails; undo of {undone} is repeated", OperationState.FAILED)


@every
async def test_somebody_cancels(scenario: Scenario) -> None:
    steps, _, _ = await clean_run(scenario)
    for step in ("", *steps):
        for kind in ("before", "after"):
            async with prepared(scenario) as run:
                hooks = Hooks(**{f"{kind}_do": at(step, cancelling(run))})
                async with run.life(hooks=hooks) as life:
                    await run.submit(life)
                    if not step:
                        await life.engine.cancel(run.operation_id, by=BY)
                    await life.finish(run.operation_id)
                ended = (OperationState.CANCELLED, OperationState.SUCCEEDED)
                operation = await run.check(f"cancelled {kind} {step or 'it begins'}", *ended)
                assert operation is not None
                assert step or operation.state is OperationState.CANCELLED


@every
async def test_somebody_cancels_and_the_daemon_dies(scenario: Scenario) -> None:
    steps, _, _ = await clean_run(scenario)
    for step in steps:
        async with prepared(scenario) as run:
            hooks = Hooks(after_do=at(step, dying(run, cancelled=True)))
            async with run.life(hooks=hooks) as life:
                await run.submit(life)
                await life.finish(run.operation_id)
            await run.recover()
            ended = (OperationState.CANCELLED, OperationState.SUCCEEDED)
            await run.check(f"cancelled and dead after {step}", *ended)


@every
async def test_qemu_dies(scenario: Scenario) -> None:
    steps, _, _ = await clean_run(scenario)
    for step in steps:
        for kind in ("before", "after"):
            async with prepared(scenario) as run:

                async def kill(_: Context) -> None:
                    for process in list(run.rig.world.processes.values()):
                        process.kill()

                async with run.life(hooks=Hooks(**{f"{kind}_do": at(step, kill)})) as life:
                    await run.submit(life)
                    operation = await life.finish(run.operation_id)
                where = f"QEMU dies {kind} {step}"
                assert [*await run.rig.lies(), *await run.rig.litter()] == [], (where, operation)
                assert operation.state in (OperationState.FAILED, OperationState.SUCCEEDED), (where, operation)
                assert operation.problem is None or operation.problem.code is not Code.INTERNAL, (where, operation)


@every
@pytest.mark.parametrize("error", [FAULT, OSError(5, "Input/output error")], ids=["refuses", "breaks"])
async def test_a_port_fails_once(scenario: Scenario, error: Exception) -> None:
    _, _, calls = await clean_run(scenario)
    for n in thinned(list(range(1, len(calls) + 1)), 2 * CALLS):
        async with prepared(scenario) as run:
            run.rig.world.faults.fail("*", error, call=n)
            async with run.life() as life:
                try:
                    await run.submit(life)
                except (MicaError, OSError) as raised:
                    assert raised is error  # noqa: PT017
                await life.rest()
                await life.advance(CURED_S)
            ended = (OperationState.FAILED, OperationState.SUCCEEDED)
            await run.check(f"call {n}, {calls[n - 1]}, fails", *ended)


async def _until_somebody_cancels(life: Life, run: Run) -> None:
    """Steps that may take hours end when somebody wants that; all others end by themselves before."""
    for _ in range(4):
        operation = await run.operation()
        if operation is None or operation.state.ended:
            return
        await life.advance(LOOK_S / 2)
    try:
        await life.engine.cancel(run.operation_id, by=BY)
    except MicaError as error:
        assert error.code is Code.STATE_CONFLICT, error  # noqa: PT017


@every
async def test_a_port_hangs(scenario: Scenario) -> None:
    _, _, calls = await clean_run(scenario)
    for n, method in thinned(list(enumerate(calls, 1)), CALLS):
        async with prepared(scenario) as run:
            async with run.life() as life:
                run.rig.world.faults.hang("*", call=n)
                try:
                    async with asyncio.timeout(0.05):
                        await run.submit(life)
                except TimeoutError:
                    continue  # while a request is judged nothing has been written: whoever asked may give up
                await _until_somebody_cancels(life, run)
                await life.rest()
                await life.advance(LOOK_S + CURED_S)
            ended = (OperationState.FAILED, OperationState.SUCCEEDED, OperationState.CANCELLED)
            await run.check(f"call {n}, {method}, hangs", *ended)


@every
async def test_a_port_stays_broken(scenario: Scenario) -> None:
    _, _, calls = await clean_run(scenario)
    for method in sorted(set(calls)):
        async with prepared(scenario) as run:
            async with run.life() as life:
                run.rig.world.faults.fail(method, call=0)
                try:
                    await run.submit(life)
                except MicaError:
                    run.rig.world.faults.clear()
                await life.rest()
                run.rig.world.faults.clear()
                operation = await run.operation()
                if operation is not None and operation.state is OperationState.STUCK:
                    await life.engine.resolve(operation.id, "retry", by=BY)
                    await life.rest()
                await life.advance(CURED_S)
            ended = (OperationState.FAILED, OperationState.SUCCEEDED)
            await run.check(f"{method} stays broken", *ended)


@every
@pytest.mark.parametrize("kind", ["conflicts", "fails"])
async def test_the_store_refuses_a_commit(scenario: Scenario, kind: str) -> None:
    _, commits, _ = await clean_run(scenario)
    for n in range(1, commits + 1):
        async with prepared(scenario) as run:
            error = conflict() if kind == "conflicts" else io_error()
            async with run.life([Fault(n, error=error)]) as life:
                try:
                    await run.submit(life)
                except MicaError as raised:
                    assert raised is error  # noqa: PT017
                await life.rest()
                await life.advance(CURED_S)
            ended = (OperationState.SUCCEEDED,) if kind == "conflicts" else tuple(OperationState)[3:6]
            await run.check(f"commit {n} {kind}", *ended)
