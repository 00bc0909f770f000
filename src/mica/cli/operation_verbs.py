"""``mica operation list|show|wait|cancel|resolve``."""

from __future__ import annotations

from typing import Annotated, Literal

from mica.cli.context import WAIT_TIMEOUT_S, Context, for_each
from mica.cli.options import DEFAULTS, Duration, Flag, Hidden, OperationArg, Options, VmArg
from mica.cli.text import age, facts, moment, table
from mica.model.operation import JournalEntry, Operation
from mica.model.units import format_duration


async def list_(
    *,
    vm: VmArg = "",
    active: Flag = False,
    limit: int = 50,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """List operations, the newest first.

    Parameters
    ----------
    vm
        Only those on this VM.
    active
        Only those that have not ended.
    limit
        How many at most.
    """
    async with ctx.client() as client:
        found = await client.operations.list(vm=vm, active=active, limit=limit)
    ctx.emit(found, lambda: operations_table(found, ctx))


def operations_table(found: list[Operation], ctx: Context) -> str:
    """Operations as a table."""
    if not found:
        ctx.say("no operations")
        return ""
    head = ("ID", "VERB", "TARGET", "STATE", "BY", "AGE", "TOOK", "ABOUT")
    rows = [
        (
            item.id[:8],  # enough for every command here
            item.verb,
            item.target_name or item.target,
            item.state.value,
            item.by.name,
            age(item.created_at, ctx.now),
            took(item, ctx.now),
            item.problem.message if item.problem else item.step,
        )
        for item in found
    ]
    return table(head, rows, right=(5, 6), colour=ctx.colour, width=ctx.width)


def took(operation: Operation, now: float) -> str:
    """How long it ran, or has been running."""
    if operation.started_at is None:
        return "-"
    return format_duration(max(0.0, (operation.ended_at or now) - operation.started_at))


async def show(operation: OperationArg, /, *, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> None:
    """Show an operation with its steps.

    Parameters
    ----------
    operation
        Id of the operation, or its beginning.
    """
    async with ctx.client() as client:
        found = await client.operations.get(operation)
    ctx.emit(found, lambda: describe(found, ctx))


def describe(operation: Operation, ctx: Context) -> str:
    """All of an operation for a reader."""
    problem = operation.problem
    progress = "" if operation.progress is None else f"{operation.progress * 100:.0f} %"
    began = operation.started_at or operation.created_at
    return facts(
        (
            ("id", operation.id),
            ("verb", operation.verb),
            ("target", f"{operation.target_name} ({operation.target})"),
            ("state", operation.state.value),
            ("cancel", "asked for" if operation.cancel_requested else ""),
            ("now", ", ".join(part for part in (operation.step, progress) if part)),
            ("problem", "" if problem is None else "\n".join(t for t in (problem.message, problem.hint) if t)),
            ("by", f"{operation.by.name} ({operation.by.source})"),
            ("created", moment(operation.created_at)),
            ("took", took(operation, ctx.now)),
            ("parameters", _pairs(operation.params)),
            ("result", _pairs(operation.result)),
            ("steps", "\n".join(_entry(entry, began) for entry in operation.journal)),
        ),
        colour=ctx.colour,
    )


def _pairs(values: dict[str, object]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in values.items() if value not in (None, "", {}, []))


def _entry(entry: JournalEntry, began: float) -> str:
    at = format_duration(max(0.0, entry.at - began))
    return f"+{at:<8}{entry.step} {entry.event}" + (f": {entry.error}" if entry.error else "")


async def wait(
    operation: OperationArg,
    /,
    *operations: OperationArg,
    timeout: Duration = WAIT_TIMEOUT_S,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Wait until operations have ended. The exit status tells how.

    Parameters
    ----------
    operation
        Id of the operation, or its beginning.
    operations
        Further operations.
    timeout
        How long to wait at most, for example 10m.
    """
    async with ctx.client() as client:

        async def one(operation_id: str) -> Operation:
            return await ctx.wait(client, await client.operations.get(operation_id), timeout_s=timeout)

        return await for_each(ctx, (operation, *operations), one, _ended)


async def _ended(operation: Operation) -> str:
    return f"{operation.verb} {operation.target_name}: {operation.state}"


async def cancel(operation: OperationArg, /, *, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> None:
    """Cancel an operation; what it has done is undone.

    Parameters
    ----------
    operation
        Id of the operation, or its beginning.
    """
    async with ctx.client() as client:
        await client.operations.cancel(operation)
        ended = await client.operations.settle(operation)
    ctx.emit(ended, lambda: f"{ended.verb} {ended.target_name}: {ended.state}")


async def resolve(
    operation: OperationArg,
    how: Literal["retry", "accept"],
    /,
    *,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Decide about an operation that is stuck because something could not be undone.

    Parameters
    ----------
    operation
        Id of the operation, or its beginning.
    how
        retry: try again to undo; accept: what is left stays as it is.
    """
    async with ctx.client() as client:
        await client.operations.resolve(operation, how)
        ended = await client.operations.settle(operation)
    ctx.emit(ended, lambda: f"{ended.verb} {ended.target_name}: {ended.state}")
