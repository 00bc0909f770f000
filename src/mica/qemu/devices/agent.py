"""The guest agent's port: virtio-serial with the name that qemu-ga looks for (qemu-ga(8))."""

from __future__ import annotations

from pathlib import Path

from mica.qemu.arguments import Arguments, Bus, concat, from_json, pairs

CHARDEV = "agent0"
PORT = "agent-port"
NAME = "org.qemu.guest_agent.0"


def arguments(socket: Path, bus: Bus) -> Arguments:
    return concat(
        [
            pairs("chardev", "socket", id=CHARDEV, path=str(socket), server=True, wait=False),
            from_json("device", {"driver": "virtio-serial-pci", "id": "virtio-serial", **bus.integrated()}),
            from_json("device", {"driver": "virtserialport", "id": PORT, "chardev": CHARDEV, "name": NAME}),
        ]
    )
