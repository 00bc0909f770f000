"""Kernel modules: what they need and what they serve, read from themselves, written as modprobe wants it.

The facts stand in a module's ``.modinfo`` section as ``key=value`` strings (Linux, include/linux/moduleinfo.h).
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

import msgspec


class Module(msgspec.Struct, frozen=True):
    """``data`` is the module, decompressed; ``depends`` and ``aliases`` as it says itself."""

    name: str
    data: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...]


def module_name(path: str) -> str:
    """``…/virtio-rng.ko.xz`` → ``virtio_rng``: the kernel knows no dashes."""
    return PurePosixPath(path).name.split(".ko", 1)[0].replace("-", "_")


def read_module(path: str, raw: bytes) -> Module:
    """Debian compresses modules with xz from version 13 on."""
    data = lzma.decompress(raw) if path.endswith(".xz") else raw
    depends = _values(data, b"depends")
    names = depends[0].split(",") if depends else []
    return Module(
        module_name(path),
        data,
        tuple(name.replace("-", "_") for name in names if name),
        tuple(_values(data, b"alias")),
    )


def _values(data: bytes, key: bytes) -> list[str]:
    return [match.decode() for match in re.findall(rb"(?:^|\0)" + key + rb"=([^\0]*)(?=\0)", data)]


def closure(wanted: Iterable[str], available: Mapping[str, Module]) -> list[Module]:
    """``wanted`` with what they depend on, each after what it needs; names that are not available are left out.

    They are built into the kernel then, or the kernel is too old or too new to have them.
    """
    ordered: dict[str, Module] = {}

    def add(name: str) -> None:
        module = available.get(name)
        if module is None or name in ordered:
            return
        for dependency in module.depends:
            add(dependency)
        ordered[name] = module

    for name in wanted:
        add(name)
    return list(ordered.values())


def modules_dep(modules: Iterable[Module]) -> str:
    """The file ``modules.dep`` of modules that lie beside it: each with all that it needs, nearest first."""
    available = {module.name: module for module in modules}
    lines = []
    for module in available.values():
        needs = reversed(closure([module.name], available)[:-1])
        lines.append(f"{module.name}.ko:" + "".join(f" {need.name}.ko" for need in needs))
    return "\n".join(lines) + "\n"


def modules_alias(modules: Iterable[Module]) -> str:
    """The file ``modules.alias``: which module serves which device."""
    return "".join(f"alias {alias} {module.name}\n" for module in modules for alias in module.aliases)
