"""Randomness for the guest, from QEMU's own generator: no file of the host is opened for it."""

from __future__ import annotations

from mica.qemu.arguments import Arguments, Bus, from_json


def arguments(bus: Bus) -> Arguments:
    return from_json("object", {"qom-type": "rng-builtin", "id": "rng0"}) + from_json(
        "device", {"driver": "virtio-rng-pci", "id": "rng", "rng": "rng0", **bus.integrated()}
    )
