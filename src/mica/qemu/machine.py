"""A live machine: what QEMU says of it, and what it is told."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import structlog

from mica.model.errors import Code, MicaError
from mica.model.snapshot import MachineBuild
from mica.model.units import Bytes
from mica.model.vm import AgentState, IoLimits, NetworkKind, NicRuntime, VmRuntime, VmSpec
from mica.ports.hypervisor import Captured, EventKind, Exit, Forecast, MachineEvent, MachineStatus, Origin, RunState
from mica.ports.volumes import Volume
from mica.qemu import layers, pages, state
from mica.qemu.devices import agent, disk, nic
from mica.qemu.jailed import Jailed
from mica.qemu.qmp import Monitor

log = structlog.get_logger()

KILL_TIMEOUT_S = 30.0

# RunState of the QMP reference → what the engine knows, and words for people.
RUN_STATES: dict[str, tuple[RunState, str]] = {
    "running": (RunState.RUNNING, ""),
    "prelaunch": (RunState.PRELAUNCH, "held before its first instruction"),
    "inmigrate": (RunState.PRELAUNCH, "receiving its state"),
    "paused": (RunState.PAUSED, ""),
    "suspended": (RunState.PAUSED, "the guest went to sleep"),
    "io-error": (RunState.PAUSED, "paused by an I/O error: the host's disk may be full"),
    "guest-panicked": (RunState.PAUSED, "the guest panicked"),
    "internal-error": (RunState.PAUSED, "the accelerator failed"),
    "watchdog": (RunState.PAUSED, "the guest's watchdog fired"),
    "debug": (RunState.PAUSED, "held by a debugger"),
    "save-vm": (RunState.PAUSED, "its state is being saved"),
    "restore-vm": (RunState.PAUSED, "its state is being restored"),
    "colo": (RunState.PAUSED, "paused"),
    "preconfig": (RunState.PRELAUNCH, "not configured yet"),
    "finish-migrate": (RunState.PAUSED, "its state is being saved"),
    "postmigrate": (RunState.PAUSED, "its state was saved"),
    "shutdown": (RunState.SHUTDOWN, "the guest powered off"),
}

# QMP events that mean "look again".
EVENTS: dict[str, EventKind] = {
    "RESUME": EventKind.RESUMED,
    "STOP": EventKind.PAUSED,
    "SHUTDOWN": EventKind.SHUTDOWN,
    "RESET": EventKind.RESET,
    "GUEST_PANICKED": EventKind.PANICKED,
    "BLOCK_IO_ERROR": EventKind.IO_ERROR,
    "VSERPORT_CHANGE": EventKind.AGENT,
    "SUSPEND": EventKind.PAUSED,
    "WAKEUP": EventKind.RESUMED,
}


def last_words(log_file: Path, since: int, limit: int = 600) -> str:
    """The end of what QEMU wrote to its log after offset ``since``; empty when it said nothing."""
    try:
        with log_file.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(since, size - limit))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[-3:])


class QemuMachine:
    """Implements :class:`mica.ports.hypervisor.StatefulMachine` for one QEMU process."""

    def __init__(
        self,
        jailed: Jailed,
        monitor: Monitor,
        runtime: VmRuntime,
        build: MachineBuild,
        *,
        log_file: Path,
        log_offset: int,
    ) -> None:
        self._jailed = jailed
        self.monitor = monitor
        self._runtime = runtime
        self._build = build
        self._log_file = log_file
        self._log_offset = log_offset

    async def observe(self) -> MachineStatus:
        status = await self.monitor.run("query-status")
        run, reason = RUN_STATES.get(status["status"], (RunState.PAUSED, status["status"]))
        return MachineStatus(run, await self._agent_state(), reason)

    async def _agent_state(self) -> AgentState:
        if not self._runtime.spec.agent:
            return AgentState.ABSENT
        devices = await self.monitor.run("query-chardev")
        port = next((d for d in devices if d["label"] == agent.CHARDEV), None)
        return AgentState.READY if port is not None and port["frontend-open"] else AgentState.WAITING

    async def resume(self) -> None:
        await self.monitor.run("cont")

    async def pause(self) -> None:
        await self.monitor.run("stop")

    async def power_button(self) -> None:
        await self.monitor.run("system_powerdown")

    async def kill(self) -> None:
        self._jailed.process.kill()
        await self._jailed.wait_exit(KILL_TIMEOUT_S)

    async def apply(self, spec: VmSpec) -> None:
        for one in spec.disks:
            await self.monitor.run("block_set_io_throttle", disk.throttle(one))

    async def capture(self, into: Path, *, folded: bool = False) -> Captured:
        if (await self.monitor.run("query-status"))["running"]:
            raise MicaError(Code.STATE_CONFLICT, "a machine that runs cannot be captured", hint="pause it first")
        ram = self._ram() if self._runtime.ram and not folded else None
        return await state.capture(self.monitor, self._pid, Path(self._runtime.run_dir), ram, self._build, into)

    async def forecast(self) -> Forecast:
        # In units of 512 bytes (inode(7)).
        ram = os.stat(f"/proc/{self._pid}/fd/{self._runtime.handle['ram']}").st_blocks * 512
        if not self._runtime.ram:
            return Forecast(ram=Bytes(ram))
        runs = await asyncio.to_thread(pages.changed, self._pid, self._ram())
        return Forecast(ram=Bytes(ram), changed=Bytes(sum(count for _, count in runs) * pages.PAGE))

    async def load(self, origin: Origin) -> None:
        try:
            await state.load(self.monitor, self._pid, self._ram(), origin)
        except MicaError as error:
            if self._jailed.process.alive:
                raise
            words = last_words(self._log_file, self._log_offset)
            raise MicaError(error.code, f"{error.message}: {words}", hint=error.hint) from error

    async def join(self, nics: tuple[NicRuntime, ...]) -> None:
        await state.join(self.monitor, nics, self._runtime.handle.get("inside", 0))

    async def switch(self, volumes: tuple[Volume, ...]) -> None:
        await layers.switch(self.monitor, volumes)

    @property
    def _pid(self) -> int:
        return self._jailed.process.pid

    def _ram(self) -> pages.Mapping:
        inode = os.stat(f"/proc/{self._pid}/fd/{self._runtime.handle['ram']}").st_ino
        return pages.mapping_of(self._pid, inode, self._runtime.spec.memory)

    async def events(self) -> AsyncIterator[MachineEvent]:
        async for event in self.monitor.events():
            kind = EVENTS.get(event["event"])
            if kind is not None:
                yield MachineEvent(kind, _detail(event))
        await self._jailed.process.wait_exit()
        yield MachineEvent(EventKind.EXITED)

    async def ended(self) -> Exit:
        status = await self._jailed.wait_exit()
        return Exit(clean=status.code == 0, last_words=last_words(self._log_file, self._log_offset))

    def raise_file_limit(self, size: int) -> None:
        """Let the process write files of up to ``size`` bytes, if it may not already. Raises ``PermissionError``."""
        self._jailed.process.raise_file_limit(size)

    async def close(self) -> None:
        await self.monitor.close()
        self._jailed.close()


def _detail(event: dict[str, Any]) -> str:
    data = event.get("data", {})
    if event["event"] == "BLOCK_IO_ERROR":
        return f"{data.get('operation')} on {data.get('node-name') or data.get('device')}: {data.get('reason')}"
    return str(data.get("reason", ""))


async def complete(monitor: Monitor, spec: VmSpec) -> None:
    """Set what no option of the command line says, on a machine that is still held: disk limits, pulled cables."""
    for one in spec.disks:
        if one.limits != IoLimits():
            await monitor.run("block_set_io_throttle", disk.throttle(one))
    for other in spec.nics:
        if other.network == NetworkKind.NONE:
            await monitor.run("set_link", nic.unplug(other))
