"""The tree of commands. Leaves are named by import path and imported when they are used.

``mica --help`` is printed from the table below without importing anything else, because it is asked for often.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cyclopts import App


class Command(NamedTuple):
    """``usage`` and ``summary`` make its line in ``mica --help``; ``path`` is where it is."""

    name: str
    path: str
    summary: str
    usage: str = ""


class Section(NamedTuple):
    title: str
    commands: tuple[Command, ...]


SECTIONS = (
    Section(
        "Begin",
        (
            Command("doctor", "mica.cli.doctor:doctor", "what this host can do, proven; what is missing and its fix"),
            Command(
                "run",
                "mica.cli.run:run",
                "create a VM, start it, wait for its agent, run a command in it",
                "IMAGE [-- COMMAND…]",
            ),
            Command("up", "mica.cli.up:up", "run the daemon in the foreground and print its addresses"),
        ),
    ),
    Section(
        "Work with",
        (
            Command("vm", "mica.cli.vm:app", "virtual machines: list, start, stop, exec, console, cp, log …", "VERB …"),
            Command(
                "snapshot", "mica.cli.snapshot:app", "VMs at one moment: create, list, restore, verify …", "VERB …"
            ),
            Command("fork", "mica.cli.fork:fork", "make running copies of a VM in a moment", "VM"),
            Command("clone", "mica.cli.clone:clone", "make a stopped copy of a VM", "VM"),
            Command(
                "template", "mica.cli.template:app", "VMs that others begin at: create, list, set, delete …", "VERB …"
            ),
            Command("image", "mica.cli.image:app", "what VMs start from: list, build, import, verify …", "VERB …"),
            Command("operation", "mica.cli.operation:app", "what Mica is doing: list, wait, cancel …", "VERB …"),
            Command("events", "mica.cli.events:events", "follow what changes"),
        ),
    ),
    Section(
        "Look after",
        (
            Command("host", "mica.cli.host:app", "this host and what its VMs use of it", "VERB …"),
            Command("daemon", "mica.cli.daemon:app", "the daemon behind it all: run, stop, status, log", "VERB …"),
        ),
    ),
)

EPILOGUE = """\
Options:
  --help, -h              help, also for each command: mica vm exec --help
  --version               the version of this command
  --install-completion    complete commands and names of VMs in your shell
  --json                  with any command: one JSON document instead of text

The exit status is 0, or tells the class of error; `run` and `vm exec` pass the guest command's own status on.
"""


def commands() -> dict[str, bool]:
    """The first words there are, and whether a verb follows each."""
    return {c.name: c.path.endswith(":app") for section in SECTIONS for c in section.commands}


def top_help(columns: int) -> str:
    """``mica --help``."""
    lines = ["Usage: mica COMMAND …", "", "Mica runs virtual machines on this computer.", ""]
    width = max(len(f"{c.name} {c.usage}") for s in SECTIONS for c in s.commands) + 2
    for section in SECTIONS:
        lines.append(f"{section.title}:")
        for command in section.commands:
            left = f"{command.name} {command.usage}".strip()
            if columns >= width + 40:
                lines.append(f"  {left.ljust(width)}{command.summary}")
            else:
                lines += [f"  {left}", f"      {command.summary}"]
        lines.append("")
    return "\n".join(lines) + "\n" + EPILOGUE


def build_app() -> App:
    """The root of the tree."""
    from cyclopts import App, Group

    from mica import __version__

    app = App(
        name="mica",
        help="Mica runs virtual machines on this computer.",
        version=__version__,
        help_format="plaintext",
        end_of_options_delimiter="--",
    )
    for order, section in enumerate(SECTIONS):
        group = Group(section.title, sort_key=order)
        for place, command in enumerate(section.commands):
            app.command(command.path, name=command.name, help=_sentence(command.summary), group=group, sort_key=place)
    app.command(
        "mica.cli.completion:install",
        name="--install-completion",
        help="Complete commands and names of VMs in your shell.",
        group=Group("Options", sort_key=80),
    )
    return app


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].removesuffix(" …") + "."
