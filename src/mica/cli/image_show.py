"""``mica image list`` and ``mica image show``."""

from __future__ import annotations

from typing import Annotated

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Hidden, ImageArg, Options
from mica.cli.text import age, facts, moment, size, table
from mica.model.units import Bytes
from mica.model.views import BootedView, ImageView


async def list_(*, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> None:
    """List images with their sizes and ages."""
    async with ctx.client() as client:
        views = await client.images.list()
    ctx.emit(views, lambda: _list(ctx, views))


def _list(ctx: Context, views: list[ImageView]) -> str:
    if not views:
        ctx.say("no images yet; make one with: mica image build micro")
        return ""
    head = ("NAME", "DIGEST", "OS", "SIZE", "DISK", "BOOTED", "AGE", "USED BY", "STATE")
    rows = [
        (
            view.image.name,
            short_digest(view.image.digest),
            view.image.os,
            size(view.image.size),
            size(view.image.disk_size) if view.image.disk else "-",
            size(Bytes(sum(state.size for state in view.booted))) if view.booted else "-",
            age(view.image.created_at, ctx.now),
            _users(view),
            "damaged" if view.damaged else "ok",
        )
        for view in views
    ]
    return table(head, rows, right=(3, 4, 5, 6), colour=ctx.colour, width=ctx.width)


def short_digest(digest: str) -> str:
    """The beginning of a digest, enough to tell images apart."""
    return digest.rpartition(":")[2][:12]


def _users(view: ImageView) -> str:
    shown = ", ".join(view.used_by[:3])
    return shown + (f" and {len(view.used_by) - 3} more" if len(view.used_by) > 3 else "") or "-"


def _booted(state: BootedView, ctx: Context) -> str:
    """A state that VMs of one shape begin at."""
    spec, used = state.spec, state.used_at
    last = "not used yet" if used is None else f"used {age(used, ctx.now)} ago"
    what = f"{spec.machine}, {spec.cpus} vCPU{'s' if spec.cpus > 1 else ''}, {size(spec.memory)}"
    return f"{what}: {size(state.size)}, {last}"


async def show(image: ImageArg, /, *, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> None:
    """Show everything known of an image.

    Parameters
    ----------
    image
        Name or digest of the image.
    """
    async with ctx.client() as client:
        view = await client.images.get(image)
    ctx.emit(view, lambda: describe(view, ctx))


def describe(view: ImageView, ctx: Context) -> str:
    """All of an image for a reader."""
    image = view.image
    boot = image.direct_boot
    return facts(
        (
            ("name", image.name),
            ("digest", image.digest),
            ("state", "damaged" if view.damaged else "ok"),
            ("damage", view.damaged),
            ("os", image.os),
            ("created", f"{moment(image.created_at)} ({age(image.created_at, ctx.now)} ago)"),
            ("verified", "" if view.verified_at is None else moment(view.verified_at)),
            ("size", size(image.size)),
            ("disk", f"{size(image.disk_size)} {image.disk_format}" if image.disk else "none: lives in memory"),
            ("firmware", image.firmware.value),
            ("direct boot", "" if boot is None else f"{boot.kernel}, {boot.initrd}\n{boot.cmdline}"),
            ("needs memory", size(image.min_memory) if image.min_memory else ""),
            ("agent", "yes" if image.agent else "no"),
            ("cloud-init", "yes" if image.cloud_init else "no"),
            ("files", "\n".join(f"{name}: {size(file.size)}" for name, file in sorted(image.files.items()))),
            ("build", "\n".join(f"{key}: {value}" for key, value in sorted(image.build.items()))),
            ("booted", "\n".join(_booted(state, ctx) for state in view.booted)),
            ("used by", "\n".join(view.used_by)),
        ),
        colour=ctx.colour,
    )
