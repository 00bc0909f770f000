"""Reference pages that are made from the code, so that they cannot say anything else than it.

``python -m mica.testing.docs [DIRECTORY]`` writes them below ``DIRECTORY`` (``docs`` unless given); a test fails when
a page in the repository differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from mica.model.transitions import FOLLOWS, LIVE, RULES, Answer, Rule, VmVerb, answer
from mica.model.vm import VmState

_MEANING: Final[Mapping[VmState, str]] = {
    VmState.CREATING: "Its disks are being made.",
    VmState.STOPPED: "It has no process on the host; its disks are kept.",
    VmState.STARTING: "Its process is being started; no vCPU has run yet.",
    VmState.RUNNING: "Its vCPUs run.",
    VmState.PAUSED: "Its process and memory are kept; no vCPU runs.",
    VmState.STOPPING: "The guest has been asked to shut down, or is being forced.",
    VmState.SUSPENDED: "It has no process on the host; its memory is on disk, and it goes on where it was.",
    VmState.CRASHED: "Its process ended without being asked to; its disks are kept and checked before the next start.",
    VmState.TRASHED: "Deleted, and kept in the trash until it expires.",
    VmState.DELETING: "Its disks are being removed for good. If that failed half way, it can only be purged again.",
    VmState.GONE: "Nothing is left of it.",
}


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [list(head)]
    cells += [["---"] * len(cells[0]), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _word(verb: VmVerb) -> str:
    return verb.removeprefix("vm.")


def _diagram() -> str:
    verbs: dict[tuple[VmState, VmState], list[str]] = {}
    for verb, rule in RULES.items():
        first = rule.during or rule.leads_to
        for state in rule.accept:
            if first is not None and first is not state:
                verbs.setdefault((state, first), []).append(_word(verb))
    lines = ["stateDiagram-v2", f"    [*] --> {VmState.CREATING}"]
    for state in VmState:
        for following in VmState:
            if following in FOLLOWS[state]:
                label = ", ".join(verbs.get((state, following), ()))
                lines.append(f"    {state} --> {following}" + (f": {label}" if label else ""))
    lines.append(f"    {VmState.GONE} --> [*]")
    return "\n".join(lines)


def _cell(verb: VmVerb, state: VmState) -> str:
    return {Answer.ACCEPT: "begins", Answer.IGNORE: "is so already", Answer.DENY: "no"}[answer(verb, state)]


def _way(rule: Rule) -> str:
    through = [f"`{state}`" for state in (rule.during, rule.leads_to) if state is not None]
    return " → ".join(through) or "the state stays"


def vm_states() -> str:
    """The page about the states of a VM."""
    states = _table(
        ("State", "Meaning", "Process on the host", "May be followed by"),
        (
            (
                f"`{state}`",
                _MEANING[state],
                "yes" if state in LIVE else "no",
                ", ".join(f"`{following}`" for following in VmState if following in FOLLOWS[state]) or "nothing",
            )
            for state in VmState
        ),
    )
    verbs = _table(
        ("Verb", "Leads through", "Where it is not possible"),
        ((f"`{_word(verb)}`", _way(rule), rule.hint) for verb, rule in RULES.items()),
    )
    pairs = _table(
        ("State", *(f"`{_word(verb)}`" for verb in RULES)),
        ((f"`{state}`", *(_cell(verb, state) for verb in RULES)) for state in VmState),
    )
    return f"""# States of a VM

<!-- Made from mica/model/transitions.py by: python -m mica.testing.docs -->

What is seen of a VM is one of these states. What you want of it (its intent) and what Mica is doing about it (an
operation) are kept apart from it.

```mermaid
{_diagram()}
```

An arrow with a verb is taken when that verb begins. The others are taken when an operation goes on or is undone, or
when the guest or the host does something by itself.

## The states

{states}

## The verbs

{verbs}

## Which verb begins in which state

*begins*: an operation is accepted. *is so already*: it succeeds at once and changes nothing. *no*: it is refused with
`state-conflict`.

{pairs}
"""


PAGES: Final[Mapping[str, Callable[[], str]]] = {"reference/vm-states.md": vm_states}


def write(directory: Path) -> None:
    """Write every page below ``directory``."""
    for name, page in PAGES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
