"""How things look in a terminal: aligned tables, sizes and ages for people, colour where it is wanted."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from datetime import datetime

from mica.model.units import format_duration, format_size

# What a column of text is left with at least.
NARROW = 8
# Where prose has less room than this, a terminal breaks it as well as anybody.
MIN_ROOM = 30

GREEN, YELLOW, RED, DIM, BOLD = "32", "33", "31", "2", "1"

STATE_STYLES = {
    "running": GREEN,
    "succeeded": GREEN,
    "ready": GREEN,
    "ok": GREEN,
    "paused": YELLOW,
    "suspended": YELLOW,
    "starting": YELLOW,
    "stopping": YELLOW,
    "creating": YELLOW,
    "deleting": YELLOW,
    "queued": YELLOW,
    "unwinding": YELLOW,
    "waiting": YELLOW,
    "degraded": YELLOW,
    "crashed": RED,
    "failed": RED,
    "stuck": RED,
    "missing": RED,
    "damaged": RED,
}


def paint(text: str, style: str, colour: bool) -> str:
    """``text`` in an SGR style (ECMA-48 section 8.3.117)."""
    return f"\x1b[{style}m{text}\x1b[0m" if colour and style and text else text


def paint_state(text: str, colour: bool) -> str:
    return paint(text, STATE_STYLES.get(text, ""), colour)


def clean(text: str) -> str:
    """Text from a guest or a file without control characters: it must not drive the reader's terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def size(value: int | None) -> str:
    return "-" if value is None else format_size(value)


def age(at: float | None, now: float) -> str:
    """How long ago, in one word: ``3h12m``."""
    return "-" if at is None else format_duration(max(0.0, now - at))


def moment(at: float | None) -> str:
    """Local time to the second."""
    return "-" if at is None else datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _narrowed(widths: list[int], kept: set[int], width: int) -> list[int]:
    """``widths`` that together fit ``width`` columns, the widest cut first; those ``kept`` stay as they are."""
    out = list(widths)
    most = width - 2 * (len(out) - 1)
    while sum(out) > most:
        widest = max((i for i in range(len(out)) if i not in kept), key=lambda i: out[i], default=None)
        if widest is None or out[widest] <= NARROW:
            break
        out[widest] -= 1
    return out


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[int] = (),
    colour: bool = False,
    width: int | None = None,
) -> str:
    """Columns as wide as their widest cell, two spaces apart; ``right`` are right-aligned; states are coloured.

    Where it is wider than ``width``, texts are cut, but never the first column, by which things are called.
    """
    body = [[clean(cell).replace("\n", " ") or "-" for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *body]) for i in range(len(head))]
    rights = set(right)
    if width is not None:
        widths = _narrowed(widths, {0, *rights}, width)
        body = [[c if len(c) <= w else f"{c[: w - 1]}…" for c, w in zip(row, widths, strict=True)] for row in body]

    def line(cells: Sequence[str], style: str = "") -> str:
        padded = [c.rjust(w) if i in rights else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        shown = [
            paint(text, style or STATE_STYLES.get(cell, ""), colour) for text, cell in zip(padded, cells, strict=True)
        ]
        # Padding at the end of a line only makes narrow terminals wrap.
        if shown and (len(cells) - 1) not in rights:
            last = cells[-1]
            shown[-1] = paint(last, style or STATE_STYLES.get(last, ""), colour)
        return "  ".join(shown)

    return "\n".join([line(head, BOLD), *(line(row) for row in body)])


def fold(text: str, width: int | None, indent: int) -> str:
    """``text`` in lines that fit ``width`` columns after an indent that the further ones get; words stay whole."""
    room = 0 if width is None else width - indent
    if room < MIN_ROOM or len(text) <= room:
        return text
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return ("\n" + " " * indent).join(lines)


def facts(pairs: Iterable[tuple[str, str]], *, colour: bool = False, width: int | None = None) -> str:
    """``name: value`` lines, aligned; empty values are left out; further lines of a value are indented."""
    kept = [(name, clean(value)) for name, value in pairs if value]
    indent = max((len(name) for name, _ in kept), default=0) + 2
    lines = []
    for name, value in kept:
        first, *rest = (fold(line, width, indent) for line in value.split("\n"))
        lines.append(paint(f"{name}:".ljust(indent), DIM, colour) + paint_state(first, colour))
        lines += [" " * indent + more for more in rest]
    return "\n".join(lines)
