"""What the engine needs to speak with the system inside a VM."""

from __future__ import annotations

from typing import Protocol

import msgspec

from mica.model.vm import VmRuntime


class GuestFacts(msgspec.Struct, frozen=True):
    """What a guest says of itself: not to be trusted, only shown."""

    hostname: str = ""
    os: str = ""
    addresses: tuple[str, ...] = ()


class Guests(Protocol):
    """The agents in the guests. Whatever they say is hostile input."""

    async def facts(self, vm_id: str, runtime: VmRuntime) -> GuestFacts:
        """Raises ``agent-unavailable``, ``agent-failed``, ``timeout``."""

    async def shutdown(self, vm_id: str, runtime: VmRuntime) -> None:
        """Ask the guest to power off. Returns when it has been asked."""

    async def freeze(self, vm_id: str, runtime: VmRuntime) -> int:
        """Have the guest write out and freeze its file systems; returns how many. Thaw them, whatever this raises.

        Raises ``agent-unavailable``, ``agent-failed``, ``timeout``.
        """

    async def thaw(self, vm_id: str, runtime: VmRuntime) -> None:
        """Thaw what is frozen, if anything is. Raises as :meth:`freeze`."""

    def port_changed(self, vm_id: str, runtime: VmRuntime, *, opened: bool) -> None:
        """The guest opened or closed the agent's port."""

    async def moved(self, vm_id: str, runtime: VmRuntime) -> None:
        """The VM goes on in another process: what was said so far stays said, and goes on there."""

    async def forget(self, vm_id: str) -> None:
        """The VM's process is gone: close what is open, end what waits."""

    async def erase(self, vm_id: str) -> None:
        """The VM is deleted for good: as :meth:`forget`, and all that is kept of what ran in it. Idempotent."""
