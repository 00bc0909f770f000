"""What the engine needs from networking."""

from __future__ import annotations

from typing import Protocol

from mica.model.vm import NicRuntime, Vm


class Networks(Protocol):
    """Attaches the NICs of VMs. All verbs are idempotent. Managed networks take this seam in their turn."""

    async def attach(self, vm: Vm, nic: str) -> NicRuntime:
        """Make what NIC ``nic`` of the VM plugs into; an earlier one of the same NIC is replaced.

        Raises ``in-use`` naming a published port that is taken, ``host-lacks``.
        """

    async def detach(self, vm_id: str, nic: NicRuntime) -> None:
        """Take it down. What is gone already is no error."""

    async def remove(self, vm_id: str) -> None:
        """Take down everything of a VM, whether anybody knows of it or not. Absent NICs are no error."""

    async def owners(self) -> set[str]:
        """Ids of VMs that have something here which lasts beyond QEMU, for the reaper."""

    async def healthy(self, nic: NicRuntime) -> bool:
        """Whether what was attached is still there, for the watcher."""
