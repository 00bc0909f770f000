"""``mica``: from the words on the command line to an exit status."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from inspect import BoundArguments, iscoroutine
from typing import TYPE_CHECKING, Any

from mica.cli.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from mica.model.errors import MicaError

USAGE = 2
# The end of a program by SIGPIPE, as a shell counts it: what reads our output has gone.
BROKEN_PIPE = 141
_VALUED = ("--home", "--url", "--token-file")


def process_world() -> World:
    """The world of this process."""
    return World(os.environ, os.geteuid(), sys.stdin, sys.stdout, sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit status."""
    world = process_world()
    # httpx imports a command line of its own where it finds click and rich: 40 ms that this process has no use for.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    # Imports make many objects that stay: looking for garbage among them costs a tenth of the whole.
    gc.set_threshold(50_000, 20, 20)
    try:
        status = run(list(sys.argv[1:] if argv is None else argv), world)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes at its end and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return 130
    finally:
        # The process ends: looking through all of it for garbage once more is a tenth of the whole, too.
        gc.freeze()
    return status


def run(argv: list[str], world: World) -> int:
    """Run one command line in ``world``; its exit status."""
    if argv in ([], ["--help"], ["-h"], ["help"]):
        from mica.cli.app import top_help

        world.stdout.write(top_help(world.columns(world.stdout)))
        return 0
    if argv == ["--version"]:
        from mica import __version__

        world.stdout.write(f"mica {__version__}\n")
        return 0
    argv = move_global_options(argv)
    as_json = "--json" in (argv[: argv.index("--")] if "--" in argv else argv)

    from cyclopts import CycloptsError

    from mica.cli.app import build_app
    from mica.model.errors import MicaError

    try:
        command, bound, injected = build_app().parse_args(argv, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        return _usage_error(world, error, argv, as_json)
    except MicaError as error:
        report(world, error, as_json)
        return USAGE
    try:
        return _call(world, command, bound, injected)
    except MicaError as error:
        report(world, error, as_json)
        return error.info.exit_status


def move_global_options(argv: list[str]) -> list[str]:
    """``mica --json vm list`` is ``mica vm list --json``: options of all commands may come before the command."""
    moved: list[str] = []
    rest = list(argv)
    while rest:
        if rest[0] == "--json" or (rest[0].startswith(tuple(f"{name}=" for name in _VALUED))):
            moved.append(rest.pop(0))
        elif rest[0] in _VALUED and len(rest) > 1:
            moved += [rest.pop(0), rest.pop(0)]
        else:
            break
    at = rest.index("--") if "--" in rest else len(rest)
    return [*rest[:at], *moved, *rest[at:]]


def _call(world: World, command: Callable[..., Any], bound: BoundArguments, injected: dict[str, Any]) -> int:
    if "ctx" not in injected:  # help, version, completion
        return command(*bound.args, **bound.kwargs) or 0
    from mica.cli.context import Context
    from mica.cli.interrupts import Interrupts
    from mica.cli.options import DEFAULTS

    interrupts = Interrupts()
    ctx = Context(world, bound.arguments.get("options", DEFAULTS), interrupts)
    result = command(*bound.args, **bound.kwargs, ctx=ctx)
    if iscoroutine(result):
        return interrupts.run(result)
    return result or 0


def report(world: World, error: MicaError, as_json: bool) -> None:
    """An error for people: what happened, and the way out; or as a JSON problem on one line."""
    from mica.cli.text import RED, clean, paint

    if as_json:
        import msgspec

        # One line each, because several things may fail in one command.
        world.stderr.write(msgspec.json.encode(error.problem(), enc_hook=str).decode() + "\n")
        return
    colour = world.colour(world.stderr)
    world.stderr.write(f"{paint('mica:', RED, colour)} {clean(error.message)}\n")
    if error.hint:
        first, *rest = clean(error.hint).split("\n")
        world.stderr.write(f"{paint('hint:', '1', colour)} {first}\n")
        world.stderr.writelines(f"      {line}\n" for line in rest)
    world.stderr.flush()


def _usage_error(world: World, error: Exception, argv: list[str], as_json: bool) -> int:
    from mica.cli.app import commands
    from mica.model.errors import invalid

    unknown = str(error).startswith("Unknown command")
    known = _known_words(argv, commands(), verb=not unknown)
    hint = f"see: {' '.join(['mica', *known, '--help'])}"
    if known in (["run"], ["vm", "exec"]) and "--" not in argv and "Unknown option" in str(error):
        hint = "put -- before the command for the guest: its options are then its own; " + hint
    message = " ".join(str(error).split())
    if unknown:  # the help that the hint names lists all there are
        message = message.partition(" Available commands:")[0]
    message = message.rstrip(".")
    report(world, invalid(message[0].lower() + message[1:] if message else "wrong usage", hint=hint), as_json)
    return USAGE


def _known_words(argv: list[str], commands: dict[str, bool], *, verb: bool) -> list[str]:
    """The words of ``argv`` that name something with a help of its own; without ``verb`` only the first."""
    words = [word for word in argv[:2] if not word.startswith("-")]
    if not words or words[0] not in commands:
        return []
    return words[:2] if verb and commands[words[0]] else words[:1]
