"""``mica image build|import|verify|delete``."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Annotated

from cyclopts import Parameter

from mica.cli.context import Context, for_each
from mica.cli.image_show import short_digest
from mica.cli.options import DEFAULTS, Flag, Hidden, ImageArg, Options, Size
from mica.cli.text import size
from mica.cli.values import words
from mica.model.image import DebianRecipe, Firmware, ImageRecipe, ImportRecipe, MicroRecipe
from mica.model.operation import Operation


async def micro(
    *,
    name: str = "micro",
    suite: str = "bookworm",
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Build the small guest: seconds to build, seconds to boot.

    It is Debian's cloud kernel with busybox and the guest agent in an initial RAM file system.

    Parameters
    ----------
    name
        Name of the image.
    suite
        Debian's release, for example bookworm or trixie.
    """
    await _make(ctx, MicroRecipe(name=name, suite=suite))


async def debian(
    *,
    name: str = "debian",
    suite: str = "bookworm",
    size: Size | None = None,
    hostname: str = "debian",
    include: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Build a full Debian with systemd, agent, SSH, cloud-init and a serial console.

    Parameters
    ----------
    name
        Name of the image.
    suite
        Debian's release, for example bookworm or trixie.
    size
        Size of the disk, for example 8G; 4 GiB by default.
    hostname
        The guest's own name.
    include
        Further packages, with commas between; may be repeated.
    """
    recipe = DebianRecipe(
        name=name,
        suite=suite,
        hostname=hostname,
        include=tuple(word for item in include for word in words(item)),
    )
    if size is not None:
        from msgspec.structs import replace

        recipe = replace(recipe, size=size)
    await _make(ctx, recipe)


async def import_(
    file: str,
    /,
    *,
    name: str,
    firmware: Firmware = Firmware.UEFI,
    agent: Flag = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Import a disk image that lies on this host: qcow2, raw, VMDK, VHDX, VDI.

    Parameters
    ----------
    file
        The file. The daemon reads it.
    name
        Name of the image.
    firmware
        What it boots with: uefi or bios.
    agent
        The QEMU guest agent runs in it.
    """
    await _make(ctx, ImportRecipe(name=name, path=os.path.abspath(file), firmware=firmware, agent=agent))


async def _make(ctx: Context, recipe: ImageRecipe) -> None:
    async with ctx.client() as client:
        await ctx.perform(client, client.images.make(recipe, wait=False), cancel=True)
        view = await client.images.get(recipe.name)
    image = view.image
    ctx.emit(view, lambda: f"{image.name} is ready: {short_digest(image.digest)}, {size(image.size)}")


async def verify(
    image: ImageArg, /, *images: ImageArg, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]
) -> int:
    """Read every byte of images and compare with what was stored.

    Parameters
    ----------
    image
        Name or digest of the image.
    images
        Further images.
    """
    async with ctx.client() as client:
        return await for_each(
            ctx,
            (image, *images),
            lambda ref: ctx.perform(client, client.images.verify(ref, wait=False), cancel=True),
            _said("is whole"),
        )


async def delete(
    image: ImageArg, /, *images: ImageArg, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]
) -> int:
    """Delete images that no VM was made from.

    Parameters
    ----------
    image
        Name or digest of the image.
    images
        Further images.
    """
    async with ctx.client() as client:
        return await for_each(
            ctx,
            (image, *images),
            lambda ref: ctx.perform(client, client.images.delete(ref, wait=False)),
            _said("is deleted"),
        )


def _said(what: str) -> Callable[[Operation], Awaitable[str]]:
    async def outcome(operation: Operation) -> str:
        return f"{operation.target_name} {what}"

    return outcome
