"""``mica vm create``."""

from __future__ import annotations

from typing import Annotated

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Flag, Hidden, ImageArg, Options
from mica.cli.shape import NO_SHAPE, Shape
from mica.client.vms import make_create, vm_id


async def create(
    image: ImageArg = "",
    /,
    *,
    start: Flag = False,
    shape: Shape = NO_SHAPE,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Create a VM and leave it stopped.

    Parameters
    ----------
    image
        Name or digest of the image that it starts from; without one it has an empty disk (--disk) only.
    start
        Start it too, without waiting for its guest.
    """
    async with ctx.client() as client:
        if image:
            await client.images.ensure(image, waiter=lambda operation: ctx.wait(client, operation, cancel=True))
        body = make_create(image, start=start, **shape.fields())
        operation = await ctx.perform(client, client.vms.create(body, wait=False), cancel=True)
        view = await client.vms.view(vm_id(operation))
    ctx.emit(view, lambda: f"{view.name} is {view.observed.state}")
