"""``mica snapshot schedule|schedules|unschedule``."""

from __future__ import annotations

from typing import Annotated

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Duration, Flag, Hidden, Options, VmArg
from mica.cli.text import moment, table
from mica.model.schedule import ScheduleView
from mica.model.units import format_duration


async def schedule(
    vm: VmArg = "",
    /,
    *,
    every: Duration = 3600.0,
    keep: str = "24h,7d,4w",
    label: str = "",
    no_memory: Flag = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Have snapshots taken by themselves, of a VM or of all VMs with a label, the first one at once.

    Of moments that were missed, because the daemon did not run, one is made up for. A VM that has not run since its
    last snapshot gets no other. Snapshots that nothing keeps are deleted, never one that is protected or the last good
    one.

    Parameters
    ----------
    vm
        Name or id of the VM.
    every
        How often, for example 15m, 1h or 1d.
    keep
        Which stay: 24h,7d,4w is the last of each of 24 hours, of 7 days and of 4 weeks that have any.
    label
        Instead of one VM all that have this label, KEY or KEY=VALUE, now or later.
    no_memory
        Disks and settings only, also of VMs that run.
    """
    async with ctx.client() as client:
        view = await client.schedules.create(vm=vm, label=label, every=every, keep=keep, memory=not no_memory)
    ctx.emit(view, lambda: f"{view.target}: every {format_duration(view.schedule.every_s)}, keeping {view.keep}")


async def schedules(*, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> None:
    """List what has snapshots taken by itself, and when the next ones are."""
    async with ctx.client() as client:
        views = await client.schedules.list()
    ctx.emit(views, lambda: _table(ctx, views) if views else "no schedules; make one with: mica snapshot schedule VM")


def _table(ctx: Context, views: list[ScheduleView]) -> str:
    rows = [
        (
            view.schedule.id[:8],
            view.target,
            format_duration(view.schedule.every_s),
            view.keep,
            "yes" if view.schedule.memory else "no",
            moment(view.next_at),
            str(len(view.vms)),
            str(view.snapshots),
        )
        for view in views
    ]
    head = ("ID", "OF", "EVERY", "KEEPS", "MEMORY", "NEXT", "VMS", "SNAPSHOTS")
    return table(head, rows, right=(6, 7), colour=ctx.colour, width=ctx.width)


async def unschedule(schedule: str, /, *, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> None:
    """Have no more snapshots taken by themselves. Those that there are stay until they are deleted by hand.

    Parameters
    ----------
    schedule
        Id of the schedule, or its beginning: see mica snapshot schedules.
    """
    async with ctx.client() as client:
        view = await client.schedules.get(schedule)
        await client.schedules.delete(view.schedule.id)
    ctx.emit(view, lambda: f"no more snapshots of {view.target} are taken by themselves")
