"""QEMU's command line as values: what each device file returns and how it is written out.

Objects, devices, back ends and block nodes are written as JSON (QEMU: ``-device`` and ``-object`` take JSON since 6.2
and 6.0), so that no name or path has to be escaped. Source: qemu-system-x86_64(1) and the QMP reference.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec

from mica.model.units import Bytes


class Arguments(msgspec.Struct, frozen=True):
    """Options in the order in which QEMU must read them: objects and back ends before the devices that use them."""

    items: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: Arguments) -> Arguments:
        return Arguments(self.items + other.items)

    def argv(self) -> list[str]:
        return [word for option, value in self.items for word in ((f"-{option}", value) if value else (f"-{option}",))]


def flag(option: str, value: str = "") -> Arguments:
    return Arguments(((option, value),))


def pairs(option: str, first: str, **values: str | int | bool | None) -> Arguments:
    """``option first,key=value,…`` for the options that take no JSON; ``None`` is left out, commas are doubled."""
    parts = [first] if first else []
    for key, value in values.items():
        if value is None:
            continue
        text = ("on" if value else "off") if isinstance(value, bool) else str(value)
        parts.append(f"{key.replace('_', '-')}={text.replace(',', ',,')}")
    return flag(option, ",".join(parts))


def from_json(option: str, value: dict[str, Any]) -> Arguments:
    return flag(option, json.dumps({k: v for k, v in value.items() if v is not None}, separators=(",", ":")))


def concat(parts: Iterable[Arguments]) -> Arguments:
    return Arguments(tuple(item for part in parts for item in part.items))


class Bus:
    """Gives out places on the PCI Express root, one root port for each device that may be unplugged (q35).

    A device's place follows from the order of the spec, so a machine looks the same at every start. Function 0 of the
    slots is used only; slot 0 is the host bridge and slot 31 the chipset's own (QEMU docs, "PCI EXPRESS GUIDELINES").
    """

    def __init__(self) -> None:
        self._slot = 1
        self._ports = 0

    def integrated(self) -> dict[str, Any]:
        """A place directly on the root complex, for devices that stay."""
        slot, self._slot = self._slot, self._slot + 1
        return {"bus": "pcie.0", "addr": f"{slot:x}"}

    def port(self) -> tuple[Arguments, dict[str, Any]]:
        """A hot-pluggable root port and the place behind it."""
        name = f"port{self._ports}"
        chassis, self._ports = self._ports + 1, self._ports + 1
        slot, self._slot = self._slot, self._slot + 1
        port = {"driver": "pcie-root-port", "id": name, "bus": "pcie.0", "addr": f"{slot:x}", "chassis": chassis}
        return from_json("device", port), {"bus": name}


def mebibytes(size: Bytes) -> int:
    return size // 1024**2
