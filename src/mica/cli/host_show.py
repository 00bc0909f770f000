"""``mica host show``."""

from __future__ import annotations

from typing import Annotated

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Hidden, Options
from mica.cli.text import age, facts, moment, size
from mica.model.units import Bytes
from mica.model.views import HostView


async def show(*, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> None:
    """Show this host and what its VMs use of it."""
    async with ctx.client() as client:
        view = await client.host()
    ctx.emit(view, lambda: describe(view, ctx))


def describe(view: HostView, ctx: Context) -> str:
    """All of a host for a reader."""
    return facts(
        (
            ("host", view.hostname),
            ("processors", str(view.cpus)),
            ("memory", f"{size(view.memory)}, {size(view.available)} available"),
            ("for VMs", _for_vms(view)),
            ("VMs", f"{view.vms}, {view.running} running"),
            ("booted once", f"{size(view.booted)} of {size(view.booted_limit)}" if view.booted_limit else "off"),
            ("accelerator", view.accelerator),
            ("QEMU", view.qemu),
            ("daemon", f"{view.version}, pid {view.pid}"),
            ("up", f"{age(view.started_at, ctx.now)}, since {moment(view.started_at)}"),
            ("home", view.home),
        ),
        colour=ctx.colour,
    )


def _for_vms(view: HostView) -> str:
    shared = f", {size(view.shared)} shared by copies" if view.shared else ""
    left = f"{size(Bytes(view.left))} left" if view.left >= 0 else f"{size(Bytes(-view.left))} short: stop some"
    return f"{size(view.committed)} promised{shared}, {size(view.reserve)} kept for the host, {left}"
