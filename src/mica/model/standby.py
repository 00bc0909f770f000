"""VMs that stand by: launched at a template, with its memory, and held until somebody runs it."""

from __future__ import annotations

from typing import Final

import msgspec

from mica.model.errors import invalid

# Each holds memory and processes; nobody takes more in the time that it needs to make another.
MAX_STANDBY: Final = 64


class Standby(msgspec.Struct, frozen=True):
    """A hidden VM (the row's id) that waits for whoever runs ``template`` (a snapshot's id) next; Unix seconds."""

    template: str
    made_at: float


def check_standby(number: int) -> int:
    """``number`` if so many VMs may stand by for one template. Raises ``invalid``."""
    if not 0 <= number <= MAX_STANDBY:
        raise invalid(f"{number} VMs cannot stand by", hint=f"choose from 0 to {MAX_STANDBY}")
    return number
