"""What the engine needs to make a copied machine another one than its original, from inside."""

from __future__ import annotations

from typing import Protocol

from mica.model.identity import Identity, Report
from mica.model.vm import VmRuntime


class Identities(Protocol):
    """Speaks with the system in the guest, whose answers are hostile input. What could not be done is an item of the
    report, never an error. All verbs may be repeated."""

    async def prepare(self, vm_id: str, runtime: VmRuntime) -> bool:
        """Have what ``first`` needs wait in a machine that may be copied: its copies become others sooner then, by a
        tenth of a second and more where the processor is emulated. Returns whether it waits there, at once when that
        is known. Never needed."""

    async def first(self, vm_id: str, runtime: VmRuntime, identity: Identity) -> Report:
        """What must differ before any command runs in the guest and any packet leaves it: random numbers, MAC
        addresses; and the clock. Items of ``FIRST``.

        May be called before the vCPUs run: then the guest finds its port connected as it was, and answers sooner.
        Takes at most some seconds, which a guest without an agent makes it wait for.
        """

    async def rest(self, vm_id: str, runtime: VmRuntime, identity: Identity) -> Report:
        """Everything else, with its NICs joined: items of ``REST``, and those that only a restart changes. Takes from
        a second to some minutes."""
