"""One suite for everything that attaches NICs: what the engine relies on."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from mica.host.local import SystemClock
from mica.model.errors import Code, MicaError
from mica.model.vm import NetworkKind, NicRuntime, NicSpec, Publish, Vm, VmSpec
from mica.network import passt, proof, slirp
from mica.network.user import UserNetworks
from mica.ports.networks import Networks
from mica.testing.simulated import SimulatedHost
from mica.testing.simulated_ports import SimulatedNetworks

IDS = ["6f9619ff-8b86-4d01-b42d-00cf4fc964f1", "6f9619ff-8b86-4d01-b42d-00cf4fc964f2"]
NICS = (NicSpec(name="net0", publish=(Publish(guest_port=80),)), NicSpec(name="off", network=NetworkKind.NONE))


class Stand(msgspec.Struct, frozen=True):
    """Networks under test. ``another`` makes those of another daemon on this host, which knows nothing yet.

    ``lasts`` says whether a NIC is more than a word to QEMU, so that it is left over when nobody takes it down, and
    ``reserves`` whether its ports are taken from when it is attached.
    """

    another: Callable[[], Networks]
    lasts: bool = True
    reserves: bool = True


def simulated(stack: AsyncExitStack) -> Stand:
    world = SimulatedHost(SystemClock())
    stack.push_async_callback(world.close)
    return Stand(lambda: SimulatedNetworks(world))


def _user(stack: AsyncExitStack, *, slirped: bool) -> Callable[[], Networks]:
    base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="m")))
    base.chmod(0o711)
    places = (base / "a", base / "b")

    def owner(slot: int) -> passt.Owner | None:
        first = 0x7D49_0000 + slot
        return passt.Owner(first + 16384, first + 16384, first) if os.geteuid() == 0 else None

    async def find() -> passt.Passt:
        found = await passt.detect("/nonexistent/passt" if slirped else None)
        return await proof.prove_anywhere(found, places, lambda: owner(0))

    async def instead(lack: MicaError) -> slirp.Slirp:
        return slirp.permit(lack, setting="allow" if slirped else "refuse", root=False, built_in=True)

    return lambda: UserNetworks(places=places, find=find, owner=owner, instead=instead)


def with_passt(stack: AsyncExitStack) -> Stand:
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed")
    return Stand(_user(stack, slirped=False))


def with_slirp(stack: AsyncExitStack) -> Stand:
    return Stand(_user(stack, slirped=True), lasts=False, reserves=False)


# Whoever adds an implementation adds it here.
STANDS: dict[str, Callable[[AsyncExitStack], Stand]] = {
    "simulated": simulated,
    "passt": with_passt,
    "slirp": with_slirp,
}


@pytest.fixture(params=sorted(STANDS))
async def stand(request: pytest.FixtureRequest) -> AsyncIterator[Stand]:
    async with AsyncExitStack() as stack:
        made = STANDS[request.param](stack)
        try:
            yield made
        finally:
            for vm_id in IDS:
                await made.another().remove(vm_id)


def vm(number: int, *publish: Publish) -> Vm:
    nics = (msgspec.structs.replace(NICS[0], publish=publish), *NICS[1:]) if publish else NICS
    return Vm(
        id=IDS[number], name=f"vm{number}", spec=VmSpec(nics=nics), slot=7 + number, created_at=0.0, created_by="lab"
    )


async def attach(networks: Networks, machine: Vm) -> list[NicRuntime]:
    """As the engine has it: through its journal."""
    nics = [await networks.attach(machine, nic.name) for nic in machine.spec.nics]
    return msgspec.json.decode(msgspec.json.encode(nics), type=list[NicRuntime])


async def test_nics_are_attached_and_detached(stand: Stand) -> None:
    networks = stand.another()
    first, second = vm(0), vm(1)
    nics, others = await attach(networks, first), await attach(networks, second)
    assert [nic.name for nic in nics] == ["net0", "off"]
    assert len({nics[0].address, others[0].address, ""}) == 3
    assert nics[1].address == ""
    ports = {nics[0].publish[0].host_port, others[0].publish[0].host_port}
    assert 0 not in ports
    assert len(ports) == 2 or not stand.reserves
    later = stand.another()
    for nic in (*nics, *others):
        assert await later.healthy(nic)
    for nic in nics:
        await later.detach(first.id, nic)
        await later.detach(first.id, nic)
    assert not stand.lasts or not await later.healthy(nics[0])
    assert await later.healthy(others[0])


async def test_attaching_again_replaces(stand: Stand) -> None:
    networks, machine = stand.another(), vm(0)
    port = (await attach(networks, machine))[0].publish[0].host_port
    again = (await attach(stand.another(), vm(0, Publish(80, port))))[0]
    assert again.publish[0].host_port == port
    assert await networks.healthy(again)


async def test_a_port_that_another_vm_has(stand: Stand) -> None:
    if not stand.reserves:
        pytest.skip("its ports are taken by QEMU")
    networks = stand.another()
    port = (await attach(networks, vm(0)))[0].publish[0].host_port
    with pytest.raises(MicaError) as caught:
        await attach(networks, vm(1, Publish(80, port)))
    assert caught.value.code is Code.IN_USE
    assert str(port) in caught.value.message


async def test_detaching_what_was_never_heard_of(stand: Stand) -> None:
    """An attachment that was interrupted has no handle yet."""
    networks, machine = stand.another(), vm(0)
    await attach(networks, machine)
    later = stand.another()
    for nic in machine.spec.nics:
        await later.detach(machine.id, NicRuntime(name=nic.name))
    assert await later.owners() == set()


async def test_what_is_left_over_is_known_and_removed(stand: Stand) -> None:
    networks = stand.another()
    assert await networks.owners() == set()
    await networks.remove(IDS[0])  # there is nothing
    nics = [(await attach(networks, vm(number)))[0] for number in (0, 1)]
    later = stand.another()
    assert await later.owners() == (set(IDS) if stand.lasts else set())
    await later.remove(IDS[0])
    await later.remove(IDS[0])
    assert await later.owners() == (set(IDS[1:]) if stand.lasts else set())
    if stand.lasts:
        assert [await later.healthy(nic) for nic in nics] == [False, True]
    await later.detach(IDS[1], nics[1])
    await later.detach(IDS[1], NicRuntime(name="off"))
    assert await later.owners() == set()
