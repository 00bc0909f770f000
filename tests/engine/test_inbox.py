"""The pure policy of a VM's inbox, and of a request whose turn has come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mica.engine.inbox import Pending, decide, expected_state, judge, pending
from mica.model.errors import Code
from mica.model.transitions import RULES, Answer, VmVerb, answer
from mica.model.vm import VmState

S, V = VmState, VmVerb
states = st.sampled_from(list(VmState))
verbs = st.sampled_from([v for v in VmVerb if v is not VmVerb.CREATE])
requests = st.builds(pending, verbs, paused=st.booleans())
queues = st.lists(requests, max_size=6)


@given(states, queues, verbs, st.integers(1, 6))
def test_what_is_accepted_can_begin_if_all_before_it_goes_well(
    state: VmState, waiting: list[Pending], verb: VmVerb, capacity: int
) -> None:
    decision = decide("a", state, waiting, verb, capacity=capacity)
    if len(waiting) >= capacity:
        assert decision.error is not None
        assert decision.error.code is Code.BUSY
        assert decision.error.retryable
    elif decision.answer is Answer.ACCEPT:
        assert decision.error is None
        assert expected_state(state, waiting) in RULES[verb].accept
    elif decision.answer is Answer.IGNORE:
        # It is so now, and nothing that waits will change it.
        assert state in RULES[verb].ignore
        assert all(w.leads_to in (None, state) for w in waiting)
    else:
        assert decision.error is not None
        assert decision.error.code is Code.STATE_CONFLICT
        assert decision.error.hint


@given(states, st.lists(requests, max_size=12))
def test_a_queue_built_by_the_policy_never_contradicts_itself(state: VmState, wishes: list[Pending]) -> None:
    """However many requests come, each accepted one finds the state it needs when all before it go well."""
    queue: list[Pending] = []
    for wish in wishes:
        if decide("a", state, queue, wish.verb, capacity=16).answer is Answer.ACCEPT:
            queue.append(wish)
    for request in queue:
        assert answer(request.verb, state) is Answer.ACCEPT
        state = request.leads_to or state


@given(states, verbs)
def test_a_request_whose_turn_has_come_is_judged_by_what_is(state: VmState, verb: VmVerb) -> None:
    decision = judge("a", state, verb)
    assert decision.answer is answer(verb, state)
    assert (decision.error is None) is (decision.answer is not Answer.DENY)


@pytest.mark.parametrize("verb", [V.DELETE, V.PURGE])
@pytest.mark.parametrize("state", [S.RUNNING, S.PAUSED])
def test_force_lets_a_deletion_stop_it_first(verb: VmVerb, state: VmState) -> None:
    assert decide("a", state, [], verb, capacity=4).answer is Answer.DENY
    assert decide("a", state, [], verb, capacity=4, stops_first=True).answer is Answer.ACCEPT
    assert judge("a", state, verb, stops_first=True).answer is Answer.ACCEPT


def test_an_already_so_does_not_count_while_something_else_is_under_way() -> None:
    assert decide("a", S.RUNNING, [], V.RESUME, capacity=4).answer is Answer.IGNORE
    assert decide("a", S.RUNNING, [pending(V.SET)], V.RESUME, capacity=4).answer is Answer.IGNORE
    assert decide("a", S.RUNNING, [pending(V.PAUSE), pending(V.RESUME)], V.RESUME, capacity=4).answer is Answer.DENY
    assert decide("a", S.RUNNING, [pending(V.STOP)], V.STOP, capacity=4).answer is Answer.DENY


def test_the_refusal_names_state_and_way_out() -> None:
    error = decide("web", S.STOPPED, [], V.PAUSE, capacity=4).error
    assert error is not None
    assert error.message == "VM web is stopped; pause is not possible then"
    assert error.hint == "only a running VM can pause"
    error = decide("web", S.RUNNING, [pending(V.STOP)], V.PAUSE, capacity=4).error
    assert error is not None
    assert error.message == "VM web is stopped once its vm.stop has ended; pause is not possible then"


def test_a_start_that_stays_paused_leads_to_a_vm_that_can_be_resumed() -> None:
    waiting = [pending(V.START, paused=True)]
    assert decide("a", S.STOPPED, waiting, V.RESUME, capacity=4).answer is Answer.ACCEPT
    assert decide("a", S.STOPPED, waiting, V.PAUSE, capacity=4).answer is Answer.DENY
