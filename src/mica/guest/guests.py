"""The agents of all guests of one daemon: one connection each, made when somebody first asks."""

from __future__ import annotations

from pathlib import Path

from mica.guest.agent import GuestAgent
from mica.guest.replies import NetworkInterface
from mica.model.vm import VmRuntime
from mica.ports.guests import GuestFacts

MAX_ADDRESSES = 32
MAX_TEXT = 255


def _clean(text: str) -> str:
    """What a guest calls itself, fit to be shown: bounded, and without control characters."""
    return "".join(c for c in text if c.isprintable())[:MAX_TEXT]


def _addresses(interfaces: tuple[NetworkInterface, ...]) -> tuple[str, ...]:
    """Addresses by which others may reach the guest: no loopback, no link-local ones."""
    found = [a.ip_address for i in interfaces if i.name != "lo" for a in i.ip_addresses]
    return tuple(_clean(a) for a in found if not a.startswith(("127.", "169.254.", "fe80:", "::1")))[:MAX_ADDRESSES]


class AgentGuests:
    """Implements :class:`mica.ports.guests.Guests`; ``socket`` tells where a running VM's agent port is."""

    def __init__(self) -> None:
        self._agents: dict[str, GuestAgent] = {}

    def agent(self, vm_id: str, name: str, runtime: VmRuntime) -> GuestAgent:
        """The agent of a running VM; ``name`` is what messages call it."""
        known = self._agents.get(vm_id)
        if known is None:
            known = self._agents[vm_id] = GuestAgent(Path(runtime.run_dir) / "agent", guest=name)
        return known

    async def facts(self, vm_id: str, runtime: VmRuntime) -> GuestFacts:
        agent = self.agent(vm_id, f"VM {vm_id[:8]}", runtime)
        system = await agent.osinfo()
        return GuestFacts(
            hostname=_clean(await agent.hostname()),
            os=_clean(system.pretty_name or system.name or system.id),
            addresses=_addresses(await agent.network_interfaces()),
        )

    async def shutdown(self, vm_id: str, runtime: VmRuntime) -> None:
        await self.agent(vm_id, f"VM {vm_id[:8]}", runtime).shutdown()

    def port_changed(self, vm_id: str, runtime: VmRuntime, *, opened: bool) -> None:
        agent = self.agent(vm_id, f"VM {vm_id[:8]}", runtime)
        if opened:
            agent.port_opened()
        else:
            agent.port_closed()

    async def forget(self, vm_id: str) -> None:
        agent = self._agents.pop(vm_id, None)
        if agent is not None:
            await agent.close()

    async def close(self) -> None:
        for vm_id in list(self._agents):
            await self.forget(vm_id)
