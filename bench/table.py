"""One line of the performance table: what was measured, what it is compared with, the goal, whether it is met."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """``value`` and ``goal`` are in ``unit``; lower is better. ``beside`` says what it was measured beside."""

    what: str
    value: float
    goal: float
    unit: str
    beside: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.goal


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def show(rows: Sequence[Row], host: str) -> None:
    table = Table("what", "measured", "goal", "met", "measured beside", box=None, pad_edge=False)
    for row in rows:
        value = f"{row.value:.2f} {row.unit}" if row.unit else f"{row.value:.2f} ×"
        goal = f"≤ {row.goal:g} {row.unit}" if row.unit else f"≤ {row.goal:.2f} ×"
        table.add_row(row.what, value, goal, "yes" if row.met else "[red]no[/red]", row.beside)
    console = Console(highlight=False)
    console.print(host)
    console.print(table)
