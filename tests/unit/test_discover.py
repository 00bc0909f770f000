"""QEMU as it is found: the real one, and programs that only have its name."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from mica.model.errors import Code, MicaError
from mica.qemu.discover import Qemu, QemuBuild, find_tools, search_path

_PATH = "/usr/bin:/bin"
needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64", path=_PATH) is None, reason="qemu-system-x86_64 is not installed"
)

# A QEMU small enough to read: it answers what it is asked, as the schema's own format demands.
_SCHEMA = [
    {"name": "query-status", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
    {"name": "object-add", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
    {"name": "netdev_add", "meta-type": "command", "arg-type": "2", "ret-type": "0"},
    {"name": "migrate-set-capabilities", "meta-type": "command", "arg-type": "3", "ret-type": "0"},
    {"name": "0", "meta-type": "object", "members": []},
    {
        "name": "1",
        "meta-type": "object",
        "tag": "qom-type",
        "members": [{"name": "qom-type", "type": "kinds"}, {"name": "id", "type": "str"}],
        "variants": [{"case": "memory-backend-file", "type": "backend"}, {"case": "iothread", "type": "0"}],
    },
    {"name": "kinds", "meta-type": "enum", "values": ["memory-backend-file", "iothread"]},
    {"name": "backend", "meta-type": "object", "members": [{"name": "rom", "type": "str"}]},
    {
        "name": "2",
        "meta-type": "object",
        "tag": "type",
        "members": [{"name": "type", "type": "backends"}],
        "variants": [{"case": "stream", "type": "stream"}],
    },
    {"name": "backends", "meta-type": "enum", "values": ["stream", "netmap"]},
    {"name": "stream", "meta-type": "object", "members": [{"name": "reconnect-ms", "type": "int"}]},
    {"name": "3", "meta-type": "object", "members": [{"name": "capabilities", "type": "[c]"}]},
    {"name": "[c]", "meta-type": "array", "element-type": "c"},
    {"name": "c", "meta-type": "object", "members": [{"name": "capability", "type": "caps"}]},
    {"name": "caps", "meta-type": "enum", "values": ["x-ignore-shared"]},
]

_TINY = f"""
import json, sys
if "-netdev" in sys.argv:
    print("Available netdev backend types:\\nstream\\nuser")
    sys.exit()
say = lambda **message: print(json.dumps(message), flush=True)
say(QMP={{"version": {{"qemu": {{"major": 11, "minor": 0, "micro": 1}}, "package": ""}}, "capabilities": []}})
answers = {{
    "query-machines": [{{"name": "pc-q35-11.0", "alias": "q35"}}, {{"name": "microvm"}}],
    "query-cpu-definitions": [{{"name": "max"}}],
    "query-command-line-options": [{{"option": "run-with", "parameters": [{{"name": "user"}}]}}],
    "query-qmp-schema": {_SCHEMA!r},
}}
for line in sys.stdin:
    request = json.loads(line)
    verb, arguments = request["execute"], request.get("arguments", {{}})
    if verb == "qom-list-types" and arguments:
        value = [{{"name": "accel"}}, {{"name": "tcg-accel"}}]
    elif verb == "qom-list-types":
        value = [{{"name": "virtio-blk-pci"}}, {{"name": "memory-backend-file"}}]
    elif verb == "device-list-properties":
        if arguments["typename"] != "virtio-blk-pci":
            say(error={{"class": "DeviceNotFound", "desc": "no"}}, id=request["id"])
            continue
        value = [{{"name": "drive", "type": "str"}}]
    else:
        value = answers.get(verb, {{}})
    say(**{{"return": value, "id": request["id"]}})
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    def make(body: str) -> Path:
        file = tmp_path / "qemu"
        file.write_text(f"#!{sys.executable}\n{body}")
        file.chmod(0o755)
        return file

    return make


def _qemu(binary: Path | str, tmp_path: Path, timeout_s: float = 20.0) -> Qemu:
    return Qemu(path=_PATH, cache=tmp_path / "cache", binary=str(binary), timeout_s=timeout_s)


@needs_qemu
async def test_the_installed_qemu_says_what_it_can_do(tmp_path: Path) -> None:
    build = await Qemu(path=_PATH, cache=tmp_path / "cache").build()
    assert build.version_tuple >= (7, 2, 0)
    assert build.version.startswith(".".join(map(str, build.version_tuple)))
    assert build.machine("q35").startswith("pc-q35-")
    assert build.has_machine("microvm")
    assert "tcg" in build.accelerators
    assert build.has_cpu_model("Nehalem")
    assert all(build.has_device(name) for name in ("virtio-blk-pci", "virtio-net-pci", "vmgenid"))
    assert build.has_command("blockdev-add", "driver")
    assert not build.has_command("blockdev-add", "nonsense")
    assert build.has_object("memory-backend-file", "share")
    assert build.has_netdev("stream", "addr")
    assert not build.has_netdev("netmap")
    assert build.has_blockdev("qcow2", "file")
    assert build.has_sandbox
    assert build.has_option("sandbox", "spawn")
    assert "x-ignore-shared" in build.migration_capabilities
    assert build.has_property("virtio-balloon-pci", "free-page-reporting")
    with pytest.raises(MicaError, match="pc-q35-99"):
        build.machine("pc-q35-99.0")


@needs_qemu
async def test_the_second_look_does_not_start_qemu(tmp_path: Path) -> None:
    qemu = Qemu(path=_PATH, cache=tmp_path / "cache")
    first_start = time.perf_counter()
    first = await qemu.build()
    cached_start = time.perf_counter()
    second = await qemu.build()
    cached = time.perf_counter() - cached_start
    assert first == second
    assert cached < (cached_start - first_start) / 5


async def test_what_qemu_answers_is_what_the_build_says(program: Callable[[str], Path], tmp_path: Path) -> None:
    build = await _qemu(program(_TINY), tmp_path).build()
    assert (build.version, build.version_tuple) == ("11.0.1", (11, 0, 1))
    assert (build.aliases, build.accelerators) == ({"q35": "pc-q35-11.0"}, ("tcg",))
    assert build.has_object("memory-backend-file", "rom")
    assert not build.has_object("iothread"), "named in the schema, but not a type of this binary"
    assert build.has_netdev("stream", "reconnect-ms")
    assert build.has_netdev("user"), "built in, though this schema does not describe it"
    assert not build.has_netdev("netmap"), "named in the schema, but not built in"
    assert build.has_option("run-with", "user")
    assert not build.has_option("run-with", "chroot")
    assert not build.has_sandbox
    assert build.has_property("virtio-blk-pci", "drive")
    assert not build.has_property("vmgenid", "guid")
    assert not build.has_blockdev("qcow2")


async def test_a_replaced_binary_is_asked_again(program: Callable[[str], Path], tmp_path: Path) -> None:
    qemu = _qemu(program(_TINY), tmp_path)
    assert (await qemu.build()).version_tuple == (11, 0, 1)
    program(_TINY.replace('"major": 11', '"major": 12'))
    assert (await qemu.build()).version_tuple == (12, 0, 1)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\x00", b'{"path": 3}'])
async def test_a_damaged_cache_is_not_believed(program: Callable[[str], Path], tmp_path: Path, damage: bytes) -> None:
    qemu = _qemu(program(_TINY), tmp_path)
    good = await qemu.build()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(damage)
    assert await qemu.build() == good
    assert msgspec.json.decode(file.read_bytes(), type=QemuBuild) == good


async def test_a_cache_that_cannot_be_written_only_costs_time(program: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert (await _qemu(program(_TINY), tmp_path).build()).version == "11.0.1"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import sys; sys.exit('cannot find my library')", "status 1.*cannot find my library"),
        ("print('Hello, World!')", "does not speak QMP.*Hello, World!"),
        ("print('[1, 2]')", "did not answer on QMP"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "status -11"),
        ("pass", "did not answer on QMP"),
        (_TINY.replace("query-machines", "query-nothing"), "not QEMU's"),
        ("print('x' * 17_000_000)", "more than 16777216 bytes"),
    ],
    ids=["fails", "greets", "wrong-json", "crashes", "silent", "no-machines", "floods"],
)
async def test_a_broken_qemu_is_named_with_its_last_words(
    program: Callable[[str], Path], tmp_path: Path, body: str, words: str
) -> None:
    binary = program(body)
    with pytest.raises(MicaError, match=words) as caught:
        await _qemu(binary, tmp_path).build()
    assert caught.value.code is Code.HOST_LACKS
    assert str(binary) in caught.value.message
    assert "apt-get install -y qemu-system-x86" in caught.value.hint
    assert not (tmp_path / "cache").exists(), "only a working QEMU is remembered"


async def test_a_qemu_that_hangs_is_killed_at_the_deadline(program: Callable[[str], Path], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    body = f"import os, signal\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\nwhile True: signal.pause()\n"
    with pytest.raises(MicaError, match=r"did not end within 0\.5 s"):
        await _qemu(program(body), tmp_path, timeout_s=0.5).build()
    for pid in pids.read_text().split():
        assert not Path(f"/proc/{pid}").exists()


async def test_cancelling_kills_it_too(program: Callable[[str], Path], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    binary = program(
        f"import os, signal\npipe = os.open({str(pids)!r}, os.O_WRONLY)\n"
        "os.write(pipe, b'%d ' % os.getpid())\nos.close(pipe)\nsignal.pause()"
    )
    task = asyncio.create_task(_qemu(binary, tmp_path).build())
    text = await asyncio.to_thread(pids.read_text)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(Path(f"/proc/{pid}").exists() for pid in text.split())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", "there is no QEMU: .*/qemu does not exist"),
        ("directory", "not a program"),
        ("text", "not a program"),
        ("foreign", "cannot be executed"),
    ],
)
async def test_what_is_no_program_is_refused(tmp_path: Path, kind: str, words: str) -> None:
    binary = tmp_path / "qemu"
    if kind == "directory":
        binary.mkdir()
    elif kind != "absent":
        binary.write_bytes(b"\x7fELFnot really")
        binary.chmod(0o644 if kind == "text" else 0o755)
    with pytest.raises(MicaError, match=words) as caught:
        await _qemu(binary, tmp_path).build()
    assert caught.value.code is Code.HOST_LACKS


async def test_no_qemu_on_the_path(tmp_path: Path) -> None:
    with pytest.raises(MicaError, match="there is no QEMU: mica-no-such-qemu on"):
        await _qemu("mica-no-such-qemu", tmp_path).build()


def test_tools_are_found_in_the_directories_of_system_programs(tmp_path: Path) -> None:
    tool = tmp_path / "bwrap"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert find_tools(str(tmp_path), ["bwrap", "mica-no-such-tool"]) == {"bwrap": tool, "mica-no-such-tool": None}
    assert search_path("/usr/bin:/sbin:") == "/usr/bin:/sbin:/usr/local/sbin:/usr/sbin"
