"""``mica vm cp``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Hidden, Options
from mica.cli.progress import Progress
from mica.cli.text import size
from mica.client.archives import CopyReport
from mica.model.errors import invalid, not_found
from mica.model.units import format_duration


@dataclass(frozen=True)
class Place:
    """One side of a copy: ``vm`` is empty for a path on this host."""

    vm: str
    path: str


def parse_place(text: str) -> Place:
    """``VM:PATH`` is in a guest; what has a ``/`` before its first ``:``, or no ``:``, is here. Raises ``invalid``."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name or not name:
        return Place("", text)
    if not path:
        raise invalid(f"{text!r} names no path in the guest", hint=f"write for example {name}:/tmp/")
    return Place(name, path)


async def cp(
    source: str,
    dest: str,
    /,
    *,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Copy files and directories into or out of a guest: mica vm cp here.txt VM:/tmp/

    Directories are copied whole. A destination that is a directory gets the source inside it; another one is its new
    name. All of it arrives, checked against its checksum, or nothing does; devices, sockets and links that lead out of
    the copy are left out and named.

    Parameters
    ----------
    source
        A path here, or VM:PATH in a guest. A path here that has a colon in it is written with ./ before it.
    dest
        VM:PATH in a guest, or a path here.
    """
    here, there = parse_place(source), parse_place(dest)
    if bool(here.vm) == bool(there.vm):
        where = "in guests" if here.vm else "on this host"
        raise invalid(f"both {source!r} and {dest!r} are {where}", hint="one side is VM:PATH, the other a path here")
    began = time.monotonic()
    async with ctx.client() as client:
        vm = await client.vms.get(here.vm or there.vm)
        with Progress(ctx.world, quiet=ctx.json) as progress:
            title = f"cp {source}"

            def told(done: int, total: int | None) -> None:
                fraction = done / total if total else None
                progress.show(title, fraction, size(done) + (f" of {size(total)}" if total else ""))

            if here.vm:
                report = await vm.copy_out(here.path, _dest(there.path), on_progress=told)
            else:
                report = await vm.copy_in(Path(here.path), there.path, on_progress=told)
    ctx.emit(report, lambda: _outcome(report, time.monotonic() - began))


def _dest(path: str) -> Path:
    """Raises ``not-found`` for ``new/``: who writes that means a directory, and there is none."""
    if path.endswith("/") and not Path(path).is_dir():
        raise not_found("directory", path)
    return Path(path)


def _outcome(report: CopyReport, took_s: float) -> str:
    files = f"{report.files} file{'' if report.files == 1 else 's'}"
    left_out = "".join(f"\nleft out: {name}" for name in report.skipped)
    doubt = "" if report.verified else "\nnot verified: the guest has no sha256sum, cksum or gzip"
    return f"{files}, {size(report.bytes)}, copied in {format_duration(took_s)}{left_out}{doubt}"
