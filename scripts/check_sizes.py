"""The size gate: a module over 400 lines wants splitting and is named; over 800, or a function over 60, fails.

Run by ``make check``. The budget is the house's: big files are where such systems rot.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

WANTED, ALLOWED, FUNCTION = 400, 800, 60


def main() -> int:
    wide, broken = [], []
    for path in sorted(Path("src").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > ALLOWED:
            broken.append(f"{path}: {lines} lines, {ALLOWED} are allowed")
        elif lines > WANTED:
            wide.append(f"{path}: {lines} lines, {WANTED} are wanted")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                # The signature of a command is the list of its options, and its docstring is their help: not counted.
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                length = (node.end_lineno or node.lineno) - body[0].lineno + 1
                if length > FUNCTION:
                    broken.append(f"{path}:{node.lineno}: {node.name} has {length} lines, {FUNCTION} are allowed")
    for line in wide:
        print(f"note: {line}")
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
