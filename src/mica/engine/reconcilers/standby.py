"""As many VMs stand by for each template as are wanted, while memory for them is to spare, and no others.

A few are begun at a time. They give way: as soon as more memory is promised than there is, the last ones are ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mica.engine import standbys
from mica.engine.admission import room
from mica.engine.definition import Env
from mica.engine.promises import left, shared
from mica.engine.records import Ledger, Versioned
from mica.engine.standbys import Held
from mica.model.errors import Code, MicaError
from mica.model.operation import Actor, OperationState
from mica.model.standby import Standby
from mica.model.views import VmDelete
from mica.model.vm import Power, VmState

if TYPE_CHECKING:
    from mica.engine.engine import Engine

replace = msgspec.structs.replace

BY = Actor("mica", "reconciler:standby")

# Each takes a processor for a moment, which somebody's VM may want.
AT_ONCE = 2
# After so long a failure is tried again, and after twice as long each further one, up to the last. Seconds.
AGAIN_S = 10.0
MAX_AGAIN_S = 600.0
# What stays free of the host's memory beside everything that is promised: one part of so many.
SPARE = 8


class _Trouble(msgspec.Struct, frozen=True):
    failures: int
    until: float


class KeepStandbys:
    """One for each engine. Remembers only what it has begun and what failed: a daemon that forgets that tries again."""

    def __init__(self, env: Env, engine: Engine) -> None:
        self._env = env
        self._engine = engine
        self._begun: dict[str, str] = {}
        self._trouble: dict[str, _Trouble] = {}

    async def reconcile(self) -> str:
        try:
            wanted, members = await standbys.whole_templates(self._env), await standbys.members(self._env)
        except MicaError as error:
            if error.code is not Code.HOST_LACKS:
                raise
            return ""  # without a QEMU there is nothing to say about what fits it
        self._trouble = {id_: trouble for id_, trouble in self._trouble.items() if id_ in wanted}
        await self._hear(wanted)
        if not wanted and not members:
            return ""
        ended = await self._end(members, await self._of_no_use(members, wanted))
        ended += await self._make_room({id_: row for id_, row in members.items() if not self._engine.waiting(id_)})
        said = [f"ended {ended} VMs that stood by"] if ended else []
        if not ended:
            said += [await self._begin(template, number, members) for template, number in wanted.items()]
        return "; ".join(filter(None, said))

    # ── those that there are ──────────────────────────────────────────────────────────────────────────────────────

    async def _of_no_use(self, members: dict[str, Versioned[Standby]], wanted: dict[str, int]) -> list[str]:
        """Those that are too many, the last ones first, that nobody can take, or for whose template none are wanted."""
        left, out = dict(wanted), []
        for vm_id, row in members.items():
            status = await self._env.records.statuses.get(vm_id)
            if self._engine.waiting(vm_id):  # it comes or goes
                left[row.value.template] = left.get(row.value.template, 0) - 1
            elif status is None or status.value.observed.state is not VmState.PAUSED:
                out.append(vm_id)
            elif left.get(row.value.template, 0) > 0:
                left[row.value.template] -= 1
            else:
                out.append(vm_id)
        return out

    async def _make_room(self, members: dict[str, Versioned[Standby]]) -> int:
        """End as many as others need the memory of; those that were made last have done least."""
        env = self._env
        ledger = (await env.records.read_ledger()).value
        vms = await env.records.vms.scan() if members else {}
        going = {id_ for id_ in members if id_ not in vms or vms[id_].value.intent is not Power.PAUSED}
        out: list[str] = []
        for vm_id in [id_ for id_ in reversed(members) if id_ not in going]:
            away = going.union(out)
            running = env.sampler.candidates(ledger)
            capacity = env.host.capacity()
            freed = sum(c.used for c in running if c.vm_id in away)
            rest = Ledger({k: v for k, v in ledger.reserved.items() if k not in away})
            rest_room = room(
                replace(capacity, available=capacity.available + freed),
                rest,
                [c for c in running if c.vm_id not in away],
                env.policy.reserve,
                await shared(env, rest),
            )
            if rest_room.least >= 0:
                break
            out.append(vm_id)
        return await self._end(members, out)

    async def _end(self, members: dict[str, Versioned[Standby]], out: list[str]) -> int:
        """Purge those, unless somebody has taken them meanwhile."""
        ended = 0
        for vm_id in out:
            vm = await self._env.records.vms.get(vm_id)
            if vm is None or not vm.value.hidden:
                continue
            body = VmDelete(purge=True, force=True)
            try:
                await self._engine.submit("vm.purge", vm_id, body, by=BY, if_match=vm.generation)
            except MicaError:
                continue  # somebody was quicker; the next round looks again
            ended += 1
            members.pop(vm_id)
        return ended

    # ── those that there are not ──────────────────────────────────────────────────────────────────────────────────

    async def _hear(self, wanted: dict[str, int]) -> None:
        """What became of those that were begun: where one failed, the next one waits."""
        for operation_id, template in list(self._begun.items()):
            row = await self._env.records.operations.get(operation_id)
            if row is not None and not row.value.state.ended and row.value.state is not OperationState.STUCK:
                continue
            del self._begun[operation_id]
            if row is not None and row.value.state is not OperationState.SUCCEEDED and template in wanted:
                self._failed(template)
            elif row is not None and row.value.state is OperationState.SUCCEEDED:
                self._trouble.pop(template, None)

    def _failed(self, template: str) -> None:
        failures = self._trouble[template].failures + 1 if template in self._trouble else 1
        pause = min(AGAIN_S * 2.0 ** (failures - 1), MAX_AGAIN_S)
        self._trouble[template] = _Trouble(failures, self._env.clock.monotonic() + pause)

    async def _begin(self, template: str, number: int, members: dict[str, Versioned[Standby]]) -> str:
        env, trouble = self._env, self._trouble.get(template)
        missing = number - sum(row.value.template == template for row in members.values())
        if missing <= 0 or (trouble is not None and trouble.until > env.clock.monotonic()):
            return ""
        begun = 0
        while begun < missing and len(self._begun) < AT_ONCE and await self._to_spare(template):
            wanted = Held(snapshot=template, start=True)
            try:
                operation = await self._engine.submit("vm.create", "", wanted, by=BY)
            except MicaError as error:
                self._failed(template)
                return f"no VM stands by: {error.message}"
            self._begun[operation.id] = template
            begun += 1
        return f"began {begun} VMs that are to stand by" if begun else ""

    async def _to_spare(self, template: str) -> bool:
        """Whether this host has memory that nobody would miss."""
        env = self._env
        row = await env.records.snapshots.get(template)
        if row is None:
            return False
        capacity, spec = env.host.capacity(), row.value.spec
        return (await left(env)).least >= spec.memory + env.hypervisor.overhead(spec) + capacity.memory // SPARE
