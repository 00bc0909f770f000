"""What a VM may be made of: every bad field is refused, and named."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mica.model.errors import Code, MicaError
from mica.model.image import DiskFormat, Firmware
from mica.model.units import MIB, Bytes
from mica.model.vm import (
    LIVE_FIELDS,
    MAX_CPUS,
    MAX_DISKS,
    MAX_NICS,
    DiskSpec,
    IoLimits,
    Machine,
    NicSpec,
    Publish,
    VmSpec,
    check_labels,
    check_name,
    check_spec,
    pending_changes,
)

ROOT = DiskSpec(name="root", size=Bytes(MIB))


def disks(*names: str) -> tuple[DiskSpec, ...]:
    return tuple(DiskSpec(name=name, size=Bytes(MIB)) for name in names)


def nic(*publish: Publish, name: str = "net0") -> dict[str, Any]:
    return {"nics": (NicSpec(name=name, publish=publish),)}


GOOD: list[dict[str, Any]] = [
    {},
    {"cpus": MAX_CPUS},
    {"memory": Bytes(32 * MIB)},
    {"cpu_limit": 0.01},
    {"cpu_limit": 1024},
    {"stop_timeout_s": 0},
    {"stop_timeout_s": 86400},
    {"hostname": "web-1"},
    {"disks": disks(*(f"d{n}" for n in range(MAX_DISKS)))},
    {"nics": tuple(NicSpec(name=f"n{n}") for n in range(MAX_NICS))},
    {"nics": ()},
    {"disks": (ROOT,), "boot": ("net0", "root")},
    {"machine": Machine.MINIMAL},
    {"firmware": Firmware.UEFI},
    nic(Publish(80), Publish(80), Publish(65535, 65535, "::", "udp")),
    nic(Publish(80, 8080), Publish(80, 8080, protocol="udp"), Publish(80, 8080, host_address="127.0.0.2")),
]


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_what_can_exist(fields: dict[str, Any]) -> None:
    spec = VmSpec(**fields)
    assert check_spec(spec) is spec


BAD: list[tuple[dict[str, Any], str]] = [
    ({"cpus": 0}, "0 vCPUs"),
    ({"cpus": MAX_CPUS + 1}, "256 vCPUs"),
    ({"memory": Bytes(31 * MIB)}, "31 MiB is below 32 MiB"),
    ({"memory": Bytes(32 * MIB + 1)}, "whole number of MiB"),
    ({"memory": Bytes(-MIB)}, "below"),
    ({"cpu_limit": 0.0}, "CPU limit of 0.0"),
    ({"cpu_limit": -1.0}, "CPU limit of -1.0"),
    ({"cpu_limit": 1025.0}, "CPU limit of 1025"),
    ({"cpu_limit": float("nan")}, "CPU limit of nan"),
    ({"stop_timeout_s": -1.0}, "time-out of -1"),
    ({"stop_timeout_s": 86401.0}, "time-out of 86401"),
    ({"stop_timeout_s": float("nan")}, "time-out of nan"),
    ({"hostname": "web_1"}, "hostname 'web_1'"),
    ({"disks": disks("Root")}, "disk name 'Root'"),
    ({"disks": disks("../x")}, r"disk name '\.\./x'"),
    ({"disks": disks("")}, "disk name ''"),
    ({"disks": (DiskSpec(name="d", size=Bytes(MIB - 512)),)}, "disk d of 1023.5 KiB is below 1 MiB"),
    ({"disks": (DiskSpec(name="d", size=Bytes(MIB + 1)),)}, "disk d: 1048577 bytes is not a multiple of 512"),
    ({"disks": disks(*(f"d{n}" for n in range(MAX_DISKS + 1)))}, "at most 16 disks"),
    ({"nics": tuple(NicSpec(name=f"n{n}") for n in range(MAX_NICS + 1))}, "8 NICs"),
    ({"nics": (NicSpec(name="net 0"),)}, "NIC name 'net 0'"),
    ({"disks": disks("a", "a")}, "two devices are named 'a'"),
    ({"disks": disks("net0")}, "two devices are named 'net0'"),
    ({"boot": ("root",)}, "boot order names 'root'"),
    ({"machine": Machine.MINIMAL, "firmware": Firmware.UEFI}, "minimal machine has no UEFI"),
    (nic(Publish(0)), "publish 0:0"),
    (nic(Publish(65536)), "publish 0:65536"),
    (nic(Publish(80, -1)), "publish -1:80"),
    (nic(Publish(80, 65536)), "publish 65536:80"),
    (nic(Publish(80, protocol="sctp")), "protocol 'sctp'"),
    (nic(Publish(80, 8080), Publish(81, 8080)), "port 8080 is published twice"),
]


@pytest.mark.parametrize(("fields", "match"), BAD, ids=str)
def test_what_cannot_exist_is_refused_and_named(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(MicaError, match=match) as caught:
        check_spec(VmSpec(**fields))
    assert caught.value.code is Code.INVALID


def test_a_port_published_by_two_nics_is_refused() -> None:
    two = (NicSpec(name="a", publish=(Publish(80, 8080),)), NicSpec(name="b", publish=(Publish(80, 8080),)))
    with pytest.raises(MicaError, match="8080"):
        check_spec(VmSpec(nics=two))


def test_a_limit_below_zero_is_refused() -> None:
    spec = VmSpec(disks=(DiskSpec(name="d", size=Bytes(MIB), limits=IoLimits(iops=-1)),))
    with pytest.raises(MicaError, match="limit"):
        check_spec(spec)


@pytest.mark.parametrize("name", ["a", "a1", "1a", "web-1", "a" * 63, "x--y"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "a_b", "a b", "ä", "a" * 64, "a/b", "\na"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(MicaError) as caught:
        check_name(name, "image name")
    assert caught.value.code is Code.INVALID
    assert caught.value.message.startswith("image name")


@pytest.mark.parametrize("name", ["a\n"])
def test_a_name_does_not_end_with_a_newline(name: str) -> None:
    with pytest.raises(MicaError):
        check_name(name)


def test_labels() -> None:
    labels = {"team": "web", "example.com/tier": "", "n": "ä" * 255}
    assert check_labels(labels) is labels


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"-a": "x"},
        {"a b": "x"},
        {"a" * 64: "x"},
        {"a": "x" * 256},
        {"a": "line\nline"},
        {str(n): "" for n in range(65)},
    ],
    ids=lambda labels: str(labels)[:20],
)
def test_what_is_no_label(labels: dict[str, str]) -> None:
    with pytest.raises(MicaError) as caught:
        check_labels(labels)
    assert caught.value.code is Code.INVALID


@pytest.mark.parametrize(
    "changed",
    [
        {"cpus": 2},
        {"memory": Bytes(512 * MIB)},
        {"machine": Machine.MINIMAL},
        {"firmware": Firmware.UEFI},
        {"cpu_model": "max"},
        {"image": "blake3:1"},
        {"disks": disks("new")},
        {"nics": ()},
        {"boot": ("root",)},
        {"display": False},
        {"agent": False},
        {"hostname": "new"},
    ],
    ids=str,
)
def test_what_waits_for_a_restart_is_pending(changed: dict[str, Any]) -> None:
    spec = VmSpec(disks=(ROOT,))
    assert pending_changes(msgspec.structs.replace(spec, **changed), spec) == tuple(changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"cpu_limit": 0.5},
        {"autostart": True},
        {"protected": True},
        {"ephemeral": True},
        {"stop_timeout_s": 5.0},
        {"disks": (msgspec.structs.replace(ROOT, limits=IoLimits(iops=100)),)},
    ],
    ids=str,
)
def test_what_reaches_a_running_machine_is_not_pending(changed: dict[str, Any]) -> None:
    spec = VmSpec(disks=(ROOT,))
    assert pending_changes(msgspec.structs.replace(spec, **changed), spec) == ()


def test_every_field_is_either_live_or_pending() -> None:
    assert set(VmSpec.__struct_fields__) >= LIVE_FIELDS


@given(
    st.builds(
        VmSpec,
        cpus=st.integers(-1, 300),
        memory=st.integers(-1, 2**40).map(Bytes),
        cpu_limit=st.none() | st.floats(),
        stop_timeout_s=st.floats(),
        disks=st.lists(
            st.builds(
                DiskSpec,
                name=st.text("ab-A.", max_size=3),
                size=st.integers(0, 2**40).map(Bytes),
                format=st.sampled_from(DiskFormat),
            ),
            max_size=3,
        ).map(tuple),
    )
)
def test_any_spec_is_possible_or_invalid_and_travels_as_json(spec: VmSpec) -> None:
    with contextlib.suppress(MicaError):
        checked = check_spec(spec)
        assert msgspec.json.decode(msgspec.json.encode(checked), type=VmSpec) == checked
