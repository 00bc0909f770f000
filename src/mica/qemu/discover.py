"""Find QEMU and ask it what it can do; find the programs and firmware that stand beside it.

Versions are for people. What decides is what this binary answers about itself over QMP (QEMU docs,
``interop/qemu-qmp-ref``): machines, CPU models, object types, commands, and the members of each command from
``query-qmp-schema`` (``devel/qapi-code-gen``, "Client JSON Protocol introspection"). One start of about a tenth of a
second with ``-M none`` answers everything; the answers are kept by the binary's identity, so the next look is a
``stat`` and a small file.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from mica.host.programs import Answer, ask
from mica.model.errors import Code, MicaError

__all__ = ["Qemu", "QemuBuild", "find_tools", "search_path"]

BINARY = "qemu-system-x86_64"
TOOLS = ("qemu-img", "qemu-io", "qemu-storage-daemon", "bwrap", "passt", "setpriv", "mmdebstrap", "newuidmap", "mke2fs")
HINT = (
    "install QEMU: apt-get install -y qemu-system-x86 (Debian, Ubuntu), dnf install -y qemu-kvm (Fedora, RHEL), "
    "pacman -S qemu-system-x86 (Arch), zypper install qemu-x86 (openSUSE); or name a working one in the settings"
)

# Types whose properties the command lines ask about; each costs QEMU well under a millisecond.
PROPERTIES_OF = (
    "virtio-balloon-pci",
    "virtio-blk-pci",
    "virtio-net-pci",
    "virtio-blk-device",
    "virtio-vga",
    "vmgenid",
)

_FORMAT = 2
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


class QemuBuild(msgspec.Struct, frozen=True, kw_only=True):
    """What one QEMU binary can do, as it says itself.

    ``machines`` are the full names, ``aliases`` maps short names to them (``q35`` → ``pc-q35-7.2``). ``accelerators``
    are built in, which proves nothing about the host. ``devices`` are all its object types. ``objects``, ``netdevs``,
    ``blockdevs`` and ``commands`` map a name to the members it takes; ``options`` maps a command line option to its
    parameters (empty for options that QEMU does not describe). ``properties`` maps the types that Mica uses to
    their properties. ``identity`` changes when the binary does.
    """

    path: str
    identity: str
    version: str
    version_tuple: tuple[int, int, int]
    machines: tuple[str, ...]
    aliases: dict[str, str]
    accelerators: tuple[str, ...]
    cpu_models: tuple[str, ...]
    devices: frozenset[str]
    objects: dict[str, tuple[str, ...]]
    netdevs: dict[str, tuple[str, ...]]
    blockdevs: dict[str, tuple[str, ...]]
    commands: dict[str, tuple[str, ...]]
    options: dict[str, tuple[str, ...]]
    migration_capabilities: frozenset[str]
    properties: dict[str, tuple[str, ...]]

    def machine(self, alias: str) -> str:
        """The full name behind ``alias``, which is what a machine that will migrate must be started with.

        Raises ``host-lacks`` where this QEMU has no such machine.
        """
        name = self.aliases.get(alias, alias)
        if name not in self.machines:
            raise MicaError(
                Code.HOST_LACKS,
                f"{self.path} ({self.version}) has no machine type {alias!r}",
                hint=f"it has {', '.join(sorted(self.aliases))} and {len(self.machines)} versions of them",
            )
        return name

    def has_machine(self, name: str) -> bool:
        return self.aliases.get(name, name) in self.machines

    def has_device(self, name: str) -> bool:
        return name in self.devices

    def has_cpu_model(self, name: str) -> bool:
        return name in self.cpu_models

    def has_command(self, name: str, argument: str = "") -> bool:
        """Whether QMP has the command, and the argument if one is named."""
        return name in self.commands and (not argument or argument in self.commands[name])

    def has_option(self, name: str, parameter: str = "") -> bool:
        """Whether there is a ``-name`` with that parameter, if one is named: ``has_option("run-with", "user")``.

        Only options that take ``key=value`` parameters are described by QEMU.
        """
        return name in self.options and (not parameter or parameter in self.options[name])

    def has_object(self, name: str, member: str = "") -> bool:
        """``has_object("memory-backend-file", "rom")``."""
        return name in self.objects and (not member or member in self.objects[name])

    def has_netdev(self, name: str, member: str = "") -> bool:
        """``has_netdev("stream", "reconnect-ms")``: built into this binary, not only named in its schema."""
        return name in self.netdevs and (not member or member in self.netdevs[name])

    def has_blockdev(self, driver: str, member: str = "") -> bool:
        return driver in self.blockdevs and (not member or member in self.blockdevs[driver])

    def has_property(self, name: str, property_name: str) -> bool:
        """For the types in :data:`PROPERTIES_OF`."""
        return property_name in self.properties.get(name, ())

    @property
    def has_sandbox(self) -> bool:
        """Whether QEMU can filter its own system calls (built with seccomp)."""
        return self.has_option("sandbox", "enable")


def search_path(path: str) -> str:
    """``path`` with the directories of system programs added, which an ordinary user's ``PATH`` lacks on Debian."""
    parts = [part for part in path.split(os.pathsep) if part]
    return os.pathsep.join([*parts, *(part for part in _SBIN if part not in parts)])


def find_tools(path: str, names: Iterable[str] = TOOLS) -> dict[str, Path | None]:
    """Where each program lies on the search path ``path``; ``None`` where it is not."""
    full = search_path(path)
    return {name: Path(found) if (found := shutil.which(name, path=full)) else None for name in names}


class Qemu:
    """Finds one QEMU binary and knows what it can do.

    ``binary`` is a path, or a name to look for on ``path`` (a search path as in ``PATH``). ``cache`` is a directory
    of ours; it is made when needed. ``timeout_s`` bounds how long the binary may take to answer.
    """

    def __init__(self, *, path: str, cache: Path, binary: str = BINARY, timeout_s: float = 20.0) -> None:
        self._path = path
        self._cache = cache
        self._binary = binary
        self._timeout_s = timeout_s

    def locate(self) -> Path:
        """Where the binary lies. Raises ``host-lacks``."""
        found = shutil.which(self._binary, path=search_path(self._path))
        if found:
            return Path(found)
        if os.sep in self._binary and Path(self._binary).exists():
            raise MicaError(Code.HOST_LACKS, f"{self._binary} is not a program that we may execute", hint=HINT)
        where = self._binary if os.sep in self._binary else f"{self._binary} on {self._path or 'an empty PATH'}"
        raise MicaError(Code.HOST_LACKS, f"there is no QEMU: {where} does not exist", hint=HINT)

    async def build(self) -> QemuBuild:
        """What the binary can do, from the cache while the binary is the same one.

        Raises ``host-lacks``, naming the binary and what it did, where there is none or it does not answer like QEMU.
        """
        path = self.locate()
        identity = binary_identity(path)
        name = hashlib.sha256(os.fsencode(path) + identity.encode()).hexdigest()[:16]
        file = self._cache / f"qemu-{name}.json"
        with contextlib.suppress(OSError, msgspec.MsgspecError):  # no cache, or an older one: ask again
            return msgspec.json.decode(file.read_bytes(), type=QemuBuild)
        build = await self._ask(path, identity)
        with contextlib.suppress(OSError):  # without a cache every look takes a tenth of a second, and that is all
            write_atomically(file, msgspec.json.encode(build))
        return build

    async def _ask(self, path: Path, identity: str) -> QemuBuild:
        try:
            async with asyncio.TaskGroup() as group:
                facts = group.create_task(_converse(path, self._timeout_s))
                netdevs = group.create_task(_netdev_help(path, self._timeout_s))
        except ExceptionGroup as several:
            raise several.exceptions[0] from several
        try:
            return _build(path, identity, facts.result(), netdevs.result())
        except (KeyError, TypeError, ValueError, msgspec.MsgspecError, StopIteration) as error:
            raise _broken(path, f"answers QMP in a way that is not QEMU's ({error!r})") from error


def binary_identity(path: Path) -> str:
    """Changes whenever the binary is replaced: device, inode, size, modification time, and our own format."""
    stat = path.stat()
    return f"{_FORMAT}-{stat.st_dev:x}-{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}"


def write_atomically(file: Path, data: bytes) -> None:
    """Replace ``file``: readers see the old bytes or the new ones. Raises ``OSError``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _broken(path: Path, what: str, words: str = "") -> MicaError:
    said = f"; it said: {words}" if words else ""
    return MicaError(Code.HOST_LACKS, f"{path} {what}{said}", hint=HINT, details={"path": str(path)})


async def _run(
    path: Path, arguments: Iterable[str], stdin: bytes, timeout_s: float, farewell: tuple[bytes, bytes] | None = None
) -> Answer:
    try:
        return await ask([str(path), *arguments], stdin=stdin, timeout_s=timeout_s, farewell=farewell)
    except MicaError as error:
        raise MicaError(Code.HOST_LACKS, error.message, hint=HINT, details={"path": str(path)}) from error


_QUESTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("", "qmp_capabilities", {}),
    ("machines", "query-machines", {}),
    ("cpus", "query-cpu-definitions", {}),
    ("types", "qom-list-types", {}),
    ("accelerators", "qom-list-types", {"implements": "accel"}),
    ("options", "query-command-line-options", {}),
    ("schema", "query-qmp-schema", {}),
    *((f"of:{name}", "device-list-properties", {"typename": name}) for name in PROPERTIES_OF),
)


async def _converse(path: Path, timeout_s: float) -> dict[str, Any]:
    """All questions at once on standard input: QMP executes commands in order.

    It is told to quit when the last answer is here: QEMU does not wait for a reader that is behind.
    """
    lines = [{"execute": verb, "arguments": arguments, "id": key} for key, verb, arguments in _QUESTIONS]
    quit_line = {"execute": "quit", "id": "quit"}
    text = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    answered = b'"id": ' + msgspec.json.encode(lines[-1]["id"])
    farewell = (answered, msgspec.json.encode(quit_line) + b"\n")
    arguments = ("-M", "none", "-nodefaults", "-no-user-config", "-S", "-display", "none", "-qmp", "stdio")
    answer = await _run(path, arguments, text, timeout_s, farewell)
    answers: dict[str, Any] = {}
    try:
        for line in answer.out.splitlines():
            message = msgspec.json.decode(line)
            if "QMP" in message:
                answers["greeting"] = message["QMP"]
            elif "return" in message:
                answers[message["id"]] = message["return"]
    except (msgspec.MsgspecError, TypeError, KeyError) as error:
        raise _broken(path, "does not speak QMP", answer.last_words) from error
    if answer.status != 0:
        raise _broken(path, f"ended with status {answer.status} when asked what it can do", answer.last_words)
    if "greeting" not in answers or "quit" not in answers:
        raise _broken(path, "did not answer on QMP", answer.last_words)
    return answers


async def _netdev_help(path: Path, timeout_s: float) -> tuple[str, ...]:
    """The back ends that are built in. The schema also names those that are not, so only the help is the truth."""
    answer = await _run(path, ("-netdev", "help"), b"", timeout_s)
    if answer.status != 0:
        raise _broken(path, f"ended with status {answer.status} on -netdev help", answer.last_words)
    lines = answer.text.splitlines()
    return tuple(line.strip() for line in lines if line.strip() and " " not in line.strip())


class _Schema:
    """The answer of ``query-qmp-schema``: named entities that refer to each other."""

    def __init__(self, entities: list[dict[str, Any]]) -> None:
        self._entities = {entity["name"]: entity for entity in entities}

    def commands(self) -> dict[str, tuple[str, ...]]:
        return {
            name: self._members(entity["arg-type"])
            for name, entity in self._entities.items()
            if entity["meta-type"] == "command"
        }

    def _members(self, name: str) -> tuple[str, ...]:
        return tuple(member["name"] for member in self._entities[name].get("members", ()))

    def variants(self, command: str) -> dict[str, tuple[str, ...]]:
        """Case → members, for a command whose argument is a union."""
        if command not in self._entities:
            return {}
        union = self._entities[self._entities[command]["arg-type"]]
        common = self._members(union["name"])
        tag = self._entities[next(m["type"] for m in union["members"] if m["name"] == union["tag"])]
        out = dict.fromkeys(tag["values"], common)
        for variant in union["variants"]:
            out[variant["case"]] = common + self._members(variant["type"])
        return out

    def migration_capabilities(self) -> frozenset[str]:
        argument = self._entities[self._entities["migrate-set-capabilities"]["arg-type"]]
        array = self._entities[next(m["type"] for m in argument["members"] if m["name"] == "capabilities")]
        item = self._entities[array["element-type"]]
        values = self._entities[next(m["type"] for m in item["members"] if m["name"] == "capability")]["values"]
        return frozenset(values)


def _version(greeting: Mapping[str, Any]) -> tuple[str, tuple[int, int, int]]:
    numbers = greeting["version"]["qemu"]
    version = (int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"]))
    package = str(greeting["version"].get("package", "")).strip()
    text = ".".join(map(str, version))
    return (f"{text} ({package})" if package else text), version


def _build(path: Path, identity: str, answers: Mapping[str, Any], netdev_help: tuple[str, ...]) -> QemuBuild:
    schema = _Schema(answers["schema"])
    version, numbers = _version(answers["greeting"])
    machines = answers["machines"]
    if not machines:
        raise ValueError("no machine types")
    netdevs = schema.variants("netdev_add")
    types = frozenset(entry["name"] for entry in answers["types"])
    objects = schema.variants("object-add")
    return QemuBuild(
        path=str(path),
        identity=identity,
        version=version,
        version_tuple=numbers,
        machines=tuple(sorted(entry["name"] for entry in machines)),
        aliases={entry["alias"]: entry["name"] for entry in machines if "alias" in entry},
        accelerators=tuple(
            sorted(
                entry["name"].removesuffix("-accel")
                for entry in answers["accelerators"]
                if entry["name"].endswith("-accel")
            )
        ),
        cpu_models=tuple(sorted(entry["name"] for entry in answers["cpus"])),
        devices=types,
        objects={name: members for name, members in objects.items() if name in types},
        netdevs={name: netdevs.get(name, ()) for name in netdev_help},
        blockdevs=schema.variants("blockdev-add"),
        commands=schema.commands(),
        options={
            entry["option"]: tuple(parameter["name"] for parameter in entry["parameters"])
            for entry in answers["options"]
            if entry["option"]
        },
        migration_capabilities=schema.migration_capabilities(),
        properties={
            name: tuple(entry["name"] for entry in answers[f"of:{name}"])
            for name in PROPERTIES_OF
            if f"of:{name}" in answers
        },
    )
