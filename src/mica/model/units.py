"""Sizes and durations: how people write them and how Mica prints them.

A bare number is bytes (or seconds). ``K M G T`` and ``KiB MiB GiB TiB`` mean powers of 1024, as every peer of Mica
reads them; ``KB MB GB TB`` mean powers of 1000 (IEC 80000-13).
"""

from __future__ import annotations

import re
from typing import NewType

from mica.model.errors import invalid

Bytes = NewType("Bytes", int)

KIB = 1024
MIB = 1024**2
GIB = 1024**3
TIB = 1024**4

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)\s*$", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_size(text: str | int) -> Bytes:
    """Bytes for ``512M``, ``2GiB``, ``1.5G``, ``1000MB`` or a bare number. Raises ``invalid``."""
    if isinstance(text, int):
        return Bytes(text)
    match = _SIZE.match(text)
    if not match:
        raise invalid(f"{text!r} is not a size", hint="write for example 512M, 2GiB or 1.5G")
    number, prefix, suffix = match.groups()
    if len(number) > 20:
        raise invalid(f"a size of {len(number)} digits is more than any machine has")
    base = 1000 if prefix and suffix.lower() == "b" else 1024
    return Bytes(round(float(number) * base ** _POWER[prefix.lower()]))


def format_size(size: int) -> str:
    """``1610612736`` → ``1.5 GiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB" if value != int(value) else f"{value:.0f} TiB"


def parse_duration(text: str | float) -> float:
    """Seconds for ``90s``, ``1h30m``, ``7d``, ``250ms`` or a bare number. Raises ``invalid``."""
    if isinstance(text, int | float):
        return float(text)
    compact = text.replace(" ", "")
    if re.fullmatch(r"\d{1,15}(\.\d+)?", compact):
        return float(compact)
    parts = _DURATION.findall(compact)
    if not parts or "".join(n + u for n, u in parts) != compact:
        raise invalid(f"{text!r} is not a duration", hint="write for example 30s, 5m, 1h30m or 7d")
    return float(sum(float(n) * _SECONDS[u.lower()] for n, u in parts))


def format_duration(seconds: float) -> str:
    """``5400`` → ``1h30m``; below ten seconds with a tenth."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    rest, out = int(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if rest >= size:
            out.append(f"{rest // size}{unit}")
            rest %= size
    return "".join(out[:2])
