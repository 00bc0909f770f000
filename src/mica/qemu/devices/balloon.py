"""The balloon: gives back memory the guest does not use, by itself where the guest reports free pages.

``deflate-on-oom`` lets the guest take it back before it kills anything of its own.
"""

from __future__ import annotations

from mica.qemu.arguments import Arguments, Bus, from_json

ID = "balloon0"


def arguments(bus: Bus, *, free_page_reporting: bool) -> Arguments:
    return from_json(
        "device",
        {
            "driver": "virtio-balloon-pci",
            "id": ID,
            "deflate-on-oom": True,
            "free-page-reporting": True if free_page_reporting else None,
            **bus.integrated(),
        },
    )
