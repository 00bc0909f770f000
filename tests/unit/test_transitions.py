"""The table of verbs and states, walked pair by pair."""

from __future__ import annotations

from pathlib import Path

import pytest

from mica.model.transitions import FOLLOWS, LIVE, RULES, Answer, VmVerb, answer
from mica.model.vm import VmState
from mica.testing.docs import PAGES, write

PASSING = frozenset({VmState.STARTING, VmState.STOPPING, VmState.DELETING})


def reachable(start: VmState) -> set[VmState]:
    seen, todo = {start}, [start]
    while todo:
        for state in FOLLOWS[todo.pop()] - seen:
            seen.add(state)
            todo.append(state)
    return seen


def test_every_verb_and_every_state_has_its_place() -> None:
    assert set(RULES) == set(VmVerb)
    assert set(FOLLOWS) == set(VmState)


@pytest.mark.parametrize("verb", VmVerb)
@pytest.mark.parametrize("state", VmState)
def test_every_pair_has_one_answer_that_the_states_can_keep(verb: VmVerb, state: VmState) -> None:
    rule = RULES[verb]
    match answer(verb, state):
        case Answer.DENY:
            assert rule.hint, "who is refused is told the way out"
        case Answer.IGNORE:
            assert state not in rule.accept
            assert rule.leads_to in rule.ignore, "what is ignored is what the verb would have led to"
        case Answer.ACCEPT:
            assert state not in rule.ignore
            during = rule.during or state
            assert during is state or during in FOLLOWS[state], "it can begin"
            leads_to = rule.leads_to or state
            assert leads_to in reachable(during), "it can succeed"
            if verb is not VmVerb.RESTART:
                assert leads_to is state or leads_to in FOLLOWS[during], "on the shortest way"
            # What is not made fully is gone; what is not deleted fully can only be deleted again.
            back = {VmVerb.CREATE: VmState.GONE, VmVerb.PURGE: VmState.DELETING}.get(verb, state)
            assert back is during or back in FOLLOWS[during] or rule.during is None, "it can fail"


def test_a_restart_goes_through_a_start() -> None:
    rule = RULES[VmVerb.RESTART]
    assert rule.during is not None
    assert VmState.STARTING in FOLLOWS[rule.during]
    assert RULES[VmVerb.START].leads_to is rule.leads_to


@pytest.mark.parametrize("verb", set(VmVerb) - {VmVerb.CREATE})
def test_no_verb_begins_while_another_is_under_way(verb: VmVerb) -> None:
    half = {VmState.DELETING} if verb is VmVerb.PURGE else set()  # where an earlier one has failed
    assert not RULES[verb].accept & (PASSING | {VmState.CREATING}) - half


def test_every_state_can_come_about_and_end() -> None:
    assert reachable(VmState.CREATING) == set(VmState)
    for state in VmState:
        assert VmState.GONE in reachable(state)
        assert state not in FOLLOWS[state]


def test_what_is_gone_stays_gone() -> None:
    assert not FOLLOWS[VmState.GONE]
    assert {answer(verb, VmState.GONE) for verb in VmVerb} == {Answer.DENY}


def test_every_resting_state_has_a_way_on() -> None:
    for state in set(VmState) - PASSING - {VmState.GONE}:
        assert any(answer(verb, state) is Answer.ACCEPT for verb in VmVerb), state


def test_a_process_may_end_at_any_time() -> None:
    for state in LIVE:
        assert VmState.CRASHED in FOLLOWS[state]
        assert VmState.STOPPED in FOLLOWS[state]


def test_nobody_loses_disks_of_a_process_that_lives() -> None:
    for state in LIVE:
        assert not FOLLOWS[state] & {VmState.DELETING, VmState.TRASHED, VmState.GONE}
    for verb in (VmVerb.DELETE, VmVerb.PURGE):
        assert not RULES[verb].accept & LIVE


@pytest.mark.parametrize("name", PAGES)
def test_the_page_in_the_repository_is_the_page_that_is_made(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    page = Path(__file__).parents[2] / "docs" / name
    made = (tmp_path / name).read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == made, "run: python -m mica.testing.docs"


@pytest.mark.parametrize("state", VmState)
def test_the_page_names_every_state_and_every_verb(state: VmState) -> None:
    page = PAGES["reference/vm-states.md"]()
    assert f"| `{state}` |" in page
    assert all(f"`{verb.removeprefix('vm.')}`" in page for verb in VmVerb)
