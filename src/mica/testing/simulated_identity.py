"""Simulated :class:`mica.ports.identity.Identities`: who was asked to become whom, and guests that do not."""

from __future__ import annotations

import asyncio

import msgspec

from mica.model.identity import FIRST, REST, Identity, IdentityItem, Report, Trait, undone
from mica.model.vm import AgentState, VmRuntime
from mica.ports.hypervisor import MachineEvent, RunState
from mica.testing.simulated_world import SimulatedHost

PATIENCE_S = 15.0


class Asked(msgspec.Struct, frozen=True):
    """One call: ``verb`` is ``prepare``, ``first`` or ``rest``; ``prepare`` has no identity."""

    verb: str
    vm_id: str
    identity: Identity | None = None


class SimulatedIdentities:
    """On a simulated host. ``asked`` has every call in order, ``refused`` what guests do not change, and why.

    A guest without an agent that answers changes nothing. To fail, hold up or never answer, arm
    ``world.faults`` for ``identity.prepare``, ``identity.first`` or ``identity.rest``.
    """

    def __init__(self, world: SimulatedHost) -> None:
        self._world = world
        self.asked: list[Asked] = []
        self.refused: dict[Trait, str] = {}

    async def prepare(self, vm_id: str, runtime: VmRuntime) -> bool:
        async with self._world.faults.around("identity.prepare"):
            self.asked.append(Asked("prepare", vm_id))
            process = self._world.processes.get(vm_id)
            return runtime.spec.agent and process is not None and process.agent is AgentState.READY

    async def first(self, vm_id: str, runtime: VmRuntime, identity: Identity) -> Report:
        return await self._change("first", FIRST, vm_id, runtime, identity)

    async def rest(self, vm_id: str, runtime: VmRuntime, identity: Identity) -> Report:
        left = undone((Trait.PROGRAMS, Trait.FIRMWARE), "nobody can change it while the guest runs")
        return (*await self._change("rest", REST, vm_id, runtime, identity), *left)

    async def _change(
        self, verb: str, traits: tuple[Trait, ...], vm_id: str, runtime: VmRuntime, identity: Identity
    ) -> Report:
        async with self._world.faults.around(f"identity.{verb}"):
            self.asked.append(Asked(verb, vm_id, identity))
            if not runtime.spec.agent or not await self._answers(vm_id):
                return undone(traits, "the guest agent does not answer")
            return tuple(IdentityItem(t, t not in self.refused, self.refused.get(t, "")) for t in traits)

    async def _answers(self, vm_id: str) -> bool:
        """Wait for the guest's agent as long as the real one would be waited for."""
        process = self._world.processes.get(vm_id)
        if process is None:
            return False
        feed = process.listen()
        give_up = asyncio.ensure_future(self._world.clock.sleep(PATIENCE_S))
        news: asyncio.Future[MachineEvent] | None = None
        try:
            while process.exit is None and not give_up.done():
                if process.agent is AgentState.READY and process.run is RunState.RUNNING:
                    return True
                news = asyncio.ensure_future(anext(feed))
                await asyncio.wait({news, give_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            give_up.cancel()
            if news is not None:
                news.cancel()
        return False
