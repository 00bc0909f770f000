"""Everything that the code of the command line can write, read from its syntax: options, keys, kinds of devices."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import msgspec

import mica.qemu

_QEMU = Path(mica.qemu.__file__).parent if mica.qemu.__file__ else Path(mica.qemu.__path__[0])
FILES = [
    *sorted((_QEMU / "devices").glob("*.py")),
    _QEMU / "command_line.py",
    _QEMU / "accel.py",
    _QEMU / "arguments.py",
]

# The key that says what a JSON object is.
_KINDS = ("driver", "qom-type")
# Functions whose result is of a QMP command and not of the command line.
NOT_ARGUMENTS = frozenset({"throttle", "unplug"})


class Written(msgspec.Struct, frozen=True, order=True):
    """One thing that the code can write: an option ``-x``, ``key`` of an option or of a kind of object, or a kind."""

    file: str
    kind: str
    key: str

    def found_in(self, lines: list[str]) -> bool:
        if self.key.startswith("-"):
            return any(line.split(" ")[0] == self.key for line in lines)
        if self.kind.startswith("-"):
            return any(line.startswith(f"{self.kind} ") and f"{self.key}=" in line for line in lines)
        if not self.key:
            return any(f':"{self.kind}"' in line for line in lines)
        return any(f'"{self.key}":' in line and (not self.kind or f':"{self.kind}"' in line) for line in lines)


def _texts(node: ast.expr | None) -> list[str]:
    """The strings that an expression can be, as far as it says so itself."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return _texts(node.body) + _texts(node.orelse)
    return []


def _of_dict(file: str, node: ast.Dict) -> Iterator[Written]:
    pairs = [
        (key.value, value) for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)
    ]
    kinds = [text for key, value in pairs if key in _KINDS for text in _texts(value)]
    for kind in kinds:
        yield Written(file, kind, "")
    for key, value in pairs:
        # With several kinds (one card or another), one of them having the key is enough.
        yield Written(file, kinds[0] if len(kinds) == 1 else "", str(key))
        if key not in _KINDS:
            yield from (Written(file, text, "") for text in _texts(value) if text)


def _of_call(file: str, node: ast.Call) -> Iterator[Written]:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name not in ("flag", "pairs", "from_json") or not node.args:
        return
    for option in _texts(node.args[0]):
        yield Written(file, "", f"-{option}")
        if name == "pairs":
            for keyword in node.keywords:
                assert keyword.arg, f"{file}: pairs(**…) hides its keys from this test"
                yield Written(file, f"-{option}", keyword.arg.replace("_", "-"))


def _visit(file: str, node: ast.AST) -> Iterator[Written]:
    if isinstance(node, ast.FunctionDef) and node.name in NOT_ARGUMENTS:
        return
    if isinstance(node, ast.Dict):
        yield from _of_dict(file, node)
    if isinstance(node, ast.Call):
        yield from _of_call(file, node)
    for child in ast.iter_child_nodes(node):
        yield from _visit(file, child)


def written() -> set[Written]:
    out: set[Written] = set()
    for path in FILES:
        out |= set(_visit(path.name, ast.parse(path.read_text(encoding="utf-8"))))
    return out
