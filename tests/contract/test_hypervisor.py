"""One suite for everything that starts machines: the simulated hypervisor and real QEMU must agree."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest

from mica.daemon.builder import Builder
from mica.daemon.settings import Settings, load
from mica.host.local import SystemClock
from mica.host.processes import find
from mica.model.errors import Code, MicaError
from mica.model.image import DiskFormat, Image
from mica.model.units import MIB, Bytes
from mica.model.vm import AgentState, DiskSpec, NetworkKind, NicRuntime, NicSpec, ProcessRef, Vm, VmRuntime, VmSpec
from mica.ports.hypervisor import EventKind, Hypervisor, LaunchPlan, Machine, RunState
from mica.ports.slices import SliceLimits
from mica.ports.volumes import Volume
from mica.qemu.command_line import Sockets
from mica.qemu.hypervisor import QemuHypervisor
from mica.qemu.jail import JailUsers
from mica.qemu.qmp import Monitor
from mica.testing.simulated import Behaviour, SimulatedHost, SimulatedHypervisor
from tests.integration.world import template

IDS = ["6f9619ff-8b86-4d01-b42d-00cf4fc964f1", "6f9619ff-8b86-4d01-b42d-00cf4fc964f2"]
SPEC = VmSpec(memory=Bytes(128 * MIB), nics=(), display=False)


class Stand(Protocol):
    """A hypervisor, and what a test does to it from outside."""

    hypervisor: Hypervisor

    def another_daemon(self) -> Hypervisor:
        """A hypervisor over the same host that knows nothing yet, as after the daemon was killed."""

    def plan(self, vm: Vm, *, boots: bool = False) -> LaunchPlan: ...

    def broken_plan(self, vm: Vm) -> LaunchPlan:
        """One whose disk is not there."""

    async def power_off(self, runtime: VmRuntime) -> None:
        """Let the process end in order."""

    def kill(self, runtime: VmRuntime) -> None: ...

    def alive(self, process: ProcessRef) -> bool: ...

    def traces(self, vm_id: str) -> list[str]:
        """All that the VM has on the host beside its logs."""


def make_vm(number: int = 0, spec: VmSpec = SPEC) -> Vm:
    return Vm(id=IDS[number], name=f"vm{number}", spec=spec, slot=number, created_at=0.0, created_by="test")


class SimulatedStand:
    def __init__(self, world: SimulatedHost) -> None:
        self.world = world
        world.default = Behaviour(agent_after_s=0.02, obeys_after_s=0.02)
        self.hypervisor: Hypervisor = SimulatedHypervisor(world)

    def another_daemon(self) -> Hypervisor:
        return SimulatedHypervisor(self.world)

    def plan(self, vm: Vm, *, boots: bool = False) -> LaunchPlan:
        self.world.slices[vm.id] = SliceLimits(None, None)
        return LaunchPlan(vm=vm, volumes=(), nics=(), slice={"id": vm.id})

    def broken_plan(self, vm: Vm) -> LaunchPlan:
        return msgspec.structs.replace(self.plan(vm), volumes=(missing_volume(Path("/nowhere")),))

    async def power_off(self, runtime: VmRuntime) -> None:
        next(p for p in self.world.processes.values() if p.ref == runtime.process).quit()

    def kill(self, runtime: VmRuntime) -> None:
        next(p for p in self.world.processes.values() if p.ref == runtime.process).kill()

    def alive(self, process: ProcessRef) -> bool:
        return any(p.ref == process for p in self.world.processes.values())

    def traces(self, vm_id: str) -> list[str]:
        return [
            *(f"process {p}" for p in self.world.processes if p == vm_id),
            *(f"remains {p}" for p in self.world.remains if p == vm_id),
        ]


def missing_volume(directory: Path) -> Volume:
    return Volume(name="root", path=directory / "root.qcow2", format=DiskFormat.QCOW2, size=Bytes(MIB))


class QemuStand:
    """Real QEMUs in the jail that this host and user have, without network and control groups."""

    def __init__(self, settings: Settings, image: tuple[Image, Path]) -> None:
        self.settings = settings
        self.image, self.files = image
        self.builder = Builder(settings)
        self.joined: list[int] = []
        self.made: list[QemuHypervisor] = []
        self.hypervisor: Hypervisor = self.another_daemon()

    def another_daemon(self) -> QemuHypervisor:
        async def join(_: dict[str, Any], pid: int) -> None:
            self.joined.append(pid)

        made = QemuHypervisor(
            probe=self.builder.probe,
            users=JailUsers(),
            runtime_dir=self.settings.runtime_dir,
            log_dir=self.settings.log_dir,
            join_slice=join,
            clock=SystemClock(),
        )
        self.made.append(made)
        return made

    def plan(self, vm: Vm, *, boots: bool = False) -> LaunchPlan:
        direct = self.image.direct_boot
        assert direct is not None
        nics = tuple(NicRuntime(name=nic.name, handle={"kind": "none"}) for nic in vm.spec.nics)
        return LaunchPlan(
            vm=vm,
            volumes=(),
            nics=nics,
            slice={},
            direct_boot=direct if boots else None,
            kernel=self.files / direct.kernel if boots else None,
            initrd=self.files / direct.initrd if boots else None,
        )

    def broken_plan(self, vm: Vm) -> LaunchPlan:
        volume = missing_volume(self.settings.home)
        volume.path.write_bytes(b"no qcow2 at all")
        spec = msgspec.structs.replace(vm.spec, disks=(DiskSpec(name="root", size=Bytes(MIB)),))
        return msgspec.structs.replace(self.plan(msgspec.structs.replace(vm, spec=spec)), volumes=(volume,))

    async def power_off(self, runtime: VmRuntime) -> None:
        monitor = await Monitor.connect("rescue", Sockets(Path(runtime.run_dir)).rescue)
        await monitor.run("quit")
        await monitor.close()

    def kill(self, runtime: VmRuntime) -> None:
        os.kill(runtime.process.pid, signal.SIGKILL)

    def alive(self, process: ProcessRef) -> bool:
        found = find(process)
        if found is None:
            return False
        found.close()
        return True

    def traces(self, vm_id: str) -> list[str]:
        out = [str(p) for p in (self.settings.runtime_dir / "vm").glob(vm_id)]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    words = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if str(self.settings.runtime_dir).encode() in words and vm_id.encode() in words:
                    out.append(f"process {entry.name}")
        return out

    async def clear(self) -> None:
        for vm_id in IDS:
            await self.hypervisor.erase(vm_id)
        for made in self.made:
            await made.close()


@pytest.fixture(scope="session")
def micro() -> tuple[Image, Path]:
    (manifest,) = template().glob("images/*/manifest.json")
    return msgspec.json.decode(manifest.read_bytes(), type=Image), manifest.parent


@pytest.fixture
def place() -> Iterator[Settings]:
    with tempfile.TemporaryDirectory(prefix="mica-") as name:
        home = Path(name)
        home.chmod(0o711)
        for part in ("logs", "cache"):
            (home / part).mkdir(mode=0o711)
        shutil.copytree(
            template() / "cache", home / "cache", dirs_exist_ok=True, ignore=shutil.ignore_patterns("packages")
        )
        environ = {key: value for key, value in os.environ.items() if not key.startswith("MICA_")}
        settings = load({"home": name}, environ)
        yield msgspec.structs.replace(settings, runtime_dir=home / "r")


@contextlib.asynccontextmanager
async def real(request: pytest.FixtureRequest) -> AsyncIterator[QemuStand]:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed")
    made = QemuStand(request.getfixturevalue("place"), request.getfixturevalue("micro"))
    assert isinstance(made.hypervisor, QemuHypervisor)
    await made.hypervisor.look()
    try:
        yield made
    finally:
        await made.clear()


@pytest.fixture
async def qemu(request: pytest.FixtureRequest) -> AsyncIterator[QemuStand]:
    async with real(request) as made:
        yield made


@pytest.fixture(params=["simulated", pytest.param("qemu", marks=pytest.mark.guest)])
async def stand(request: pytest.FixtureRequest) -> AsyncIterator[Stand]:
    if request.param == "qemu":
        async with real(request) as made:
            yield made
    else:
        async with SimulatedHost(SystemClock()) as world:
            yield SimulatedStand(world)


async def attached(stand: Stand, runtime: VmRuntime) -> Machine:
    machine = await stand.hypervisor.attach(runtime)
    assert machine is not None
    return machine


# ---- what everybody promises


async def test_a_launched_machine_is_held_and_obeys(stand: Stand) -> None:
    vm = make_vm()
    await stand.hypervisor.check(vm.spec)
    runtime = await stand.hypervisor.launch(stand.plan(vm))
    assert stand.alive(runtime.process)
    assert runtime.spec == vm.spec
    assert runtime.overhead == stand.hypervisor.overhead(vm.spec) > 0
    machine = await attached(stand, runtime)
    assert (await machine.observe()).run is RunState.PRELAUNCH
    await machine.resume()
    assert (await machine.observe()).run is RunState.RUNNING
    await machine.resume()
    await machine.pause()
    await machine.pause()
    assert (await machine.observe()).run is RunState.PAUSED
    await machine.resume()
    assert (await machine.observe()).run is RunState.RUNNING
    await machine.apply(vm.spec)
    await machine.kill()
    assert not stand.alive(runtime.process)


async def test_events_tell_and_end(stand: Stand) -> None:
    runtime = await stand.hypervisor.launch(stand.plan(make_vm()))
    machine = await attached(stand, runtime)
    seen: list[EventKind] = []

    async def listen() -> None:
        async for event in machine.events():
            seen.append(event.kind)  # noqa: PERF401 - seen one by one

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0)
    await machine.resume()
    await machine.pause()
    stand.kill(runtime)
    async with asyncio.timeout(15):
        await listener  # it ends by itself
    assert [kind for kind in seen if kind in (EventKind.RESUMED, EventKind.PAUSED)] == [
        EventKind.RESUMED,
        EventKind.PAUSED,
    ]
    assert seen[-1] is EventKind.EXITED
    assert seen.count(EventKind.EXITED) == 1


async def test_an_end_in_order(stand: Stand) -> None:
    runtime = await stand.hypervisor.launch(stand.plan(make_vm()))
    machine = await attached(stand, runtime)
    ended = asyncio.create_task(machine.ended())
    await stand.power_off(runtime)
    async with asyncio.timeout(15):
        assert (await ended).clean
    assert (await stand.hypervisor.autopsy(runtime)).clean
    assert await stand.hypervisor.attach(runtime) is None


async def test_an_end_not_in_order(stand: Stand) -> None:
    runtime = await stand.hypervisor.launch(stand.plan(make_vm()))
    machine = await attached(stand, runtime)
    await machine.resume()
    stand.kill(runtime)
    async with asyncio.timeout(15):
        assert not (await machine.ended()).clean
        assert not (await machine.ended()).clean  # asked again
    for ask in (machine.observe, machine.resume, machine.pause, machine.power_button):
        with pytest.raises(MicaError) as caught:
            await ask()
        assert caught.value.code in (Code.QEMU_FAILED, Code.TIMEOUT)
    await machine.kill()  # a dead one is no error


@pytest.mark.parametrize("clean", [True, False])
async def test_an_end_that_nobody_saw(stand: Stand, clean: bool) -> None:
    runtime = await stand.hypervisor.launch(stand.plan(make_vm()))
    if clean:
        await stand.power_off(runtime)
    else:
        stand.kill(runtime)
    async with asyncio.timeout(15):
        while stand.alive(runtime.process):
            await asyncio.sleep(0.01)
        later = stand.another_daemon()
        assert await later.attach(runtime) is None
        while (await later.autopsy(runtime)).clean is not clean:  # who notes the status may still be writing
            await asyncio.sleep(0.01)


async def test_another_daemon_goes_on(stand: Stand) -> None:
    runtime = await stand.hypervisor.launch(stand.plan(make_vm()))
    first = await attached(stand, runtime)
    await first.resume()
    if isinstance(stand.hypervisor, QemuHypervisor):
        await stand.hypervisor.close()  # a monitor takes one client; a killed daemon lets go of it too
    later = stand.another_daemon()
    # All that a later daemon has is what was stored.
    stored = msgspec.json.decode(msgspec.json.encode(runtime), type=VmRuntime)
    machine = await later.attach(stored)
    assert machine is not None
    assert (await machine.observe()).run is RunState.RUNNING
    await machine.pause()
    assert (await machine.observe()).run is RunState.PAUSED
    again = await later.attach(stored)
    assert again is not None
    assert (await again.observe()).run is RunState.PAUSED
    await again.kill()
    await later.cleanup(IDS[0], stored)
    assert stand.traces(IDS[0]) == []


async def test_cleanup_leaves_nothing_whatever_there_was(stand: Stand) -> None:
    await stand.hypervisor.cleanup(IDS[0], None)  # nothing
    runtime = await stand.hypervisor.launch(stand.plan(make_vm()))
    assert stand.traces(IDS[0])
    await stand.hypervisor.cleanup(IDS[0], runtime)  # a live one
    assert not stand.alive(runtime.process)
    assert stand.traces(IDS[0]) == []
    await stand.hypervisor.cleanup(IDS[0], runtime)  # the same again
    runtime = await stand.hypervisor.launch(stand.plan(make_vm()))
    await stand.another_daemon().cleanup(IDS[0], None)  # a live one that nobody knows of
    assert not stand.alive(runtime.process)
    assert stand.traces(IDS[0]) == []
    runtime = await stand.hypervisor.launch(stand.plan(make_vm()))
    stand.kill(runtime)
    await stand.hypervisor.cleanup(IDS[0], runtime)  # a dead one
    assert stand.traces(IDS[0]) == []


async def test_leftovers_are_known_until_they_are_erased(stand: Stand) -> None:
    hypervisor = stand.hypervisor
    assert await hypervisor.leftovers(set()) == []
    for number in (0, 1):
        await hypervisor.launch(stand.plan(make_vm(number)))
    assert await hypervisor.leftovers(set()) == IDS
    assert await hypervisor.leftovers({IDS[0]}) == [IDS[1]]
    await hypervisor.cleanup(IDS[0], None)
    assert await hypervisor.leftovers({IDS[1]}) == [IDS[0]]  # its logs are kept
    await hypervisor.erase(IDS[0])
    await hypervisor.erase(IDS[0])
    assert await hypervisor.leftovers(set()) == [IDS[1]]
    assert stand.traces(IDS[1])  # the other one is left alone
    await hypervisor.erase(IDS[1])
    assert await hypervisor.leftovers(set()) == []


async def test_a_second_launch_ends_the_first(stand: Stand) -> None:
    first = await stand.hypervisor.launch(stand.plan(make_vm()))
    second = await stand.hypervisor.launch(stand.plan(make_vm()))
    assert first.process != second.process
    assert not stand.alive(first.process)
    assert stand.alive(second.process)
    assert await stand.hypervisor.attach(first) is None
    assert (await (await attached(stand, second)).observe()).run is RunState.PRELAUNCH


async def test_a_machine_that_cannot_start_leaves_nothing(stand: Stand) -> None:
    with pytest.raises(MicaError) as caught:
        await stand.hypervisor.launch(stand.broken_plan(make_vm()))
    assert caught.value.code is Code.QEMU_FAILED
    assert "root" in caught.value.message
    assert stand.traces(IDS[0]) == []


async def test_the_agent_and_the_power_button(stand: Stand) -> None:
    """With a guest in it: its agent opens its port, and it powers off when it is asked to."""
    runtime = await stand.hypervisor.launch(stand.plan(make_vm(), boots=True))
    machine = await attached(stand, runtime)
    assert (await machine.observe()).agent is AgentState.WAITING
    kinds: list[EventKind] = []
    ready = asyncio.Event()

    async def listen() -> None:
        async for event in machine.events():
            kinds.append(event.kind)
            if event.kind is EventKind.AGENT:
                ready.set()

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0)
    await machine.resume()
    async with asyncio.timeout(90):
        await ready.wait()
        assert (await machine.observe()).agent is AgentState.READY
        ended = asyncio.create_task(machine.ended())
        while not ended.done():  # what listens to the button starts beside the agent
            try:
                await machine.power_button()
            except MicaError:
                break
            await asyncio.wait({ended}, timeout=1)
        assert (await ended).clean
        await listener
    assert EventKind.SHUTDOWN in kinds
    assert kinds[-1] is EventKind.EXITED


async def test_a_machine_without_an_agent_says_so(stand: Stand) -> None:
    vm = make_vm(spec=msgspec.structs.replace(SPEC, agent=False))
    runtime = await stand.hypervisor.launch(stand.plan(vm))
    assert (await (await attached(stand, runtime)).observe()).agent is AgentState.ABSENT


def test_overhead_grows_with_what_there_is_to_emulate() -> None:
    clock, found = SystemClock(), Path("/")
    for hypervisor in (
        SimulatedHypervisor(SimulatedHost(clock)),
        QemuHypervisor(
            probe=None,  # type: ignore[arg-type]
            users=None,  # type: ignore[arg-type]
            runtime_dir=found,
            log_dir=found,
            join_slice=None,  # type: ignore[arg-type]
            clock=clock,
        ),
    ):
        assert hypervisor.overhead(SPEC) < hypervisor.overhead(msgspec.structs.replace(SPEC, cpus=8))


# ---- QEMU alone


@pytest.mark.guest
async def test_a_cancelled_launch_leaves_nothing(qemu: QemuStand) -> None:
    for after_s in (0.0, 0.02, 0.08, 0.2):
        task = asyncio.create_task(qemu.hypervisor.launch(qemu.plan(make_vm())))
        await asyncio.wait({task}, timeout=after_s)
        task.cancel()
        await asyncio.wait({task})
        if task.cancelled():
            async with asyncio.timeout(10):  # a keeper that was killed takes a moment to be gone
                while qemu.traces(IDS[0]):
                    await asyncio.sleep(0.01)
        await qemu.hypervisor.cleanup(IDS[0], None)
        assert qemu.traces(IDS[0]) == []


@pytest.mark.guest
async def test_a_qemu_that_hangs_is_told_in_time(qemu: QemuStand) -> None:
    hung = await qemu.hypervisor.launch(qemu.plan(make_vm(0)))
    machine = await attached(qemu, hung)
    await machine.resume()
    os.kill(hung.process.pid, signal.SIGSTOP)
    began = time.monotonic()

    async def code_of(ask: Any) -> Code:
        with pytest.raises(MicaError) as caught:
            await ask
        assert caught.value.retryable
        return caught.value.code

    other = make_vm(1)
    another, *codes = await asyncio.gather(
        qemu.hypervisor.launch(qemu.plan(other)),  # others are not held up
        code_of(machine.observe()),
        code_of(qemu.another_daemon().attach(hung)),
    )
    assert codes == [Code.TIMEOUT, Code.TIMEOUT]
    assert time.monotonic() - began < 15
    assert qemu.alive(another.process)
    os.kill(hung.process.pid, signal.SIGCONT)
    async with asyncio.timeout(15):
        assert (await machine.observe()).run is RunState.RUNNING  # it was nothing worse
    os.kill(hung.process.pid, signal.SIGSTOP)
    await machine.kill()  # a stopped process can be killed
    assert not qemu.alive(hung.process)
    assert not (await machine.ended()).clean


@pytest.mark.guest
async def test_what_a_machine_is_given(qemu: QemuStand) -> None:
    """Its processes join the slice before they run; its files are its own; RAM is a file that no path names."""
    spec = msgspec.structs.replace(
        SPEC, nics=(NicSpec(name="net0", network=NetworkKind.NONE, mac="52:54:00:00:00:01"),)
    )
    runtime = await qemu.hypervisor.launch(qemu.plan(make_vm(spec=spec)))
    assert runtime.process.pid in qemu.joined
    ram = Path(f"/proc/{runtime.process.pid}/fd/{runtime.handle['ram']}")
    assert ram.stat().st_size == SPEC.memory
    assert "memfd" in str(ram.readlink())
    run = Path(runtime.run_dir)
    assert run.stat().st_mode & 0o077 == 0
    owner = Path(f"/proc/{runtime.process.pid}").stat().st_uid
    assert run.stat().st_uid == owner
    if os.geteuid() == 0:
        assert owner != 0
    assert runtime.accelerator in ("tcg", "kvm")
    assert ("TCG" in " ".join(runtime.reduced)) == (runtime.accelerator == "tcg")


@pytest.mark.guest
async def test_what_no_qemu_could_run_is_refused(qemu: QemuStand) -> None:
    with pytest.raises(MicaError) as caught:
        await qemu.hypervisor.check(msgspec.structs.replace(SPEC, cpu_model="Nehalen"))
    assert caught.value.code is Code.INVALID
    assert "Nehalem" in caught.value.hint
