"""UEFI: the firmware's code, shared and read-only, and the VM's own variable store, a qcow2 like any other disk.

SeaBIOS is QEMU's default and needs no options. Source: OVMF's whitepaper on flash layout; ``-machine pflash0=``.
"""

from __future__ import annotations

from pathlib import Path

from mica.ports.volumes import Volume
from mica.qemu.arguments import Arguments, concat, from_json

CODE = "fw-code"
VARS = "fw-vars"


def arguments(code: Path, code_format: str, variables: Volume) -> Arguments:
    read_only = {"read-only": True}
    return concat(
        [
            from_json("blockdev", {"driver": "file", "node-name": f"{CODE}-file", "filename": str(code), **read_only}),
            from_json("blockdev", {"driver": code_format, "node-name": CODE, "file": f"{CODE}-file", **read_only}),
            from_json("blockdev", {"driver": "file", "node-name": f"{VARS}-file", "filename": str(variables.path)}),
            from_json("blockdev", {"driver": variables.format.value, "node-name": VARS, "file": f"{VARS}-file"}),
        ]
    )
