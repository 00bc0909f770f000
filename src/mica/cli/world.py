"""What a command gets from outside: environment, user, and the three standard streams, as one value.

``cli/main.py`` makes it from the process; tests make their own.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, TextIO, cast


@dataclass(frozen=True)
class World:
    """``stdin`` may be ``None`` where the process has none."""

    environ: Mapping[str, str]
    uid: int
    stdin: TextIO | None
    stdout: TextIO
    stderr: TextIO

    def is_terminal(self, stream: TextIO | None) -> bool:
        try:
            return stream is not None and stream.isatty()
        except ValueError:  # closed
            return False

    def colour(self, stream: TextIO) -> bool:
        """Colour only on a terminal that can, and not where ``NO_COLOR`` is set (no-color.org)."""
        return self.is_terminal(stream) and not self.environ.get("NO_COLOR") and self.environ.get("TERM") != "dumb"

    def columns(self, stream: TextIO) -> int:
        given = self.environ.get("COLUMNS", "")
        if given.isdigit() and int(given) > 0:
            return int(given)
        try:
            return os.get_terminal_size(stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def write_bytes(self, data: bytes, *, error: bool = False) -> None:
        """Bytes as they are to standard output (or standard error), at once."""
        stream = self.stderr if error else self.stdout
        stream.flush()
        binary = cast("BinaryIO | None", getattr(stream, "buffer", None))
        if binary is None:
            stream.write(data.decode(errors="replace"))
            stream.flush()
            return
        binary.write(data)
        binary.flush()

    def stdin_fd(self) -> int | None:
        """The descriptor of standard input; ``None`` where there is none."""
        try:
            return None if self.stdin is None or self.stdin.closed else self.stdin.fileno()
        except (io.UnsupportedOperation, ValueError):
            return None
