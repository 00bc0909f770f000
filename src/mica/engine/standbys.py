"""VMs that stand by for templates: which there are, which can be taken, and what gives way to everybody else.

A standby is a whole VM that began at a template as any copy of it does, but for its last step: its vCPUs are held, and
nobody has told its guest yet who it is. Who runs the template takes it, and that step is all that is left to do.

    missing ──► vm.create, held ──► stands by ──► taken: another vm.create gives it its name and lets it go on
                                        └──► purged: too many, of no use any more, or its memory is needed
"""

from __future__ import annotations

import msgspec

from mica.engine import boots
from mica.engine.definition import Env
from mica.engine.records import Versioned
from mica.model.snapshot import SnapshotKind
from mica.model.standby import Standby
from mica.model.units import Bytes
from mica.model.views import VmCreate
from mica.model.vm import Power, Vm, VmSpec, VmState, VmStatus

replace = msgspec.structs.replace


class Held(VmCreate, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of a ``vm.create`` that nobody asked for: a copy of the template ``snapshot`` that is held."""


class Ready(msgspec.Struct, frozen=True):
    """One that can be taken, as its rows were seen."""

    member: Versioned[Standby]
    vm: Versioned[Vm]
    status: Versioned[VmStatus]


async def members(env: Env, template: str = "") -> dict[str, Versioned[Standby]]:
    """Those of one template, or all, by the ids of the VMs, the oldest first."""
    rows = [item for item in (await env.records.standbys.scan()).items() if template in ("", item[1].value.template)]
    return dict(sorted(rows, key=lambda item: (item[1].value.made_at, item[0])))


async def ready(env: Env, template: str) -> list[Ready]:
    """Those of a template whose machine waits, and which nobody ends, the oldest first."""
    found = []
    for vm_id, member in (await members(env, template)).items():
        vm, status = await env.records.vms.get(vm_id), await env.records.statuses.get(vm_id)
        if vm is None or status is None or vm.value.intent is not Power.PAUSED:
            continue
        waits = status.value.observed.state is VmState.PAUSED and status.value.runtime is not None
        if waits and env.machines.machine(vm_id) is not None:
            found.append(Ready(member, vm, status))
    return found


class Stock(msgspec.Struct, frozen=True):
    """``ready`` VMs stand by now; all that do or are about to are promised so much ``memory``, in bytes."""

    ready: int = 0
    memory: Bytes = Bytes(0)


async def stocks(env: Env) -> dict[str, Stock]:
    """What stands by for each template that has anything, by its id."""
    rows = await members(env)
    promised = (await env.records.read_ledger()).value.reserved if rows else {}
    out = {}
    for template in {row.value.template for row in rows.values()}:
        mine = [promised[id_] for id_, row in rows.items() if row.value.template == template and id_ in promised]
        out[template] = Stock(len(await ready(env, template)), Bytes(sum(r.ram + r.overhead for r in mine)))
    return out


def same_machine(one: VmSpec, other: VmSpec) -> bool:
    """Whether a machine like ``one`` can go on as ``other``: they differ in nothing but what is not the machine's."""
    blank = VmSpec()
    own = {field: getattr(blank, field) for field in ("hostname", "autostart", "protected", "ephemeral")}
    return replace(one, **own) == replace(other, **own)


async def giving_way(env: Env) -> set[str]:
    """Ids of the VMs that nobody asked for: they are ended as soon as others need their memory."""
    return {*await boots.hidden(env), *await env.records.standbys.scan()}


async def whole_templates(env: Env) -> dict[str, int]:
    """How many are to stand by for each template that they can begin at, by its id; no entry where none are wanted."""
    rows = [await env.records.snapshots.get(r.value.holder) for r in (await env.records.template_names.scan()).values()]
    wanted = [row.value for row in rows if row is not None and row.value.standby]
    if not wanted:
        return {}
    parts = {id_: row.value for id_, row in (await env.records.parts.scan()).items()}
    return {
        s.id: s.standby
        for s in wanted
        if s.kind is SnapshotKind.TEMPLATE and boots.whole(s, parts) and boots.fits(env, s)
    }
