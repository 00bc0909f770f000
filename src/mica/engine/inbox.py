"""The pure policy of a VM's inbox: accept a request, ignore it because it is so already, or deny it and say why."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mica.model.errors import Code, MicaError
from mica.model.transitions import RULES, WITH_MEMORY, Answer, VmVerb, answer
from mica.model.vm import VmState


class Pending(msgspec.Struct, frozen=True):
    """An accepted request that has not ended. ``leads_to``: where it brings the VM, ``None`` nowhere."""

    verb: VmVerb
    leads_to: VmState | None


def pending(verb: VmVerb, *, paused: bool = False, start: bool = False) -> Pending:
    """``paused``: a start that leaves the vCPUs held; ``start``: a creation that goes on to a VM that is started."""
    if verb is VmVerb.START and paused:
        return Pending(verb, VmState.PAUSED)
    if verb is VmVerb.CREATE and start:
        return Pending(verb, VmState.PAUSED if paused else VmState.RUNNING)
    if verb is VmVerb.REVERT:
        return Pending(verb, VmState.RUNNING if start else VmState.STOPPED)
    return Pending(verb, RULES[verb].leads_to)


class Decision(msgspec.Struct, frozen=True):
    """``expected`` is the state the VM will be in when the request's turn comes."""

    answer: Answer
    expected: VmState
    error: MicaError | None = None


def expected_state(state: VmState, waiting: Sequence[Pending]) -> VmState:
    """Where the VM will be after all that was accepted, if all goes well."""
    for request in waiting:
        state = request.leads_to or state
    return state


def decide(
    name: str, state: VmState, waiting: Sequence[Pending], verb: VmVerb, *, capacity: int, stops_first: bool = False
) -> Decision:
    """``waiting`` are the requests accepted and not ended, oldest first, the running one among them.

    ``stops_first``: the request brings a VM with memory down itself before it does what it is for.
    """
    expected = expected_state(state, waiting)
    if stops_first and expected in WITH_MEMORY:
        expected = VmState.STOPPED
    if len(waiting) >= capacity:
        error = MicaError(
            Code.BUSY,
            f"VM {name} has {len(waiting)} operations waiting already",
            hint="wait for some of them: `mica operation list`",
            retryable=True,
        )
        return Decision(Answer.DENY, expected, error)
    said = answer(verb, expected)
    # An "already so" holds only when nothing is under way that could still change it, or fail to.
    if said is Answer.IGNORE and any(w.leads_to not in (None, state) for w in waiting):
        said = Answer.DENY
    if said is not Answer.DENY:
        return Decision(said, expected)
    after = f" once its {waiting[-1].verb} has ended" if waiting else ""
    error = MicaError(
        Code.STATE_CONFLICT,
        f"VM {name} is {expected}{after}; {verb.removeprefix('vm.')} is not possible then",
        hint=_hint(name, verb, expected),
        details={"state": state.value, "expected": expected.value},
    )
    return Decision(Answer.DENY, expected, error)


def judge(name: str, state: VmState, verb: VmVerb, *, stops_first: bool = False) -> Decision:
    """A request that was accepted and whose turn has come: it may be otherwise by now than was expected."""
    if stops_first and state in WITH_MEMORY:
        return Decision(Answer.ACCEPT, state)
    said = answer(verb, state)
    if said is not Answer.DENY:
        return Decision(said, state)
    error = MicaError(
        Code.STATE_CONFLICT,
        f"VM {name} is {state} by now; {verb.removeprefix('vm.')} is not possible",
        hint=_hint(name, verb, state),
        details={"state": state.value},
    )
    return Decision(Answer.DENY, state, error)


def _hint(name: str, verb: VmVerb, state: VmState) -> str:
    return f"`mica vm delete --purge {name}` finishes that" if state is VmState.DELETING else RULES[verb].hint
