"""Who may use QEMU's own user mode where passt cannot be had, and what a NIC is given then."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from mica.daemon.settings import load
from mica.model.errors import Code, MicaError
from mica.model.vm import NicRuntime, NicSpec, Publish, Vm, VmSpec
from mica.network import passt, slirp
from mica.network.user import UserNetworks
from mica.qemu.arguments import Bus
from mica.qemu.devices import nic as device

MISSING = MicaError(Code.HOST_LACKS, "passt is missing", hint="get it", details={"program": "passt"})


@pytest.mark.parametrize(
    ("setting", "root", "built_in", "says"),
    [
        ("", False, True, None),
        ("allow", False, True, None),
        ("allow", True, True, None),
        ("", True, True, "to root"),
        ("refuse", True, True, "by a setting"),
        ("refuse", False, True, "by a setting"),
        ("allow", False, False, "built without"),
    ],
)
def test_who_may(setting: str, root: bool, built_in: bool, says: str | None) -> None:
    if says is None:
        leave = slirp.permit(MISSING, setting=setting, root=root, built_in=built_in)
        assert leave.why == "passt is missing"
        assert "loopback" in leave.costs
        return
    with pytest.raises(MicaError) as caught:
        slirp.permit(MISSING, setting=setting, root=root, built_in=built_in)
    assert (caught.value.message, caught.value.details) == (MISSING.message, MISSING.details)
    assert says in caught.value.hint
    assert caught.value.hint.startswith("get it; ")
    assert ("slirp = allow" in caught.value.hint) == built_in


@pytest.mark.parametrize("code", [Code.FORBIDDEN, Code.TIMEOUT])
def test_what_is_no_lack_of_passt_is_no_reason(code: Code) -> None:
    """A directory that somebody else made where ours should be must not lead to less isolation."""
    with pytest.raises(MicaError) as caught:
        slirp.permit(MicaError(code, "something else"), setting="allow", root=False, built_in=True)
    assert caught.value.code is code


def vm(*publish: Publish, nics: int = 1) -> Vm:
    spec = VmSpec(nics=tuple(NicSpec(name=f"net{n}", publish=publish if n == 0 else ()) for n in range(nics)))
    return Vm(id="00000000-0000-4000-8000-000000000007", name="a", spec=spec, slot=7, created_at=0, created_by="t")


def networks(tmp_path: Path, find: Callable[[], Awaitable[passt.Passt]]) -> UserNetworks:
    async def instead(lack: MicaError) -> slirp.Slirp:
        return slirp.permit(lack, setting="allow", root=True, built_in=True)

    return UserNetworks(places=[tmp_path / "net"], find=find, owner=lambda _: None, instead=instead)


async def no_passt() -> passt.Passt:
    return await passt.detect("/nonexistent/passt")


async def test_a_nic_without_passt(tmp_path: Path) -> None:
    plant = networks(tmp_path, no_passt)
    machine = vm(Publish(guest_port=22), Publish(guest_port=53, protocol="udp"), nics=2)
    made = [await plant.attach(machine, spec.name) for spec in machine.spec.nics]
    made = msgspec.json.decode(msgspec.json.encode(made), type=list[NicRuntime])  # as a later daemon has it
    first, second = made
    assert first.address
    assert first.address != second.address
    ports = [publish.host_port for publish in first.publish]
    assert all(ports)
    assert first.processes == ()
    assert "/nonexistent/passt" in first.reduced[0]
    options = dict(device.arguments(machine.spec.nics[0], first, Bus(), hub=0, bootindex=None).items)["netdev"]
    assert f'"tcp:127.0.0.1:{ports[0]}-{first.address}:22"' in options
    assert f'"udp:127.0.0.1:{ports[1]}-{first.address}:53"' in options
    for nic in made:
        assert device.needs_host_network(nic)
        assert await plant.healthy(nic)
        await plant.detach(machine.id, nic)
    assert not (tmp_path / "net").exists()


async def test_passt_is_taken_as_soon_as_it_is_there(tmp_path: Path) -> None:
    found: list[passt.Passt] = []

    async def find() -> passt.Passt:
        if not found:
            return await no_passt()
        raise MicaError(Code.TIMEOUT, "asked again")  # a timeout is no reason for slirp, so it shows

    plant = networks(tmp_path, find)
    assert (await plant.attach(vm(), "net0")).reduced
    found.append(passt.Passt("/usr/bin/passt", frozenset()))
    with pytest.raises(MicaError, match="asked again"):
        await plant.attach(vm(), "net0")


def test_ports_that_only_passt_could_publish(tmp_path: Path) -> None:
    limit = tmp_path / "sys/net/ipv4/ip_unprivileged_port_start"
    limit.parent.mkdir(parents=True)
    limit.write_text("81\n")
    slirp.check((Publish(22, 8022), Publish(80, 81, "0.0.0.0")), tmp_path)
    for wish, code in ((Publish(80, 80), Code.FORBIDDEN), (Publish(80, 8080, "::1"), Code.INVALID)):
        with pytest.raises(MicaError) as caught:
            slirp.check((wish,), tmp_path)
        assert caught.value.code is code
        assert str(wish.guest_port) in caught.value.message
        assert "passt" in caught.value.hint
    limit.unlink()  # an old kernel
    with pytest.raises(MicaError):
        slirp.check((Publish(80, 1023),), tmp_path)


@pytest.mark.parametrize(("name", "value"), [("slirp", "yes"), ("passt", "/usr/bin/pasta")])
def test_settings_that_cannot_be(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(MicaError, match=value):
        load({"home": str(tmp_path), name: value}, {"XDG_RUNTIME_DIR": str(tmp_path)})
