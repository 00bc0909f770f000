"""QEMU's arguments for typical machines, compared with what they were; ``pytest tests/golden --regenerate`` renews.

A line of a golden file is an option with its value. A change here is a change of every VM's hardware at its next
start, so it is looked at and meant.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mica.host.processes import LiveProcess, spawn
from mica.model.errors import Code, MicaError
from mica.model.image import DiskFormat
from mica.model.vm import NetworkKind, VmSpec
from mica.qemu.accel import Accelerator
from mica.qemu.command_line import QemuHost, build_arguments
from mica.qemu.devices import disk
from mica.qemu.discover import Qemu, QemuBuild
from mica.qemu.machine import complete
from mica.qemu.qmp import Monitor
from tests.golden.cases import FORK, SPECS, Place, arguments_of, lines_of, place_of, plan_of, volumes_of
from tests.golden.keys import FILES, Written, written
from tests.golden.record import lacking, recorded

EXPECTED = Path(__file__).with_name("expected")
HOSTS: dict[str, tuple[QemuBuild, Accelerator]] = {
    "tcg": (recorded(), Accelerator.TCG),
    "kvm": (recorded(), Accelerator.KVM),
    "lacking": (lacking(), Accelerator.TCG),
}
CASES = [(name, host) for name in SPECS for host in HOSTS]


def compare(file: Path, text: str, *, regenerate: bool) -> None:
    if regenerate:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return
    assert file.exists(), f"{file.name} is missing: run with --regenerate, look at it, and commit it"
    assert text == file.read_text(encoding="utf-8"), f"{file.name} differs; if that is meant: --regenerate"


@pytest.mark.parametrize(("name", "host"), CASES, ids=[f"{name}.{host}" for name, host in CASES])
def test_arguments_are_what_they_were(name: str, host: str, regenerate: bool) -> None:
    build, accelerator = HOSTS[host]
    argv = arguments_of(SPECS[name], place_of(name), build, accelerator)
    assert argv == arguments_of(SPECS[name], place_of(name), build, accelerator)  # the same machine at every start
    compare(EXPECTED / f"{name}.{host}.txt", lines_of(argv), regenerate=regenerate)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.disks])
def test_limits_are_what_they_were(name: str, regenerate: bool) -> None:
    text = "".join(json.dumps(disk.throttle(one)) + "\n" for one in SPECS[name].disks)
    compare(EXPECTED / f"{name}.throttle.json", text, regenerate=regenerate)


def test_no_golden_file_is_left_over() -> None:
    wanted = {f"{name}.{host}.txt" for name, host in CASES} | {
        f"{n}.throttle.json" for n, s in SPECS.items() if s.disks
    }
    assert {file.name for file in EXPECTED.iterdir()} == wanted


def golden_lines() -> list[str]:
    return [line for file in EXPECTED.glob("*.txt") for line in file.read_text(encoding="utf-8").splitlines()]


def test_everything_that_can_be_written_is_written_in_a_golden_file() -> None:
    lines, known = golden_lines(), written()
    # The reading itself is held to what is known to be there, or it could find nothing for ever.
    assert len(known) > 120
    assert {item.file for item in known} == {file.name for file in FILES} - {"__init__.py"}
    for one in (
        Written("balloon.py", "virtio-balloon-pci", "free-page-reporting"),
        Written("command_line.py", "-sandbox", "spawn"),
        Written("display.py", "VGA", ""),
        Written("disk.py", "native", ""),
        Written("accel.py", "-accel", "tb-size"),
        Written("machine.py", "-machine", "pflash0"),
    ):
        assert one in known
    assert not Written("balloon.py", "virtio-balloon-pci", "iothread").found_in(lines)
    missing = [item for item in sorted(known) if not item.found_in(lines)]
    assert not missing, "no machine in cases.py has these: add one\n" + "\n".join(map(str, missing))


def test_what_a_qemu_lacks_is_left_out() -> None:
    for name, spec in SPECS.items():
        text = lines_of(arguments_of(spec, place_of(name), lacking(), Accelerator.TCG))
        for absent in ("-sandbox", "virtio-vga", "vmgenid", "free-page-reporting", "virtio-tablet"):
            assert absent not in text


def test_ids_and_places_are_unique() -> None:
    """Two devices with one id, or at one place of a bus, are refused by QEMU when the machine starts."""
    for name, spec in SPECS.items():
        argv = arguments_of(spec, place_of(name), recorded(), Accelerator.TCG)
        devices = [json.loads(value) for option, value in itertools.pairwise(argv) if option == "-device"]
        ids = [device["id"] for device in devices]
        places = [(d["bus"], d.get("addr")) for d in devices if "bus" in d]
        assert len(ids) == len(set(ids))
        assert len(places) == len(set(places))


def test_a_uefi_machine_without_firmware_is_refused() -> None:
    plan = plan_of(SPECS["debian"], Place())
    host = QemuHost(build=recorded(), accelerator=Accelerator.TCG, direct_io=lambda _: True)
    with pytest.raises(MicaError, match="UEFI") as caught:
        build_arguments(plan, host, Place().sockets, Place().ram, Place().console)
    assert caught.value.code is Code.HOST_LACKS
    assert "ovmf" in caught.value.hint


# ---- the QEMU of this host takes them


@contextlib.contextmanager
def real_place(spec: VmSpec) -> Iterator[Place]:
    """The files that a machine is started with, short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="m") as name:
        base = Path(name)
        place = Place(home=base / "h, o=d", runtime=base / "r,", ram=base / "ram", firmware=base / "CODE.fd")
        listeners: list[socket.socket] = []
        for directory in (place.image, place.volumes, place.console.parent, place.sockets.directory):
            directory.mkdir(parents=True)
        for file in (place.ram, place.console, place.image / "vmlinuz", place.image / "initrd"):
            file.touch()
        place.firmware.write_bytes(bytes(1024 * 1024))
        (place.image / "vmlinuz").write_bytes(_boot_sector())
        (place.image / "initrd").write_bytes(b"initrd")
        try:
            for nic in (n for n in spec.nics if n.network == NetworkKind.USER):
                place.link(nic.name).parent.mkdir(parents=True)
                listeners.append(socket.socket(socket.AF_UNIX))
                listeners[-1].bind(str(place.link(nic.name)))
                listeners[-1].listen()
            yield place
        finally:
            for listener in listeners:
                listener.close()


def _boot_sector() -> bytes:
    """The least that QEMU takes for a Linux kernel (Linux, Documentation/arch/x86/boot.rst): it is never run."""
    sector = bytearray(4096)
    sector[0x1F1] = 4
    sector[0x1FE:0x200] = b"\x55\xaa"
    sector[0x202:0x206] = b"HdrS"
    sector[0x206:0x208] = (0x020C).to_bytes(2, "little")
    sector[0x211] = 1
    sector[0x22C:0x230] = (0x7FFFFFFF).to_bytes(4, "little")
    return bytes(sector)


async def make_volumes(spec: VmSpec, place: Place) -> None:
    for volume in volumes_of(spec, place):
        form = ("-f", "raw") if volume.format is DiskFormat.RAW else ("-f", "qcow2")
        process = await asyncio.create_subprocess_exec("qemu-img", "create", "-q", *form, volume.path, str(volume.size))
        assert await process.wait() == 0


async def greeted(name: str, process: LiveProcess, place: Place, words: Path) -> Monitor:
    async with asyncio.timeout(20):
        while True:
            assert process.alive, words.read_text()
            if place.sockets.control.exists():
                with contextlib.suppress(MicaError):  # it exists before QEMU listens
                    return await Monitor.connect(name, place.sockets.control)
            await asyncio.sleep(0.01)


@pytest.mark.guest
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")
@pytest.mark.parametrize("name", [name for name in SPECS if name not in ("large", "odd-paths")])
async def test_the_qemu_of_this_host_takes_them(name: str, tmp_path: Path) -> None:
    build = await Qemu(path="/usr/local/bin:/usr/bin", cache=tmp_path / "cache").build()
    spec = SPECS[name]
    with real_place(spec) as place:
        await make_volumes(spec, place)
        argv = arguments_of(spec, place, build, Accelerator.TCG)
        words = tmp_path / "words"
        with spawn(argv, stdout=words, stderr=words) as process:
            try:
                monitor = await greeted(name, process, place, words)
                status = await monitor.run("query-status")
                await complete(monitor, spec)
                blocks = await monitor.run("query-block")
                await monitor.run("quit")
                await process.wait_exit(20)
                await monitor.close()
            finally:
                process.kill()
        assert status["status"] == ("inmigrate" if name == FORK else "prelaunch")
        limited = {d["qdev"]: d["inserted"] for d in blocks if d.get("qdev", "").startswith("/machine/peripheral/")}
        assert {one.name for one in spec.disks} == {path.split("/")[3].removeprefix("dev-") for path in limited}
        for one in spec.disks:
            inserted = limited[disk.throttle(one)["id"]]
            assert (inserted["iops"], inserted["bps"]) == (one.limits.iops, one.limits.bytes_per_s)
        alone = ("is not connected to host network", "netdev past-0 has no peer")
        said = [line for line in words.read_text().splitlines() if not line.endswith(alone)]
        assert not said, "QEMU has something to say about its arguments"
