"""Small values that people write on the command line."""

from __future__ import annotations

from collections.abc import Iterable

from mica.model.errors import invalid


def pairs(items: Iterable[str], noun: str) -> dict[str, str]:
    """``("a=b", "c=d")`` → ``{"a": "b", "c": "d"}``. Raises ``invalid`` naming the ``noun``."""
    out: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise invalid(f"{noun} {item!r} is not KEY=VALUE", hint=f"write for example --{noun} tier=web")
        out[key] = value
    return out


def words(text: str) -> tuple[str, ...]:
    """``"a,b"`` → ``("a", "b")``."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
