"""Screen and pointer. Nothing listens: a viewer is handed a socket over QMP when somebody looks (``add_client``)."""

from __future__ import annotations

from mica.qemu.arguments import Arguments, Bus, concat, flag, from_json


def headless() -> Arguments:
    return flag("display", "none")


def arguments(bus: Bus, *, virtio_vga: bool, tablet: bool) -> Arguments:
    """``virtio_vga`` follows the window's size; a QEMU without it gets the standard VGA card."""
    card = {"driver": "virtio-vga" if virtio_vga else "VGA", "id": "video0", **bus.integrated()}
    pointer = {"driver": "virtio-tablet-pci", "id": "tablet0", **bus.integrated()}
    return concat(
        [
            flag("vnc", "none"),
            from_json("device", card),
            from_json("device", pointer) if tablet else Arguments(),
        ]
    )
