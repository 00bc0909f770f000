"""The first serial port: a socket for those who look, and a log of everything whoever looks.

The log is QEMU's own, so nothing is lost while no daemon lives (QEMU: ``-chardev …,logfile=``).
"""

from __future__ import annotations

from pathlib import Path

from mica.qemu.arguments import Arguments, from_json, pairs


def arguments(socket: Path, log: Path) -> Arguments:
    chardev = pairs(
        "chardev",
        "socket",
        id="serial0",
        path=str(socket),
        server=True,
        wait=False,
        logfile=str(log),
        logappend=True,
    )
    return chardev + from_json("device", {"driver": "isa-serial", "id": "com1", "chardev": "serial0"})
