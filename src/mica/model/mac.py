"""MAC addresses that Mica makes up."""

from __future__ import annotations

import hashlib

# Unicast, locally administered, and of the quadrant that is free to whoever administers (IEEE 802c: the second digit
# is 2). QEMU's own 52:54:00 has it too.
_FIRST = 0x52


def mac_address(owner: str, device: str) -> str:
    """The same for ever for the same device of the same owner; two differ in 40 bits of a digest."""
    digest = hashlib.blake2s(f"mica mac {owner} {device}".encode()).digest()
    return ":".join(f"{octet:02x}" for octet in (_FIRST, *digest[:5]))
