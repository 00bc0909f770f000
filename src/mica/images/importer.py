"""Disk images made elsewhere: looked at, checked and converted by ``qemu-img``, which is held on a short lead.

Such a file is hostile until shown otherwise: it may name other files of this host as its backing file or its data file
(and so read them into a machine), claim any size, or be made to break the program that reads it. So the format is
established before any program opens the file and named explicitly from then on, every reference to another file is
refused, and ``qemu-img`` runs with limits on memory, processor time and what it may write.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

from mica.images.commands import CommandError, Commands
from mica.images.files import need_space
from mica.images.headers import disk_format
from mica.images.store import Draft, Facts
from mica.model.errors import Code, MicaError, invalid
from mica.model.image import ImportRecipe
from mica.model.units import GIB, MIB, Bytes, format_size
from mica.ports.progress import Progress

MAX_SIZE = 64 * 1024 * GIB
MIN_MEMORY = Bytes(64 * MIB)

_INFO_TIMEOUT_S = 60
_CHECK_TIMEOUT_S = 3600
_CONVERT_TIMEOUT_S = 6 * 3600
# Enough for qemu-img's tables of a 64 TiB image; a table that is said to be larger is a lie or an attack.
_MEMORY_LIMIT = 4 * GIB
# What must stay free on the file system of the images.
_RESERVE = 512 * MIB
# qemu-img check: 2 is damage, 3 is space that nobody uses, 63 a format that has no check.
_DAMAGED, _LEAKS, _NO_CHECK = 2, 3, 63


async def build(recipe: ImportRecipe, draft: Draft, commands: Commands, progress: Progress) -> None:
    """Import into ``draft``.

    Raises ``invalid``, ``not-found``, ``forbidden``, ``in-use``, ``corrupt`` naming the file, ``insufficient-disk``.
    """
    path = Path(recipe.path)
    if not path.is_absolute():
        raise invalid(f"{recipe.path!r} is not an absolute path", field="path")
    progress(None, "Looking at the image")
    kind = disk_format(path)
    info = await _info(commands, path, kind)
    size = int(info["virtual-size"])
    await _check(commands, path, kind)
    need_space(draft.files, int(info.get("actual-size", 0)) + _RESERVE, f"importing {path.name}")
    await _convert(commands, path, kind, draft.file("disk.qcow2"), progress)
    draft.facts = Facts(
        os="unknown",
        disk="disk.qcow2",
        # QEMU rounds a disk's size up to whole sectors.
        disk_size=Bytes(size + -size % 512),
        firmware=recipe.firmware,
        min_memory=MIN_MEMORY,
        agent=recipe.agent,
        build={"recipe": "import", "file": path.name, "format": kind},
    )


async def _qemu_img(
    commands: Commands, path: Path, arguments: list[str], *, cpu_s: int, write: int = 0, timeout_s: float, **kwargs: Any
) -> int:
    """Run ``qemu-img`` with limits (prlimit(1)): a hostile image may cost this much and no more."""
    limits = [f"--as={_MEMORY_LIMIT}", f"--cpu={cpu_s}", f"--fsize={write}", "--core=0", "--nofile=256"]
    argv = ["prlimit", *limits, commands.find("qemu-img"), *arguments]
    try:
        return await commands.run(argv, timeout_s=timeout_s, **kwargs)
    except CommandError as error:
        words = "; ".join(error.words)
        if "lock" in words.lower():
            raise MicaError(
                Code.IN_USE,
                f"{path} is in use by another program: {words}",
                hint="stop the machine that runs from it, or copy the file",
                retryable=True,
            ) from error
        if (write and error.status in (-signal.SIGXFSZ, 128 + signal.SIGXFSZ)) or "File too large" in words:
            raise MicaError(
                Code.INSUFFICIENT_DISK,
                f"{path} holds more than {format_size(write)}, which is what there is room for",
                hint="free space on the file system of the images",
                details={"free": write},
            ) from error
        raise _corrupt(path, words or error.message) from error


async def _info(commands: Commands, path: Path, kind: str) -> dict[str, Any]:
    lines: list[str] = []
    arguments = ["info", "--output=json", "-f", kind, str(path)]
    await _qemu_img(commands, path, arguments, cpu_s=30, timeout_s=_INFO_TIMEOUT_S, stdout=lines.append)
    info: dict[str, Any] = json.loads("\n".join(lines))
    data = info.get("format-specific", {}).get("data", {})
    # The header was looked at before; this is QEMU's own opinion of the same.
    others = [info.get("backing-filename"), data.get("data-file")]
    others += [extent.get("filename") for extent in data.get("extents", []) if extent.get("filename") != str(path)]
    if named := [str(other) for other in others if other]:
        raise invalid(f"{path} refers to other files, which an imported image must not: {', '.join(named)}")
    if "encrypt" in data or info.get("encrypted"):
        raise invalid(f"{path} is encrypted", hint="decrypt it first: qemu-img convert")
    if data.get("corrupt"):
        raise _corrupt(path, "it is marked as corrupt")
    if not 0 < int(info.get("virtual-size", 0)) <= MAX_SIZE:
        raise invalid(f"{path} claims to hold {info.get('virtual-size')} bytes; 1 to 64 TiB are possible")
    return info


async def _check(commands: Commands, path: Path, kind: str) -> None:
    if kind == "raw":
        return
    words: list[str] = []
    status = await _qemu_img(
        commands,
        path,
        ["check", "-q", "-f", kind, str(path)],
        cpu_s=_CHECK_TIMEOUT_S,
        timeout_s=_CHECK_TIMEOUT_S,
        accept=(0, _DAMAGED, _LEAKS, _NO_CHECK),
        stderr=lambda line: words.append(line) if len(words) < 5 else None,
        stdout=lambda line: words.append(line) if len(words) < 5 else None,
    )
    if status == _DAMAGED:
        raise _corrupt(path, "; ".join(words) or "qemu-img check found errors in it")


async def _convert(commands: Commands, path: Path, kind: str, target: Path, progress: Progress) -> None:
    room = shutil.disk_usage(target.parent).free - _RESERVE

    def see(line: str) -> None:
        # "    (12.34/100%)"
        number = line.strip().removeprefix("(").partition("/")[0]
        if number.replace(".", "", 1).isdigit():
            progress(min(float(number) / 100, 1.0), "Copying the image")

    await _qemu_img(
        commands,
        path,
        ["convert", "-p", "-f", kind, "-O", "qcow2", "-m", "4", str(path), str(target)],
        cpu_s=_CONVERT_TIMEOUT_S,
        write=max(room, 1),
        timeout_s=_CONVERT_TIMEOUT_S,
        stdout=see,
    )


def _corrupt(path: Path, why: str) -> MicaError:
    return MicaError(
        Code.CORRUPT,
        f"{path} is damaged, or not what it says it is: {why}",
        hint="check it against its source, then copy it again",
        details={"path": str(path)},
    )
