"""Progress of operations: a bar on a terminal, plain lines elsewhere, nothing for what ends quickly."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mica.cli.text import clean
from mica.cli.world import World
from mica.model.operation import Operation, OperationState
from mica.model.units import format_duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

BAR_AFTER_S = 0.4
LINES_AFTER_S = 1.0
LINE_EVERY_S = 2.0


class Progress:
    """Call it with what is known of an operation, or with a fraction and a text; use it as a context manager."""

    def __init__(self, world: World, *, quiet: bool = False) -> None:
        self._world = world
        self._quiet = quiet
        self._terminal = world.colour(world.stderr) or world.is_terminal(world.stderr)
        self._began = time.monotonic()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._line = ""
        self._line_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def __call__(self, operation: Operation) -> None:
        verb = operation.verb.partition(".")[2] or operation.verb
        title = f"{verb} {operation.target_name}".strip()
        step = operation.step
        if operation.state is OperationState.QUEUED:
            step = "waits for its turn"
        elif operation.state is OperationState.UNWINDING:
            step = f"undoing: {step}" if step else "undoing"
        self.show(title, operation.progress, step)

    def show(self, title: str, fraction: float | None, step: str) -> None:
        """``fraction`` is 0.0 to 1.0 or ``None``."""
        if self._quiet:
            return
        passed = time.monotonic() - self._began
        text = clean(f"{title}: {step}" if step else title)
        if self._terminal:
            if passed >= BAR_AFTER_S:
                self._show_bar(text, fraction)
        elif passed >= LINES_AFTER_S:
            self._show_line(text, fraction, passed)

    def _show_line(self, text: str, fraction: float | None, passed: float) -> None:
        now = time.monotonic()
        if text == self._line or now - self._line_at < LINE_EVERY_S:
            return
        self._line, self._line_at = text, now
        percent = "" if fraction is None else f" {fraction * 100:.0f} %"
        self._world.stderr.write(f"[{format_duration(passed)}]{percent} {text}\n")
        self._world.stderr.flush()

    def _show_bar(self, text: str, fraction: float | None) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            console = Console(file=self._world.stderr, no_color=not self._world.colour(self._world.stderr))
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(text, total=None)
        assert self._task is not None
        total = None if fraction is None else 1.0
        self._bar.update(self._task, description=text, total=total, completed=fraction or 0.0)
