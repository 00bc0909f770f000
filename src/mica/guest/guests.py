"""The agents of all guests of one daemon: one connection each, made when somebody first asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
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
        self._on_forget: list[Callable[[str], Awaitable[None]]] = []
        self._on_erase: list[Callable[[str], Awaitable[None]]] = []
        self._on_open: list[Callable[[str, VmRuntime], None]] = []
        self._open: dict[str, VmRuntime] = {}

    def on_forget(self, call: Callable[[str], Awaitable[None]]) -> None:
        """Await ``call`` with a VM's id when its process has ended, before its agent's connection is closed."""
        self._on_forget.append(call)

    def on_erase(self, call: Callable[[str], Awaitable[None]]) -> None:
        """Await ``call`` with a VM's id when it is deleted for good."""
        self._on_erase.append(call)

    def on_open(self, call: Callable[[str, VmRuntime], None]) -> None:
        """Call ``call`` whenever a guest opens its agent's port: an agent has started there."""
        self._on_open.append(call)

    def open_ports(self) -> dict[str, VmRuntime]:
        """The VMs whose agents are there, as far as is known."""
        return dict(self._open)

    def agent(self, vm_id: str, name: str, runtime: VmRuntime) -> GuestAgent:
        """The agent of a running VM. Messages call that by the last ``name`` given, by its id before there was one."""
        known = self._agents.get(vm_id)
        if known is None:
            known = self._agents[vm_id] = GuestAgent(Path(runtime.run_dir) / "agent", guest=f"VM {vm_id[:8]}")
        if name:
            known.called(f"VM {name}")
        return known

    async def facts(self, vm_id: str, runtime: VmRuntime) -> GuestFacts:
        agent = self.agent(vm_id, "", runtime)
        system = await agent.osinfo()
        return GuestFacts(
            hostname=_clean(await agent.hostname()),
            os=_clean(system.pretty_name or system.name or system.id),
            addresses=_addresses(await agent.network_interfaces()),
        )

    async def shutdown(self, vm_id: str, runtime: VmRuntime) -> None:
        await self.agent(vm_id, "", runtime).shutdown()

    async def freeze(self, vm_id: str, runtime: VmRuntime) -> int:
        agent = self.agent(vm_id, "", runtime)
        if await agent.fsfreeze_status() == "frozen":
            await agent.fsthaw()  # an earlier attempt got this far, and who knows when that was
        return await agent.fsfreeze()

    async def thaw(self, vm_id: str, runtime: VmRuntime) -> None:
        await self.agent(vm_id, "", runtime).fsthaw()

    def port_changed(self, vm_id: str, runtime: VmRuntime, *, opened: bool) -> None:
        agent = self.agent(vm_id, "", runtime)
        if opened:
            agent.port_opened()
            self._open[vm_id] = runtime
            for call in self._on_open:
                call(vm_id, runtime)
        else:
            self._open.pop(vm_id, None)
            agent.port_closed()

    async def moved(self, vm_id: str, runtime: VmRuntime) -> None:
        if vm_id in self._agents:
            self._agents[vm_id].moved(Path(runtime.run_dir) / "agent")

    async def erase(self, vm_id: str) -> None:
        await self.forget(vm_id)
        for call in self._on_erase:
            await call(vm_id)

    async def forget(self, vm_id: str) -> None:
        self._open.pop(vm_id, None)
        for call in self._on_forget:
            await call(vm_id)
        agent = self._agents.pop(vm_id, None)
        if agent is not None:
            await agent.close()

    async def close(self) -> None:
        """Close every connection; what runs in the guests goes on."""
        while self._agents:
            await self._agents.popitem()[1].close()
