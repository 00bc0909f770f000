"""``mica doctor``: what this host can do, and closing the gaps."""

from __future__ import annotations

import asyncio
import shlex
from typing import Annotated

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Flag, Hidden, Options
from mica.cli.text import BOLD, DIM, GREEN, RED, YELLOW, clean, fold, paint
from mica.model.doctor import DoctorReport, Finding, Status
from mica.model.errors import TABLE, Code, MicaError, invalid

_MARKS = {Status.OK: ("✓", "ok", GREEN), Status.DEGRADED: ("!", "!!", YELLOW), Status.MISSING: ("✗", "NO", RED)}
_WORDS = {
    Status.OK: "This host can do everything.",
    Status.DEGRADED: "Mica works on this host, with what is marked ! missing.",
    Status.MISSING: "Mica does not work on this host until what is marked ✗ is there.",
}


async def doctor(
    *,
    fix: Flag = False,
    yes: Flag = False,
    fresh: Flag = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Say what this host can do, with proof, what each gap costs, and the command that closes it.

    Parameters
    ----------
    fix
        Show those commands and run them.
    yes
        Do not ask before running them.
    fresh
        Prove the accelerators again instead of using the proofs of this boot.
    """
    async with ctx.client() as client:
        report = await client.doctor(fresh=fresh)
        gaps = [finding for finding in report.findings if finding.fix and finding.status is not Status.OK]
        if fix and gaps:
            if not ctx.json:
                ctx.emit(report, lambda: render(report, ctx))
            await _fix(ctx, gaps, yes=yes)
            report = await client.doctor(fresh=True)
        elif fix:
            ctx.say("there is no gap that a command closes")
    ctx.emit(report, lambda: render(report, ctx))
    return TABLE[Code.HOST_LACKS].exit_status if report.status is Status.MISSING else 0


def render(report: DoctorReport, ctx: Context) -> str:
    """The findings, one after the other."""
    plain = "✓".encode("ascii", "ignore") == b"" and not _can(ctx, "✓✗")
    width = max((len(finding.title) for finding in report.findings), default=0)
    lines: list[str] = []
    for finding in report.findings:
        mark, word, style = _MARKS[finding.status]
        lines.append(
            f"{paint(word if plain else mark, style, ctx.colour)} "
            f"{paint(clean(finding.title).ljust(width), BOLD, ctx.colour)}  "
            f"{fold(clean(finding.proof), ctx.width, len(word if plain else mark) + width + 3)}"
        )
        lines += [
            f"    {paint(name, DIM, ctx.colour)} "
            # A command is there to be copied.
            + (clean(text) if finding.fix and name != "costs:" else fold(clean(text), ctx.width, len(name) + 5))
            for name, text in _gap(finding)
        ]
    fixable = sum(1 for finding in report.findings if finding.fix and finding.status is not Status.OK)
    words = _WORDS[report.status]
    lines += ["", words.replace("✗", "NO") if plain else words]
    if fixable:
        lines.append(f"mica doctor --fix runs the {fixable} command{'s' if fixable > 1 else ''} above.")
    return "\n".join(lines)


def _can(ctx: Context, text: str) -> bool:
    try:
        text.encode(ctx.world.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _gap(finding: Finding) -> list[tuple[str, str]]:
    if finding.status is Status.OK:
        return []
    note = f"  ({finding.fix_note})" if finding.fix_note else ""
    out = [("costs:", finding.costs)] if finding.costs else []
    if finding.fix:
        out.append(("fix:  ", shlex.join(finding.fix) + note))
    elif finding.fix_note:
        out.append(("fix:  ", finding.fix_note))
    return out


async def _fix(ctx: Context, gaps: list[Finding], *, yes: bool) -> None:
    """Run each command once, in the order of the findings. Raises ``command-failed`` for the first that fails."""
    commands = list(dict.fromkeys(finding.fix for finding in gaps))
    for command in commands:
        ctx.say(f"will run: {shlex.join(command)}")
    if not yes and not _agreed(ctx):
        raise MicaError(Code.CANCELLED, "nothing was run", hint="mica doctor --fix --yes does not ask")
    for command in commands:
        ctx.say(f"running: {shlex.join(command)}")
        try:
            # With --json standard output carries one document only.
            out = ctx.world.stderr.fileno() if ctx.json else None
            process = await asyncio.create_subprocess_exec(*command, stdout=out)
        except OSError as error:
            raise MicaError(
                Code.COMMAND_FAILED, f"cannot run {command[0]}: {error.strerror}", hint="run the command by hand"
            ) from error
        status = await process.wait()
        if status:
            raise MicaError(
                Code.COMMAND_FAILED,
                f"{shlex.join(command)} ended with status {status}",
                hint="what it said is above; mica doctor looks again",
            )


def _agreed(ctx: Context) -> bool:
    world = ctx.world
    if not world.is_terminal(world.stdin) or world.stdin is None:
        raise invalid("there is no terminal to ask on", hint="mica doctor --fix --yes does not ask")
    world.stderr.write("Run these commands? [y/N] ")
    world.stderr.flush()
    return world.stdin.readline().strip().lower() in ("y", "yes")
