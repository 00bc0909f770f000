"""``vm.stop``: asks the guest, forces after its time-out, and says which happened."""

from __future__ import annotations

from typing import Any

import msgspec

from mica.engine.definition import Context, Definition, Proposal
from mica.engine.operations.stopping import STOP
from mica.model.errors import invalid
from mica.model.transitions import VmVerb
from mica.model.views import VmStop
from mica.model.vm import Power


async def plan(proposal: Proposal) -> None:
    assert proposal.vm is not None
    assert isinstance(proposal.params, VmStop)
    timeout_s = proposal.params.timeout_s
    if timeout_s is not None and not 0 <= timeout_s <= 86400:
        raise invalid(f"a stop time-out of {timeout_s} s is not between 0 and 86400")
    wanted = msgspec.structs.replace(proposal.vm.value, intent=Power.STOPPED)
    proposal.draft.put(proposal.env.records.vms, wanted.id, wanted, proposal.vm.generation)


def result(context: Context) -> dict[str, Any]:
    return dict(context.outputs["halt"])


DEFINITION = Definition(
    verb=VmVerb.STOP,
    noun="vm",
    params=VmStop,
    plan=plan,
    steps=lambda _: STOP,
    state_verb=VmVerb.STOP,
    result=result,
)
