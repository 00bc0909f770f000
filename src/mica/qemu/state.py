"""Taking the state of a paused machine, and beginning another one at it.

A state has three parts: the RAM image, which nobody writes (:mod:`mica.qemu.ram`); the pages that the machine changed
since it began at that image, with the display's memory and the UEFI variables (:mod:`mica.qemu.pages`); and the state
of the devices, a migration stream without memory (QMP ``xen-save-devices-state``, which is in every build).

QEMU writes that stream without the configuration section that it wants to read, so it is put in: after the 8 bytes of
magic and version, byte 7, the length of the machine type's name as 32 bits big-endian, the name (QEMU source,
``migration/savevm.c``: qemu_savevm_state_header, vmstate_configuration).
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mica.model.errors import Code, MicaError
from mica.model.snapshot import MachineBuild
from mica.model.units import Bytes
from mica.model.vm import NicRuntime
from mica.ports.hypervisor import Captured, Origin
from mica.qemu import pages
from mica.qemu.devices import nic
from mica.qemu.pages import PAGE, Mapping, Region
from mica.qemu.qmp import Monitor

RAM: Final = "ram"
_HEADER: Final = 8
_CONFIGURATION: Final = b"\x07"
_TOP: Final = 1 << 32  # UEFI's flash ends at 4 GiB (QEMU source, hw/i386/pc_sysfw.c)
_LOAD_S: Final = 60.0
_BLOCK = re.compile(r"^\s*(\S+)\s+\d+ \S+\s+0x[0-9a-f]+ 0x([0-9a-f]+)", re.M)
_HOST_ADDRESS = re.compile(r" is (0x[0-9a-f]+)")


async def capture(
    monitor: Monitor, pid: int, run_dir: Path, ram: Mapping | None, build: MachineBuild, into: Path
) -> Captured:
    """See :meth:`mica.ports.hypervisor.StatefulMachine.capture`. ``ram``: where its changed pages are to be taken."""
    written = run_dir / "devices"
    try:
        # Not "live", which lets go of the disks: asked a second time, as a daemon does that takes over from a dead one,
        # QEMU 7.2 ends at an assertion (block.c, bdrv_inactivate_recurse). The machine that goes on finds them locked
        # when it has its state, and takes them when it is let go: by then this one has ended.
        words = {"filename": str(written), "live": False}
        await monitor.run("xen-save-devices-state", words, timeout_s=_LOAD_S)
    except MicaError as error:
        if "non-migratable" not in error.message and "migration blocked" not in error.message.lower():
            raise
        raise MicaError(Code.HOST_LACKS, f"its state cannot be captured: {error.message}") from error
    found = [(r, w) for r, w in await _regions(monitor) if r.runs]
    if ram is not None:
        runs = await asyncio.to_thread(pages.changed, pid, ram)
        found.insert(0, (Region(RAM, 0, ram.size, runs), ram))
    devices, changes = into / "devices", into / "changes"
    if found:
        await asyncio.to_thread(pages.write_file, pid, found, changes)
    else:
        changes.unlink(missing_ok=True)
    # The machine's own user wrote it: what is kept is a copy of ours.
    devices.write_bytes(with_configuration(written.read_bytes(), build.machine))
    written.unlink()
    changed = Bytes(sum(region.bytes for region, _ in found))
    return Captured(devices=devices, build=build, changes=changes if found else None, changed=changed)


def with_configuration(stream: bytes, machine: str) -> bytes:
    """A stream of devices alone, as an incoming migration takes it."""
    name = machine.encode()
    section = _CONFIGURATION + len(name).to_bytes(4, "big") + name
    return stream[:_HEADER] + section + stream[_HEADER:]


async def _regions(monitor: Monitor) -> list[tuple[Region, Mapping]]:
    """Guest memory besides RAM that no device's state holds: the display's, and the UEFI variables'; all of it."""
    listed = (await monitor.run("x-query-ramblock"))["human-readable-text"]
    sizes = {name: int(used, 16) for name, used in _BLOCK.findall(listed)}
    wanted: list[tuple[str, int, int]] = []
    for name, size in sizes.items():
        if name.endswith("/vga.vram"):
            address = await _bar(monitor, size)
            if address is not None:
                wanted.append(("vram", address, size))
    if "system.flash1" in sizes:
        size = sizes["system.flash1"]
        wanted.append(("nvram", _TOP - sizes["system.flash0"] - size, size))
    out = []
    for name, address, size in wanted:
        where = await _mapping(monitor, address, size)
        if where is not None:
            out.append((Region(name, address, size, ((0, size // PAGE),)), where))
    return out


async def _bar(monitor: Monitor, size: int) -> int | None:
    """Where the guest sees the display's memory; ``None`` before its firmware has placed it."""
    for bus in await monitor.run("query-pci"):
        for device in _all_devices(bus):
            for region in device["regions"]:
                if device["class_info"]["class"] == 0x0300 and region.get("prefetch") and region["size"] == size:
                    return int(region["address"]) if region["address"] > 0 else None
    return None


def _all_devices(bus: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for device in bus["devices"]:
        out.append(device)
        if "pci_bridge" in device:
            out += _all_devices(device["pci_bridge"])
    return out


async def _mapping(monitor: Monitor, address: int, size: int) -> Mapping | None:
    """The host's address of a guest's; ``None`` when there is no memory there now (the display is switched off)."""
    words = await monitor.run("human-monitor-command", {"command-line": f"gpa2hva {address:#x}"})
    match = _HOST_ADDRESS.search(words)
    return Mapping(int(match[1], 16), size) if match else None


async def load(monitor: Monitor, pid: int, ram: Mapping, origin: Origin) -> None:
    """See :meth:`mica.ports.hypervisor.StatefulMachine.load`."""
    if origin.changes is not None:
        await asyncio.to_thread(pages.load_region, pid, origin.changes, RAM, ram)
    await _receive(monitor, origin.devices.read_bytes())
    if origin.changes is None:
        return
    # Only now the guest's own view of the display's memory stands.
    for region in pages.read_index(origin.changes).regions:
        if region.name == RAM:
            continue
        where = await _mapping(monitor, region.address, region.size)
        if where is not None:
            await asyncio.to_thread(pages.load_region, pid, origin.changes, region.name, where)


async def _receive(monitor: Monitor, stream: bytes) -> None:
    """Feed a device state through a pipe: QEMU's sandbox lets it open and start nothing for that."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        await monitor.send_descriptor("state", reading)
    finally:
        os.close(reading)
    feeding = asyncio.get_running_loop().run_in_executor(None, _feed, writing, stream)
    try:
        await monitor.run("migrate-incoming", {"uri": "fd:state"})
        await _until(monitor, lambda status: status in ("completed", "failed"))
    finally:
        # The pipe breaks when QEMU has ended or has read enough, so this ends too.
        await asyncio.shield(feeding)


def _feed(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb", buffering=0) as pipe:
        try:
            at = 0
            while at < len(data):
                at += pipe.write(data[at:]) or 0
        except BrokenPipeError:
            return  # what QEMU says of the state tells why


async def _until(monitor: Monitor, done: Callable[[str], bool]) -> None:
    """QEMU tells nobody when it has loaded a state, so it is asked; a load takes 5 to 50 ms."""
    delay_s = 0.001
    try:
        async with asyncio.timeout(_LOAD_S):
            while not done(status := (await monitor.run("query-migrate")).get("status", "")):
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 1.5, 0.05)
    except TimeoutError as error:
        raise MicaError(Code.TIMEOUT, f"QEMU did not load the state within {_LOAD_S:.0f} s") from error
    if status == "failed":
        raise MicaError(Code.QEMU_FAILED, "QEMU could not load the state")


async def join(monitor: Monitor, nics: tuple[NicRuntime, ...], past: int) -> None:
    """See :meth:`mica.ports.hypervisor.StatefulMachine.join`. ``past``: as :func:`mica.qemu.devices.nic.past`.

    What the guest has sent into the empty hub keeps its device waiting, for ever (QEMU source, ``net/hub.c``: a port
    alone "can not receive"). Stopping the machine drops that (``net_vm_change_state_handler``).
    """
    runs = bool((await monitor.run("query-status"))["running"])
    if runs:
        await monitor.run("stop")
    added = [backend for hub, one in enumerate(nics) for backend in nic.join(one, hub=hub)]
    wanted = [("netdev_del", {"id": name}) for name in nic.leave_past(past)]
    wanted += [("netdev_add", backend) for backend in added]
    try:
        for command, arguments in wanted:
            try:
                await monitor.run(command, arguments)
            except MicaError as error:
                if not any(words in error.message for words in ("Duplicate ID", "not found")):  # else it is repeated
                    raise
    finally:
        if runs:
            await monitor.run("cont")
