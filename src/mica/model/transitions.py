"""Which verb may begin in which state of a VM, and what state it aims at.

One table, as data. ``docs/reference/vm-states.md`` is generated from it and a test walks every pair.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

from mica.model.vm import VmState

S = VmState


class VmVerb(StrEnum):
    CREATE = "vm.create"
    START = "vm.start"
    STOP = "vm.stop"
    RESTART = "vm.restart"
    PAUSE = "vm.pause"
    RESUME = "vm.resume"
    SET = "vm.set"
    DELETE = "vm.delete"
    RESTORE = "vm.restore"
    PURGE = "vm.purge"
    SNAPSHOT = "snapshot.create"
    REVERT = "snapshot.restore"
    SUSPEND = "vm.suspend"
    DISCARD = "vm.discard"


class Answer(StrEnum):
    """``accept``: begin. ``ignore``: it is so already, succeed at once. ``deny``: not from here."""

    ACCEPT = "accept"
    IGNORE = "ignore"
    DENY = "deny"


class Rule(NamedTuple):
    """From which states a verb begins, in which it has nothing to do, where it leads, and the hint when denied."""

    accept: frozenset[VmState]
    ignore: frozenset[VmState]
    during: VmState | None
    leads_to: VmState | None
    hint: str


def _rule(accept: set[VmState], ignore: set[VmState], during: VmState | None, to: VmState | None, hint: str) -> Rule:
    return Rule(frozenset(accept), frozenset(ignore), during, to, hint)


RULES: Final[dict[VmVerb, Rule]] = {
    VmVerb.CREATE: _rule({S.CREATING}, set(), S.CREATING, S.STOPPED, "a VM is created once"),
    VmVerb.START: _rule(
        {S.STOPPED, S.CRASHED, S.SUSPENDED},
        {S.RUNNING},
        S.STARTING,
        S.RUNNING,
        "resume a paused VM, restore a deleted one",
    ),
    VmVerb.STOP: _rule(
        {S.RUNNING, S.PAUSED},
        {S.STOPPED, S.CRASHED},
        S.STOPPING,
        S.STOPPED,
        "only a VM that runs can stop; `mica vm stop --discard` gives up what a suspended one had in memory",
    ),
    VmVerb.RESTART: _rule({S.RUNNING, S.PAUSED}, set(), S.STOPPING, S.RUNNING, "start it instead"),
    VmVerb.PAUSE: _rule({S.RUNNING}, {S.PAUSED}, None, S.PAUSED, "only a running VM can pause"),
    VmVerb.RESUME: _rule({S.PAUSED}, {S.RUNNING}, None, S.RUNNING, "only a paused VM can resume; start a stopped one"),
    VmVerb.SET: _rule(
        {S.STOPPED, S.CRASHED, S.SUSPENDED, S.RUNNING, S.PAUSED}, set(), None, None, "restore it from the trash first"
    ),
    VmVerb.DELETE: _rule({S.STOPPED, S.CRASHED}, {S.TRASHED}, None, S.TRASHED, "stop it first, or delete with --force"),
    VmVerb.RESTORE: _rule({S.TRASHED}, set(), None, S.STOPPED, "only a deleted VM can be restored"),
    VmVerb.PURGE: _rule(
        {S.STOPPED, S.CRASHED, S.TRASHED, S.DELETING}, set(), S.DELETING, S.GONE, "stop it first, or purge with --force"
    ),
    VmVerb.SNAPSHOT: _rule(
        {S.STOPPED, S.CRASHED, S.RUNNING, S.PAUSED}, set(), None, None, "resume a suspended VM, restore a deleted one"
    ),
    # Where it leads depends on the snapshot: to a running machine when that has its memory.
    VmVerb.REVERT: _rule(
        {S.STOPPED, S.CRASHED, S.RUNNING, S.PAUSED}, set(), None, None, "resume a suspended VM, restore a deleted one"
    ),
    VmVerb.SUSPEND: _rule({S.RUNNING, S.PAUSED}, {S.SUSPENDED}, None, S.SUSPENDED, "only a VM that runs can suspend"),
    VmVerb.DISCARD: _rule(
        {S.SUSPENDED}, {S.STOPPED}, None, S.STOPPED, "only a suspended VM has memory on disk to give up"
    ),
}

# How observed states may follow each other, whoever caused it. The engine refuses to record any other step.
FOLLOWS: Final[dict[VmState, frozenset[VmState]]] = {
    S.CREATING: frozenset({S.STOPPED, S.GONE}),
    S.STOPPED: frozenset({S.STARTING, S.TRASHED, S.DELETING}),
    S.STARTING: frozenset({S.RUNNING, S.PAUSED, S.STOPPED, S.SUSPENDED, S.CRASHED}),
    S.RUNNING: frozenset({S.PAUSED, S.STOPPING, S.STOPPED, S.SUSPENDED, S.CRASHED}),
    S.PAUSED: frozenset({S.RUNNING, S.STOPPING, S.STOPPED, S.SUSPENDED, S.CRASHED}),
    S.STOPPING: frozenset({S.STOPPED, S.CRASHED, S.RUNNING, S.PAUSED, S.STARTING}),
    S.SUSPENDED: frozenset({S.STARTING, S.STOPPED}),
    S.CRASHED: frozenset({S.STARTING, S.STOPPED, S.TRASHED, S.DELETING}),
    S.TRASHED: frozenset({S.STOPPED, S.DELETING}),
    S.DELETING: frozenset({S.GONE}),
    S.GONE: frozenset(),
}

# States in which the VM has a process on the host.
LIVE: Final = frozenset({S.STARTING, S.RUNNING, S.PAUSED, S.STOPPING})

# States in which the VM has memory that ending it would lose: with a process, or on disk.
WITH_MEMORY: Final = LIVE | {S.SUSPENDED}


def answer(verb: VmVerb, state: VmState) -> Answer:
    """What the table says to ``verb`` in ``state``."""
    rule = RULES[verb]
    if state in rule.accept:
        return Answer.ACCEPT
    return Answer.IGNORE if state in rule.ignore else Answer.DENY
