"""Images as real guests: they build, boot, answer their agent, keep their promises, and power off."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mica.images import DirectoryImages
from mica.model.image import DebianRecipe, Image, MicroRecipe
from mica.ports.progress import no_progress

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs QEMU"),
]

BOOT_S = 240
OVMF = Path("/usr/share/OVMF")


class Guest:
    """A running QEMU, its monitor and its guest agent."""

    def __init__(self, process: asyncio.subprocess.Process, qmp: Stream, agent: Stream) -> None:
        self.process, self._qmp, self._agent = process, qmp, agent

    async def ready(self) -> None:
        """Wait until the port is opened, then synchronise with the agent (QEMU, qga/qapi-schema.json).

        Firmware may open the port too (OVMF of 2025 does) and swallow the question, so it is asked again and again.
        """
        async with asyncio.timeout(BOOT_S):
            await self._qmp.read()
            await self._qmp.write({"execute": "qmp_capabilities"})
            while True:
                event = await self._qmp.read()
                if event.get("event") == "VSERPORT_CHANGE" and event["data"]["open"]:
                    break
            for number in itertools.count(1):
                sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
                await self._agent.write(sync, prefix=b"\xff")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(2):
                        while (await self._agent.read()).get("return") != number:
                            pass
                        return

    async def ask(self, command: str, **arguments: Any) -> Any:
        async with asyncio.timeout(60):
            await self._agent.write({"execute": command, "arguments": arguments})
            answer = await self._agent.read()
        assert "return" in answer, answer
        return answer["return"]

    async def sh(self, script: str, timeout_s: float = 120) -> str:
        """Standard output of a script that must succeed."""
        started = await self.ask("guest-exec", path="/bin/sh", arg=["-ec", script], **{"capture-output": True})
        async with asyncio.timeout(timeout_s):
            while not (state := await self.ask("guest-exec-status", pid=started["pid"]))["exited"]:
                await asyncio.sleep(0.1)  # the agent has no event for it
        out, err = (base64.b64decode(state.get(name, "")).decode() for name in ("out-data", "err-data"))
        assert state.get("exitcode") == 0, (script, state, out, err)
        return out.strip()

    async def power_off(self, *, button: bool = False) -> None:
        if button:
            await self._qmp.write({"execute": "system_powerdown"})
        else:
            await self._agent.write({"execute": "guest-shutdown"})
        async with asyncio.timeout(90):
            await self.process.wait()


class Stream:
    """JSON objects, one a line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def write(self, value: object, prefix: bytes = b"") -> None:
        self.writer.write(prefix + json.dumps(value).encode() + b"\n")
        await self.writer.drain()

    async def read(self) -> dict[str, Any]:
        line = (await self.reader.readline()).rpartition(b"\xff")[2]
        assert line, "the connection was closed"
        value: dict[str, Any] = json.loads(line)
        return value


@asynccontextmanager
async def guest(
    folder: Path, image: Image, files: Path, *extra: str, memory: str, direct: bool = True, cpus: int = 1
) -> AsyncIterator[Guest]:
    """Start QEMU as a machine of the image; its console goes to ``folder/console``, kept when a test fails."""
    listening: dict[str, asyncio.Future[Stream]] = {}
    servers = []
    for name in ("qmp", "agent"):
        connected = asyncio.get_running_loop().create_future()
        listening[name] = connected
        path = folder / name
        path.unlink(missing_ok=True)
        servers.append(
            await asyncio.start_unix_server(lambda r, w, f=connected: f.set_result(Stream(r, w)), path)  # type: ignore[misc]
        )
    boot: list[str] = []
    if direct:
        assert image.direct_boot is not None
        boot = ["-kernel", str(files / image.direct_boot.kernel), "-initrd", str(files / image.direct_boot.initrd)]
        boot += ["-append", image.direct_boot.cmdline]
    process = await asyncio.create_subprocess_exec(
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi,tb-size=64", "-M", "q35,vmport=off,hpet=off"),
        *("-cpu", "Nehalem", "-m", memory, "-smp", str(cpus), "-nodefaults", "-no-user-config", "-display", "none"),
        *("-chardev", f"socket,id=q,path={folder}/qmp", "-mon", "chardev=q,mode=control"),
        *("-serial", f"file:{folder}/console", "-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=a,path={folder}/agent"),
        *("-device", "virtserialport,id=agent,chardev=a,name=org.qemu.guest_agent.0"),
        *("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n", "-device", "virtio-rng-pci"),
        *boot,
        *extra,
    )
    try:
        async with asyncio.timeout(30):
            running = Guest(process, await listening["qmp"], await listening["agent"])
        await running.ready()
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        for server in servers:
            server.close()
        for future in listening.values():
            if future.done():
                future.result().writer.close()
                with contextlib.suppress(ConnectionError):
                    await future.result().writer.wait_closed()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> DirectoryImages:
    home = tmp_path_factory.mktemp("home")
    return DirectoryImages(home / "images", cache=home / "cache")


@pytest.fixture
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a path short enough for sockets."""
    return tmp_path_factory.mktemp("g")


def leftovers(images: DirectoryImages) -> list[str]:
    work = images._root / ".work"
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(work) in line]
    return [*(path.name for path in work.iterdir()), *mounts]


async def test_micro(images: DirectoryImages, sockets: Path) -> None:
    seen: list[float] = []
    image = await images.make(MicroRecipe(), lambda fraction, text: seen.append(fraction or 0))
    assert seen[0] == 0.0
    assert max(seen) > 0.8
    assert (await images.make(MicroRecipe(name="again"), no_progress)).digest == image.digest
    await images.verify(image, no_progress)
    assert leftovers(images) == []
    files = images.path(image, "initrd").parent
    async with guest(sockets, image, files, memory="96") as machine:
        assert await machine.sh("su nobody -c 'id -u; echo $HOME'") == "65534\n/tmp"
        assert (await machine.ask("guest-get-osinfo"))["id"] == "mica-micro"
        assert await machine.sh("echo hello | sha256sum | cut -c1-8") == "5891b5b5"
        wait = "until ip route | grep -q ^default; do usleep 50000; done; ip addr show eth0; cat /etc/resolv.conf"
        network = await machine.sh(wait)
        assert "inet 10.0.2." in network
        assert "nameserver 10.0.2.3" in network
        assert await machine.sh("nc -l -p 81 -e echo served & sleep 0.3; nc 127.0.0.1 81 </dev/null; wait") == "served"
        # Orphans are reaped by process 1.
        await machine.sh("(sleep 0.1 &); sleep 0.5")
        assert "Z" not in await machine.sh("cat /proc/[0-9]*/stat 2>/dev/null | sed 's/.*) //' | cut -c1 | sort -u")
        await machine.power_off()
    assert "Power down" in (sockets / "console").read_text(errors="replace")


async def test_micro_obeys_the_power_button_and_has_a_console(images: DirectoryImages, sockets: Path) -> None:
    image = await images.make(MicroRecipe(), no_progress)
    files = images.path(image, "initrd").parent
    async with guest(sockets, image, files, memory="128") as machine:
        await machine.sh("until pgrep acpid >/dev/null || pidof acpid; do usleep 50000; done")
        assert "root@micro:" in (sockets / "console").read_text(errors="replace")
        await machine.power_off(button=True)


@pytest.mark.skipif(not (OVMF / "OVMF_CODE_4M.fd").exists(), reason="needs OVMF")
@pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="needs mmdebstrap")
async def test_debian_boots_both_ways_grows_and_takes_a_new_kernel(images: DirectoryImages, sockets: Path) -> None:
    image = await images.make(DebianRecipe(hostname="walrus"), no_progress)
    assert leftovers(images) == []
    assert image.disk is not None
    overlay, variables = sockets / "disk.qcow2", sockets / "vars.fd"
    base = images.path(image, image.disk)
    backing = ["-b", str(base), "-F", "qcow2"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(overlay), "6G"], check=True)
    shutil.copyfile(OVMF / "OVMF_VARS_4M.fd", variables)
    drive = ("-drive", f"file={overlay},if=virtio,format=qcow2")
    async with guest(sockets, image, base.parent, *drive, memory=str(image.min_memory >> 20), cpus=2) as machine:
        assert await machine.sh("systemctl is-system-running --wait", timeout_s=BOOT_S) == "running"
        assert await machine.sh("hostname") == "walrus"
        assert int(await machine.sh("df --output=size -BM / | tail -1 | tr -d ' M'")) > 5000
        assert await machine.sh("ls /etc/ssh/ssh_host_ed25519_key") != ""
        assert "inet 10.0.2." in await machine.sh("ip -4 addr show")
        machine_id = await machine.sh("cat /etc/machine-id")
        assert len(machine_id) == 32
        kernel = await machine.sh("uname -r")
        # What the installation of a kernel package does, without the package.
        new = f"99.{kernel}"
        await machine.sh(
            f"cp -al /lib/modules/{kernel} /lib/modules/{new}; cp /boot/vmlinuz-{kernel} /boot/vmlinuz-{new};"
            f"cp /boot/initrd.img-{kernel} /boot/initrd.img-{new};"
            f"/etc/kernel/postinst.d/zz-systemd-boot {new} /boot/vmlinuz-{new}; sync",
            timeout_s=300,
        )
        await machine.power_off()
    pflash = (f"readonly=on,file={OVMF}/OVMF_CODE_4M.fd", f"file={variables}")
    firmware = [word for options in pflash for word in ("-drive", f"if=pflash,format=raw,{options}")]
    async with guest(sockets, image, base.parent, *drive, *firmware, memory="768", cpus=2, direct=False) as machine:
        entry = await machine.sh("cat /sys/firmware/efi/efivars/LoaderEntrySelected-* | tr -d '\\000'")
        assert f"debian-{new}.conf" in entry
        assert await machine.sh("cat /etc/machine-id") == machine_id
        # Whoever is to hear the button must be there.
        await machine.sh("until systemctl is-active systemd-logind; do sleep 0.5; done", timeout_s=BOOT_S)
        await machine.power_off(button=True)


def _children() -> list[str]:
    """Pids of this process's own children, from whichever thread they were started."""
    return [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


@pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="needs mmdebstrap")
async def test_a_cancelled_debian_build_leaves_nothing(images: DirectoryImages) -> None:
    before = [image.digest for image in await images.present()]
    others = set(_children())  # the daemon of a shared world is a child of this process too
    installing = asyncio.Event()

    def progress(fraction: float | None, text: str) -> None:
        if text.startswith("Setting up"):
            installing.set()

    task = asyncio.create_task(images.make(DebianRecipe(), progress))
    await asyncio.wait({task, asyncio.ensure_future(installing.wait())}, return_when=asyncio.FIRST_COMPLETED)
    children = set(_children()) - others
    assert children
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert leftovers(images) == []
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert [image.digest for image in await images.present()] == before
