"""``mica template create|list|show|set|delete|verify``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from mica.cli.context import Context, for_each
from mica.cli.options import DEFAULTS, Flag, Hidden, Options, TemplateArg, VmArg
from mica.cli.snapshot_show import describe, state
from mica.cli.snapshot_verbs import pause, said
from mica.cli.text import age, size, table
from mica.client.snapshots import verdict
from mica.model.errors import invalid
from mica.model.operation import Operation
from mica.model.views import SnapshotSet, SnapshotView, TemplateCreate


async def create(
    vm: VmArg,
    name: str = "",
    /,
    *,
    no_memory: Flag = False,
    quiesce: Flag = False,
    description: str = "",
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Freeze a VM as it is now, for others to begin at: mica run NAME. One that runs is frozen with its memory.

    The VM goes on after a moment. The template stays when the VM is deleted.

    Parameters
    ----------
    vm
        Name or id of the VM.
    name
        Name of the template, which no image and no other template has; made from the VM's by default.
    no_memory
        Disks and settings only: what begins there boots.
    quiesce
        Have the guest's agent freeze the file systems for the moment.
    description
        What it is for.
    """
    body = TemplateCreate(vm=vm, name=name, memory=not no_memory, quiesce=quiesce, description=description)
    async with ctx.client() as client:
        operation = await ctx.perform(client, client.templates.create(body, wait=False), cancel=True)
        view = await client.templates.get(operation.result["id"])
    ctx.emit(view, lambda: _made(view))


def _made(view: SnapshotView) -> str:
    snapshot = view.snapshot
    parts = [size(view.size), "with memory" if view.memory else "without memory"]
    line = ", ".join(
        (f"template {snapshot.name} is made", *parts, *pause(snapshot.vm_name, snapshot.pause_s, snapshot.lost))
    )
    return f"{line}\ntry: mica run {snapshot.name}"


async def list_(*, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> None:
    """List templates with their sizes and what began at them."""
    async with ctx.client() as client:
        views = await client.templates.list()
    ctx.emit(views, lambda: _list(ctx, views))


def _list(ctx: Context, views: list[SnapshotView]) -> str:
    if not views:
        ctx.say("no templates yet; make one with: mica template create VM")
        return ""
    head = ("NAME", "VCPUS", "RAM", "SIZE", "AGE", "MEMORY", "STATE", "STANDBY", "USED BY", "ABOUT")
    return table(head, [_row(view, ctx.now) for view in views], right=(1, 2, 3, 4), colour=ctx.colour, width=ctx.width)


def _row(view: SnapshotView, now: float) -> tuple[str, ...]:
    snapshot = view.snapshot
    about = ["protected"] if snapshot.protected else []
    return (
        snapshot.name,
        str(snapshot.spec.cpus),
        size(snapshot.spec.memory),
        size(view.size),
        age(snapshot.created_at, now),
        "yes" if view.memory else "no",
        state(view),
        f"{view.standing_by} of {snapshot.standby}" if snapshot.standby or view.standing_by else "-",
        f"{len(view.forks)} VM{'s' if len(view.forks) > 1 else ''}" if view.forks else "-",
        ", ".join([*about, *([snapshot.description] if snapshot.description else [])]) or "-",
    )


async def show(template: TemplateArg, /, *, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> None:
    """Show everything known of a template.

    Parameters
    ----------
    template
        Name or id of the template.
    """
    async with ctx.client() as client:
        view = await client.templates.get(template)
    ctx.emit(view, lambda: describe(view, {}, ctx.now, colour=ctx.colour))


async def set_(
    template: TemplateArg,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    protected: Annotated[bool | None, Parameter(negative="--no-protected")] = None,
    standby: int | None = None,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Rename, describe or protect a template, or have VMs stand by for the shortest start.

    Parameters
    ----------
    template
        Name or id of the template.
    name
        Its new name, a DNS label.
    description
        What it is for.
    protected
        Refuse to delete it.
    standby
        How many VMs wait, ready, for whoever runs it next (0 to 64). Each is promised as much memory as any copy of
        it, and gives way where that is short. --standby 0 ends them.
    """
    body = SnapshotSet(name=name, description=description, protected=protected, standby=standby)
    if body == SnapshotSet():
        raise invalid(f"nothing to change about {template}", hint="see: mica template set --help")
    async with ctx.client() as client:
        id_ = (await client.templates.get(template)).snapshot.id
        await ctx.perform(client, client.templates.set(id_, body, wait=False))
        view = await client.templates.get(id_)
    ctx.emit(view, lambda: f"{view.snapshot.name} is changed")


async def delete(
    template: TemplateArg,
    /,
    *templates: TemplateArg,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Delete templates. VMs that began at them stay as they are.

    Parameters
    ----------
    template
        Name or id of the template.
    templates
        Further templates.
    """
    async with ctx.client() as client:
        return await for_each(
            ctx,
            (template, *templates),
            lambda ref: ctx.perform(client, client.templates.delete(ref, wait=False)),
            said("is deleted"),
        )


async def verify(
    template: TemplateArg,
    /,
    *templates: TemplateArg,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Read every byte of templates and compare with the checksums written when they were made.

    Parameters
    ----------
    template
        Name or id of the template.
    templates
        Further templates.
    """
    async with ctx.client() as client:

        async def work(ref: str) -> Operation:
            return verdict(await ctx.perform(client, client.templates.verify(ref, wait=False), cancel=True))

        return await for_each(ctx, (template, *templates), work, said("is whole"))
