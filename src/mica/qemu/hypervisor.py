"""Starts machines on QEMU, finds them again, and removes what they leave.

<runtime>/vm/<id>/<n>/         the daemon's: status.json (the keeper's note of how the process ended)
<runtime>/vm/<id>/<n>/run/     the machine's own user's: its sockets
<home>/logs/<id>/              console.log (the serial port, by QEMU) and qemu.log (QEMU's own messages)

<n> is the incarnation: one VM has two machines for a moment while it goes on as a child of its own frozen memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from mica.host.processes import find
from mica.model.errors import Code, MicaError
from mica.model.snapshot import MachineBuild
from mica.model.units import MIB, Bytes
from mica.model.vm import Machine, Vm, VmRuntime, VmSpec
from mica.ports.clock import Clock
from mica.ports.hypervisor import Exit, LaunchPlan
from mica.qemu import accel, ram
from mica.qemu.accel import Accelerator
from mica.qemu.checks import check_host, check_nics
from mica.qemu.command_line import QemuHost, Sockets, build_arguments
from mica.qemu.jail import Jail, JailKind, JailUsers, hand_over
from mica.qemu.jailed import Jailed, JailedRefs, adopt, exit_code, find_left, start
from mica.qemu.launching import jail_spec, make_logs, make_run_dir
from mica.qemu.machine import QemuMachine, complete, last_words
from mica.qemu.qmp import Monitor
from mica.qemu.ram import RamImages

log = structlog.get_logger()

LAUNCH_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10.0
# What QEMU with the default devices takes before the guest runs, beyond RAM and TCG's buffer (measured: 15 to 40 MiB).
BASE_OVERHEAD = 48 * MIB
PER_CPU_OVERHEAD = 4 * MIB
DISPLAY_OVERHEAD = 16 * MIB
# passt takes 30 MiB of its own, the sieve before an older one 6 (measured).
NIC_OVERHEAD = 36 * MIB
# QEMU may write no file beyond its largest disk, or this; so a guest cannot fill the host through the console log while
# nobody keeps that short (mica.qemu.logs). Where the limit cannot be moved along, a log ends at the larger one.
MIN_FILE_LIMIT = Bytes(64 * MIB)
FIXED_FILE_LIMIT = Bytes(1024 * MIB)

TCG_WARNING = (
    "runs under software emulation (TCG): QEMU promises no isolation there, the jail around it is the only boundary"
)


class Handle(msgspec.Struct, frozen=True, kw_only=True):
    """What a later daemon needs beyond the runtime's own fields."""

    vm_id: str
    jailed: JailedRefs
    log_offset: int
    # The descriptor in the machine's process that its RAM was opened from.
    ram: int
    # That of the QEMU it runs on, whatever is installed by now.
    build: MachineBuild
    # Networks inside the QEMU whose state it began at.
    inside: int = 0


class QemuHypervisor:
    """Implements :class:`mica.ports.hypervisor.Hypervisor`."""

    def __init__(
        self,
        *,
        probe: Callable[[], Awaitable[tuple[QemuHost, Jail]]],
        users: JailUsers,
        runtime_dir: Path,
        log_dir: Path,
        join_slice: Callable[[dict[str, Any], int], Awaitable[None]],
        clock: Clock,
        also_reduced: tuple[str, ...] = (),
        file_limit: Bytes = MIN_FILE_LIMIT,
    ) -> None:
        self._probe = probe
        self._found: tuple[QemuHost, Jail] | None = None
        self._missing: MicaError | None = None
        self._users = users
        self._vm_dir = runtime_dir / "vm"
        self._log_dir = log_dir
        self._join_slice = join_slice
        self._clock = clock
        self._file_limit = file_limit
        self._also_reduced = also_reduced
        self._attached: dict[tuple[str, int], QemuMachine] = {}
        self.ram = RamImages()

    async def look(self) -> None:
        """Find QEMU, its accelerator and its jail. What is missing is told by whatever needs it, after a new look."""
        try:
            self._found, self._missing = await self._probe(), None
        except MicaError as error:
            self._missing = error

    @property
    def _host(self) -> QemuHost:
        return self._here()[0]

    @property
    def _jail(self) -> Jail:
        return self._here()[1]

    def _here(self) -> tuple[QemuHost, Jail]:
        if self._found is None:
            raise self._missing or MicaError(Code.HOST_LACKS, "this host was not looked at yet", retryable=True)
        return self._found

    @property
    def found(self) -> QemuHost | None:
        return self._found[0] if self._found else None

    async def close(self) -> None:
        """Let go of all machines; they live on."""
        for vm_id, _ in list(self._attached):
            await self._let_go(vm_id)
        self.ram.close()

    async def _let_go(self, vm_id: str, incarnation: int | None = None) -> None:
        for key in [k for k in self._attached if k[0] == vm_id and incarnation in (None, k[1])]:
            await self._attached.pop(key).close()

    # ── what can run ──────────────────────────────────────────────────────────────────────────────────────────────

    def overhead(self, spec: VmSpec) -> Bytes:
        total = BASE_OVERHEAD + PER_CPU_OVERHEAD * spec.cpus + NIC_OVERHEAD * len(spec.nics)
        if spec.display and spec.machine is not Machine.MINIMAL:
            total += DISPLAY_OVERHEAD
        if self._found is None or self._host.accelerator is Accelerator.TCG:
            total += accel.translation_buffer(spec)
        return Bytes(total)

    async def check(self, spec: VmSpec) -> None:
        check_nics(spec)
        if self._found is None:
            await self.look()  # it may have been installed meanwhile
        check_host(spec, self._host)

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def launch(self, plan: LaunchPlan) -> VmRuntime:
        if plan.origin is not None:
            self._check_build(plan)
        await self._end(plan.vm.id, plan.incarnation, None)
        try:
            ram = await self._ram_for(plan)
            try:
                return await self._launch(plan, ram)
            finally:
                os.close(ram)
        except BaseException:
            # Cancelled or failed: what is half made goes, and nothing may interrupt that.
            await asyncio.shield(self._end(plan.vm.id, plan.incarnation, None))
            raise

    def build_of(self, spec: VmSpec) -> MachineBuild:
        """What a state of such a machine would fit if it began now."""
        host = self._host
        return MachineBuild(
            qemu=host.build.identity,
            machine=host.build.machine("q35"),
            cpu=accel.cpu_model(host.accelerator, spec),
            accelerator=host.accelerator.value,
        )

    def _check_build(self, plan: LaunchPlan) -> None:
        assert plan.origin is not None
        theirs, ours = plan.origin.build, self.build_of(plan.vm.spec)
        differing = [f for f in theirs.__struct_fields__ if getattr(theirs, f) != getattr(ours, f)]
        if differing:
            what = ", ".join(f"{f} {getattr(theirs, f)} (here {getattr(ours, f)})" for f in differing)
            raise MicaError(
                Code.HOST_LACKS,
                f"the memory of {plan.vm.name} fits another machine: {what}",
                hint="go on from its disks alone: --no-memory",
            )

    async def _ram_for(self, plan: LaunchPlan) -> int:
        """A descriptor of the RAM that the machine is to map; the caller closes it."""
        if plan.origin is None:
            return ram.create(plan.vm.spec.memory)
        return os.dup(await self.ram.open(plan.origin.ram, plan.origin.ram_file))

    async def _launch(self, plan: LaunchPlan, memory: int) -> VmRuntime:
        vm = plan.vm
        user = self._users.vm(vm.slot) if self._jail.kind is JailKind.ROOT else None
        directory = self._vm_dir / vm.id / str(plan.incarnation)
        sockets = Sockets(make_run_dir(directory))
        hand_over(sockets.directory, user)
        console, messages = make_logs(self._log_dir / vm.id)
        hand_over(console, user)
        argv = build_arguments(plan, self._host, sockets, Path(f"/proc/self/fd/{memory}"), console)
        log_offset = messages.stat().st_size
        spec = jail_spec(
            plan,
            writable=(sockets.directory, console),
            logs=(console, messages),
            log_room=self._file_limit,
            firmware_code=self._host.firmware_code,
            devices=(Path("/dev/kvm"),) if self._host.accelerator is Accelerator.KVM else (),
            user=user,
            raisable=self._jail.kind is not JailKind.ROOT,  # others cannot raise a limit above the hard one
        )
        await self._join_networks(plan)
        started_at = self._clock.now()
        jailed = await start(
            self._jail,
            argv,
            spec,
            status_file=directory / "status.json",
            output=messages,
            pass_fds=(memory,),
            before=lambda pid: self._join_slice(plan.slice, pid),
            timeout_s=LAUNCH_TIMEOUT_S,
        )
        try:
            await self._complete(vm, jailed, sockets, messages, log_offset)
        except BaseException:
            jailed.process.kill()
            await asyncio.shield(_gone(jailed))
            raise
        jailed.close()
        handle = Handle(
            vm_id=vm.id,
            jailed=jailed.refs,
            log_offset=log_offset,
            ram=memory,
            build=self.build_of(vm.spec),
            inside=plan.origin.inside if plan.origin else 0,
        )
        return VmRuntime(
            process=jailed.refs.process,
            spec=vm.spec,
            run_dir=str(sockets.directory),
            accelerator=self._host.accelerator.value,
            started_at=started_at,
            overhead=self.overhead(vm.spec),
            nics=plan.nics,
            slice=plan.slice,
            handle=msgspec.to_builtins(handle),
            reduced=(*self.reduced(), *(text for n in plan.nics for text in n.reduced)),
            ram=plan.origin.ram if plan.origin else "",
            incarnation=plan.incarnation,
        )

    async def _complete(self, vm: Vm, jailed: Jailed, sockets: Sockets, messages: Path, log_offset: int) -> None:
        """What a machine that answers still lacks."""
        monitor = await self._connect(vm.name, jailed, sockets, messages, log_offset)
        try:
            await complete(monitor, vm.spec)
        finally:
            await monitor.close()

    async def _join_networks(self, plan: LaunchPlan) -> None:
        """What works for the VM's NICs counts as the VM's."""
        for process in (ref for nic in plan.nics for ref in nic.processes):
            live = find(process)
            if live is not None:
                with live:
                    await self._join_slice(plan.slice, live.pid)

    def reduced(self) -> tuple[str, ...]:
        """What machines do not get on this host, in words."""
        emulated = (TCG_WARNING,) if self._host.accelerator is Accelerator.TCG else ()
        return (*emulated, *self._jail.reduced, *self._also_reduced)

    async def _connect(self, name: str, jailed: Jailed, sockets: Sockets, messages: Path, log_offset: int) -> Monitor:
        """Wait for the control monitor and greet it; when QEMU ends first, say so in its own last words."""
        try:
            async with asyncio.timeout(LAUNCH_TIMEOUT_S):
                return await _greeted(name, jailed, sockets.control)
        except (TimeoutError, MicaError) as error:
            if jailed.process.alive:
                raise MicaError(
                    Code.TIMEOUT, f"QEMU of {name} did not answer within {LAUNCH_TIMEOUT_S:.0f} s", retryable=True
                ) from error
            status = await jailed.wait_exit()
            words = last_words(messages, log_offset) or str(status)
            raise MicaError(
                Code.QEMU_FAILED,
                f"QEMU of {name} ended at once: {words}",
                hint=f"`mica vm log {name} --qemu` has all of it",
            ) from error

    async def attach(self, runtime: VmRuntime) -> QemuMachine | None:
        handle = msgspec.convert(runtime.handle, Handle)
        vm_id = handle.vm_id
        # A monitor takes one client: whoever held it of ours lets go first.
        await self._let_go(vm_id, runtime.incarnation)
        jailed = adopt(handle.jailed)
        if jailed is None:
            return None
        try:
            monitor = await Monitor.connect(vm_id[:8], Sockets(Path(runtime.run_dir)).control, CONNECT_TIMEOUT_S)
        except BaseException as error:
            alive = jailed.process.alive
            jailed.close()
            if alive or not isinstance(error, MicaError):
                raise
            return None
        self.ram.learn(runtime)
        machine = self._attached[vm_id, runtime.incarnation] = QemuMachine(
            jailed,
            monitor,
            runtime,
            handle.build,
            log_file=self._log_dir / vm_id / "qemu.log",
            log_offset=handle.log_offset,
        )
        return machine

    async def retire(self, vm_id: str, incarnation: int) -> None:
        await self._end(vm_id, incarnation, None)

    async def build(self, runtime: VmRuntime) -> MachineBuild:
        return msgspec.convert(runtime.handle, Handle).build

    async def autopsy(self, runtime: VmRuntime) -> Exit:
        handle = msgspec.convert(runtime.handle, Handle)
        code = exit_code(Path(handle.jailed.status_file))
        messages = self._log_dir / handle.vm_id / "qemu.log"
        return Exit(clean=code == 0, last_words=last_words(messages, handle.log_offset))

    async def cleanup(self, vm_id: str, runtime: VmRuntime | None) -> None:
        directory = self._vm_dir / vm_id
        entries = directory.iterdir() if directory.exists() else ()
        known = {int(entry.name) for entry in entries if entry.name.isdigit()}
        if runtime is not None:
            known.add(runtime.incarnation)
        for number in sorted(known):
            same = runtime is not None and runtime.incarnation == number
            await self._end(vm_id, number, runtime if same else None)
        await self._let_go(vm_id)
        if directory.exists():
            shutil.rmtree(directory)

    async def _end(self, vm_id: str, incarnation: int, runtime: VmRuntime | None) -> None:
        """End one machine that may be left, and remove what is its alone. Idempotent."""
        directory = self._vm_dir / vm_id / str(incarnation)
        found: Jailed | None = None
        if runtime is not None:
            found = adopt(msgspec.convert(runtime.handle, Handle).jailed)
        found = found or find_left(directory / "status.json", str(directory))
        if found is not None:
            with found:
                found.process.kill()
                await found.wait_exit(LAUNCH_TIMEOUT_S)
        await self._let_go(vm_id, incarnation)
        if directory.exists():
            shutil.rmtree(directory)
        with contextlib.suppress(OSError):  # another incarnation lives there
            directory.parent.rmdir()

    async def erase(self, vm_id: str) -> None:
        await self.cleanup(vm_id, None)
        logs = self._log_dir / vm_id
        if logs.exists():
            shutil.rmtree(logs)

    async def leftovers(self, known: set[str]) -> list[str]:
        found: set[str] = set()
        for root in (self._vm_dir, self._log_dir):
            if root.is_dir():
                found |= {entry.name for entry in root.iterdir()}
        return sorted(found - known)

    def let_log_grow(self, vm_id: str, size: int) -> None:
        """Let QEMU write its logs beyond ``size``, their length now: their beginnings were given back to the disk."""
        for machine in (m for (one, _), m in self._attached.items() if one == vm_id):
            machine.raise_file_limit(size + self._file_limit)


async def _gone(jailed: Jailed) -> None:
    """Wait until a killed process and its keeper are gone, and let go of them."""
    with jailed:
        await jailed.wait_exit(LAUNCH_TIMEOUT_S)


async def _greeted(name: str, jailed: Jailed, socket: Path) -> Monitor:
    """Connect to the monitor of a QEMU that is about to make it. Raises ``qemu-failed`` when it ended first."""
    # QEMU tells nobody when it listens, and its socket is there a moment before it does; its end would be told.
    delay_s = 0.002
    while True:
        if socket.exists() or not jailed.process.alive:
            try:
                return await Monitor.connect(name, socket, CONNECT_TIMEOUT_S)
            except MicaError as error:
                if not (error.code is Code.QEMU_FAILED and error.retryable and jailed.process.alive):
                    raise
        await asyncio.sleep(delay_s)
        delay_s = min(delay_s * 1.5, 0.05)


def can_direct_io(path: Path) -> bool:
    """Whether the file can be opened around the page cache: tmpfs and some network file systems cannot."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


__all__ = ["TCG_WARNING", "Handle", "QemuHypervisor", "can_direct_io"]
