"""``docs/reference/cli.md``, written from the commands: ``python -m mica.cli.reference > docs/reference/cli.md``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mica.cli.app import EPILOGUE, SECTIONS, build_app
from mica.cli.options import GLOBAL
from mica.model.errors import TABLE

if TYPE_CHECKING:
    from cyclopts import App
    from cyclopts.argument import Argument

# Where the words of somebody else begin.
_DASHED = {"mica run": "COMMAND", "mica vm exec": "COMMAND", "mica up": "ARGUMENTS", "mica daemon run": "ARGUMENTS"}

INTRO = """\
# The command line

This page is written from the commands themselves; `mica COMMAND --help` says the same.

Every command takes the options under [all commands](#all-commands). Where a command takes another command for the
guest, put `--` before it: what follows is the guest's. Names of VMs may be their ids or the beginning of one, 8
characters at least. Sizes are written like `512M`, `2G` or `1.5GiB` (powers of 1024), durations like `90s`, `5m` or
`1h30m`.
"""


def markdown() -> str:
    """The page."""
    app = build_app()
    lines = [INTRO, "## All commands", "", *_options(_first_command(app), shared=True), ""]
    lines += ["```text", EPILOGUE.rstrip(), "```", "", "## Exit status", "", *_exit_statuses(), ""]
    for section in SECTIONS:
        for command in section.commands:
            for path, sub in _walk(app[command.name], f"mica {command.name}"):
                lines += _page(path, sub)
    return "\n".join(lines).rstrip() + "\n"


def _walk(app: App, path: str) -> Iterator[tuple[str, App]]:
    if app.default_command is not None:
        yield path, app
    for name in app:
        if not name.startswith("-"):
            yield from _walk(app[name], f"{path} {name}")


def _first_command(app: App) -> App:
    return app["host"]["show"]


def _exit_statuses() -> list[str]:
    rows = [
        "| status | meaning | error |",
        "|---|---|---|",
        "| 0 | It is done | |",
        "| 1 | A fault in the command itself | |",
    ]
    rows.append("| 2 | Wrong usage | |")
    rows += [f"| {info.exit_status} | {info.title} | [`{code}`](errors.md#{code}) |" for code, info in TABLE.items()]
    rows.append("| 128 + n | Ended by signal n: 130 by Ctrl-C | |")
    return [*rows, "", "`mica run` with a command and `mica vm exec` end with the status of the guest's command."]


def _page(path: str, app: App) -> list[str]:
    command = app.default_command
    assert command is not None
    text = inspect.cleandoc(command.__doc__ or "").split("\nParameters\n")[0].strip()
    arguments = [item for item in _arguments(app) if _positional(item)]
    usage = " ".join([path, "[OPTIONS]", *(_argument_usage(item, path) for item in arguments)])
    out = [f"## {path}", "", text, "", "```text", usage, "```", ""]
    rows = [f"| `{_placeholder(item)}` | {_help(item)} |" for item in arguments]
    rows += _options(app, shared=False)[2:]
    return [*out, "| | |", "|---|---|", *rows, ""] if rows else out


def _arguments(app: App) -> list[Argument]:
    return [item for item in app.assemble_argument_collection(parse_docstring=True) if item.show and item.parse]


def _positional(item: Argument) -> bool:
    return item.index is not None and not any(name.startswith("--") for name in item.names)


def _options(app: App, *, shared: bool) -> list[str]:
    rows = ["| | |", "|---|---|"]
    for item in _arguments(app):
        if not _positional(item) and _is_global(item) is shared:
            names = ", ".join(f"`{name}`" for name in item.names if not name.startswith("--empty"))
            rows.append(f"| {names}{_value(item)} | {_help(item)} |")
    return rows


def _is_global(item: Argument) -> bool:
    groups = item.parameter.group or ()
    return GLOBAL in (groups if isinstance(groups, tuple | list) else (groups,))


def _placeholder(item: Argument) -> str:
    return item.names[0].lstrip("-").upper() if item.names else item.field_info.name.upper()


def _argument_usage(item: Argument, path: str) -> str:
    text = _placeholder(item)
    dashes = "-- " if _DASHED.get(path) == text else ""
    if item.field_info.kind is inspect.Parameter.VAR_POSITIONAL:
        return f"[{dashes}{text}…]"
    return dashes + text if item.required else f"[{dashes}{text}]"


def _value(item: Argument) -> str:
    if item.hint is bool or item.hint == bool | None:
        return ""
    return " …"


def _help(item: Argument) -> str:
    text = " ".join((item.parameter.help or "").split()).replace("|", "\\|")
    choices = item.get_choices()
    if choices:
        text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    default = item.field_info.default
    if isinstance(default, str | int | float) and not isinstance(default, bool) and default != "":
        text += f" Default: `{default:g}`." if isinstance(default, int | float) else f" Default: `{default}`."
    return text


if __name__ == "__main__":
    sys.stdout.write(markdown())
