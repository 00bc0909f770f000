"""Moving the disks of a paused machine onto new layers while it lives.

The new layer lies outside what the machine's jail shows it, so it is handed in as a descriptor (QMP ``add-fd``) and
opened through ``/dev/fdset``; then ``blockdev-snapshot`` puts it above the node that the device writes to now (QEMU
docs, "Live Block Device Operations"). All disks move in one transaction.
"""

from __future__ import annotations

import os
from typing import Any

from mica.model.errors import Code, MicaError
from mica.model.vm import NVRAM
from mica.ports.volumes import Volume
from mica.qemu.devices import disk, firmware
from mica.qemu.qmp import Monitor


async def switch(monitor: Monitor, volumes: tuple[Volume, ...]) -> None:
    """See :meth:`mica.ports.hypervisor.StatefulMachine.switch`."""
    nodes = {n["node-name"]: n for n in await monitor.run("query-named-block-nodes", {"flat": True})}
    known = {fdset["fdset-id"]: fdset["fds"][0].get("opaque", "") for fdset in await monitor.run("query-fdsets")}
    actions: list[dict[str, Any]] = []
    for volume in volumes:
        first = firmware.VARS if volume.name == NVRAM else disk.node(volume.name)
        count = sum(1 for name in nodes if name == first or _number(first, name)) - 1
        mark = f"{volume.path.stat().st_ino}"
        if count and _opaque(nodes[f"{first}.{count}-f"], known) == mark:
            continue  # it was moved already
        if first not in nodes:
            raise MicaError(Code.INTERNAL, f"QEMU has no node {first}")
        overlay = f"{first}.{count + 1}"
        await _add(monitor, volume, overlay, mark)
        actions.append({"type": "blockdev-snapshot", "data": {"node": _top(first, count), "overlay": overlay}})
    if actions:
        await monitor.run("transaction", {"actions": actions})


def _top(first: str, count: int) -> str:
    return f"{first}.{count}" if count else first


def _number(first: str, name: str) -> bool:
    return name.startswith(f"{first}.") and name.removeprefix(f"{first}.").isdigit()


def _opaque(node: dict[str, Any], known: dict[int, str]) -> str:
    return known.get(int(node["file"].rpartition("/")[2]), "") if "/dev/fdset/" in node["file"] else ""


async def _add(monitor: Monitor, volume: Volume, overlay: str, mark: str) -> None:
    descriptor = os.open(volume.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        number = await monitor.add_descriptor(descriptor, mark)
    finally:
        os.close(descriptor)
    file = {
        "driver": "file",
        "node-name": f"{overlay}-f",
        "filename": f"/dev/fdset/{number}",
        "aio": "threads",
        "discard": "unmap",
    }
    form: dict[str, Any] = {
        "driver": volume.format.value,
        "node-name": overlay,
        "file": f"{overlay}-f",
        "backing": None,  # the layer below is open already
        "discard": "unmap",
        "pass-discard-request": True,
        "pass-discard-snapshot": True,
        "pass-discard-other": True,
    }
    await monitor.run("blockdev-add", file)
    await monitor.run("blockdev-add", form)
