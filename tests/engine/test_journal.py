"""The pure rule of journals: only legal sequences, and always an end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mica.engine.journal import MAY_FOLLOW, Action, IllegalJournal, Next, last_events, next_action, outputs
from mica.model.operation import JournalEntry, StepEvent

E = StepEvent
STEPS = ["a", "b", "c", "d"]


def entry(step: str, event: StepEvent, output: object = None) -> JournalEntry:
    return JournalEntry(step, event, 0.0, output)


# What may happen to an action: it works, it fails, or the daemon dies before the outcome is written.
fates = st.lists(st.sampled_from(["works", "fails", "dies"]), max_size=40)


@given(st.integers(0, len(STEPS)), fates, st.sampled_from([None, 0, 3, 7]))
def test_every_walk_is_legal_and_ends(count: int, luck: list[str], cancel_after: int | None) -> None:
    """Whatever happens, the rule leads to an end; what it had done is undone, last first, unless all succeeded."""
    steps, journal = STEPS[:count], list[JournalEntry]()
    unwind, turns = False, 0
    while True:
        last_events(journal)  # raises when anything illegal was written
        turns += 1
        assert turns < 200
        unwind = unwind or (cancel_after is not None and turns > cancel_after)
        action = next_action(steps, journal, unwind=unwind)
        fate = luck.pop() if luck else "works"
        if action.next is Next.DO:
            journal.append(entry(action.step, E.STARTED))
            if fate == "works":
                journal.append(entry(action.step, E.SUCCEEDED))
            elif fate == "fails":
                journal.append(entry(action.step, E.FAILED))
                unwind = True
        elif action.next is Next.UNDO:
            journal.append(entry(action.step, E.UNDO_STARTED))
            if fate != "dies":
                journal.append(entry(action.step, E.UNDO_FINISHED if fate == "works" else E.UNDO_FAILED))
        elif action.next is Next.STUCK:
            # An operator: try that undo again.
            journal = [e for e in journal if e.event is not E.UNDO_FAILED]
        else:
            break
    last = last_events(journal)
    if action.next is Next.SUCCEEDED:
        assert [last.get(s) for s in steps] == [E.SUCCEEDED] * count
    else:
        assert set(last.values()) <= {E.UNDO_FINISHED}
        undone = [e.step for e in journal if e.event is E.UNDO_FINISHED]
        assert undone == [s for s in reversed(steps) if s in last]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from(list(StepEvent))), max_size=12))
def test_nothing_but_legal_sequences_passes(events: list[tuple[str, StepEvent]]) -> None:
    journal = [entry(step, event) for step, event in events]
    before: dict[str, StepEvent] = {}
    legal = True
    for step, event in events:
        legal = legal and event in MAY_FOLLOW[before.get(step)]
        before[step] = event
    if legal:
        assert isinstance(next_action(STEPS, journal), Action)
    else:
        with pytest.raises(IllegalJournal):
            next_action(STEPS, journal)


def test_a_step_that_nobody_knows_is_refused() -> None:
    with pytest.raises(IllegalJournal, match="unknown steps: z"):
        next_action(STEPS, [entry("z", E.STARTED)])


def test_an_interrupted_step_is_done_again_and_an_interrupted_undo_undone_again() -> None:
    assert next_action(STEPS, [entry("a", E.STARTED)]) == Action(Next.DO, "a")
    journal = [entry("a", E.STARTED), entry("a", E.FAILED), entry("a", E.UNDO_STARTED)]
    assert next_action(STEPS, journal) == Action(Next.UNDO, "a")


def test_going_back_begins_with_what_was_only_started() -> None:
    journal = [entry("a", E.STARTED), entry("a", E.SUCCEEDED), entry("b", E.STARTED)]
    assert next_action(STEPS, journal, unwind=True) == Action(Next.UNDO, "b")


def test_outputs_are_those_of_the_steps_that_succeeded() -> None:
    journal = [entry("a", E.STARTED), entry("a", E.SUCCEEDED, {"n": 1}), entry("b", E.STARTED)]
    assert outputs(journal) == {"a": {"n": 1}}
