"""``mica vm list`` and ``mica vm show``."""

from __future__ import annotations

import re
from typing import Annotated

from cyclopts import Parameter

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Flag, Hidden, Many, Options, VmArg
from mica.cli.text import age, facts, moment, size, table
from mica.cli.values import pairs
from mica.model.identity import IdentityItem
from mica.model.snapshot import Snapshot
from mica.model.units import Bytes
from mica.model.views import UsageSource, VmView
from mica.model.vm import DiskSpec, NicRuntime, Publish, VmState

_LIVE = (VmState.RUNNING, VmState.PAUSED, VmState.STOPPING)


async def list_(
    *,
    label: Many = (),
    trashed: Annotated[Flag, Parameter(name=["--trashed", "--trash"], negative=())] = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """List VMs.

    Parameters
    ----------
    label
        Only VMs with this label, as KEY=VALUE; given again, all must hold.
    trashed
        List the trash instead.
    """
    async with ctx.client() as client:
        vms = await client.vms.list(labels=pairs(label, "label"), trashed=trashed)
    views = sorted((vm.view for vm in vms), key=lambda view: _natural(view.name))
    ctx.emit(views, lambda: _trash(ctx, views) if trashed else _list(ctx, views))


def _natural(name: str) -> list[tuple[int, str]]:
    """``vm-2`` before ``vm-10``."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _list(ctx: Context, views: list[VmView]) -> str:
    if not views:
        ctx.say("no VMs yet; make one with: mica run micro")
        return ""
    head = ("NAME", "STATE", "IMAGE", "VCPUS", "MEMORY", "CPU", "USED", "PROMISED", "ADDRESS", "UP")
    rows = [
        (
            view.name,
            view.observed.state.value,
            view.image_name,
            str((view.running or view.spec).cpus),
            size((view.running or view.spec).memory),
            "-" if view.usage.cpu is None else f"{view.usage.cpu * 100:.0f} %",
            size(_used(view)),
            size(view.usage.promised),
            address(view),
            age(view.observed.started_at, ctx.now) if view.observed.state in _LIVE else "-",
        )
        for view in views
    ]
    return table(head, rows, right=(3, 4, 5, 6, 7, 9), colour=ctx.colour, width=ctx.width)


def _trash(ctx: Context, views: list[VmView]) -> str:
    if not views:
        ctx.say("the trash is empty")
        return ""
    head = ("NAME", "ID", "IMAGE", "DELETED", "EXPIRES")
    rows = [
        (view.name, view.id[:8], view.image_name, f"{age(view.deleted_at, ctx.now)} ago", moment(view.expires_at))
        for view in views
    ]
    return table(head, rows, colour=ctx.colour, width=ctx.width)


def address(view: VmView) -> str:
    """The address to tell first: what the guest says, else what it was given."""
    given = [nic.address for nic in view.nics if nic.address]
    return next(iter([*given, *view.observed.addresses]), "-")


async def show(vm: VmArg, /, *, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> None:
    """Show everything known of a VM.

    Parameters
    ----------
    vm
        Name or id of the VM.
    """
    async with ctx.client() as client:
        view = (await client.vms.get(vm)).view
        known = await client.snapshots.list(forks=True) if view.snapshot and not ctx.json else []
    snapshot = next((other.snapshot for other in known if other.snapshot.id == view.snapshot), None)
    ctx.emit(view, lambda: describe(view, ctx.now, snapshot, colour=ctx.colour, width=ctx.width))


def describe(
    view: VmView, now: float, snapshot: Snapshot | None = None, *, colour: bool = False, width: int | None = None
) -> str:
    """All of a VM for a reader; ``snapshot`` is the one that its present state descends from."""
    observed, spec = view.observed, view.spec
    has = view.running or spec
    state = observed.state.value
    wanted = f"wanted: {view.intent}" if view.intent.value != state else ""
    since = f"for {age(observed.since, now)}" if observed.since else ""
    about = ", ".join(part for part in (since, observed.reason, wanted) if part)
    limit = "" if spec.cpu_limit is None else f", at most {spec.cpu_limit:g} of the host's"
    problem = observed.problem
    return facts(
        (
            ("name", view.name),
            ("id", view.id),
            ("state", state),
            ("", ""),
            ("about", about),
            ("problem", "" if problem is None else "\n".join(t for t in (problem.message, problem.hint) if t)),
            ("pending", _pending(view)),
            ("operations", "\n".join(view.operations)),
            ("image", view.image_name),
            ("damaged", "\n".join(view.damaged)),
            ("fork of", view.forked_from),
            ("own by now", ", ".join(item.what for item in view.identity if item.done)),
            ("not yet own", "\n".join(_shared(item) for item in view.identity if not item.done)),
            ("snapshot", _snapshot(view, snapshot)),
            ("machine", f"{spec.machine}, {spec.firmware}, {view.accelerator or 'not running'}"),
            ("vCPUs", f"{has.cpus}{_later(has.cpus, spec.cpus)}{limit}"),
            ("memory", f"{size(has.memory)}{_later(size(has.memory), size(spec.memory))}"),
            ("use", _use(view)),
            ("disks", "\n".join(_disk(disk) for disk in spec.disks)),
            ("network", "\n".join(_nic(nic) for nic in view.nics) or ", ".join(nic.network for nic in spec.nics)),
            ("boot order", ", ".join(spec.boot)),
            ("agent", observed.agent.value),
            ("guest", ", ".join(part for part in (observed.os, observed.hostname) if part)),
            ("addresses", ", ".join(observed.addresses)),
            ("up", age(observed.started_at, now) if observed.state in _LIVE else ""),
            ("process", "" if view.process is None else f"pid {view.process.pid}"),
            ("labels", ", ".join(f"{key}={value}" for key, value in sorted(view.labels.items()))),
            ("description", view.description),
            ("options", ", ".join(_switches(view))),
            ("created", f"{moment(view.created_at)} by {view.created_by}"),
            (
                "deleted",
                "" if view.deleted_at is None else f"{moment(view.deleted_at)}, kept to {moment(view.expires_at)}",
            ),
            ("reduced", "\n".join(view.reduced)),
        ),
        colour=colour,
        width=width,
    )


def _pending(view: VmView) -> str:
    return f"{', '.join(view.pending)}: from the next start on (mica vm restart {view.name})" if view.pending else ""


def _later(has: object, will: object) -> str:
    return "" if has == will else f" ({will} from the next start on)"


def _shared(item: IdentityItem) -> str:
    return f"{item.what}: {item.why}" if item.why else item.what.value


def _snapshot(view: VmView, snapshot: Snapshot | None) -> str:
    if snapshot is None:
        return view.snapshot and f"goes on from {view.snapshot}"
    of = "" if snapshot.vm_id == view.id else f" of {snapshot.vm_name}"
    return f"goes on from {snapshot.name}{of}"


def _used(view: VmView) -> Bytes | None:
    """Memory that it takes: of one that shares its memory what it has for itself, whoever is charged for the rest."""
    return view.usage.memory if view.usage.shared is None else view.usage.own


def _use(view: VmView) -> str:
    usage, used = view.usage, _used(view)
    counted = usage.source is not UsageSource.PROCESS or usage.shared is not None
    alone = "" if counted else " (of its QEMU: there are no control groups to count all)"
    parts = (
        "" if usage.cpu is None else f"{usage.cpu * 100:.0f} % of a processor",
        "" if used is None else f"{size(used)} of memory{alone}",
        "" if usage.shared is None else f"{size(usage.shared)} shared with its relatives",
        "" if usage.promised is None else f"{size(usage.promised)} of memory promised",
        "" if usage.disk is None else f"{size(usage.disk)} of disk",
    )
    return ", ".join(part for part in parts if part)


def _disk(disk: DiskSpec) -> str:
    limits = [f"{disk.limits.iops} IOPS"] if disk.limits.iops else []
    limits += [f"{size(disk.limits.bytes_per_s)}/s"] if disk.limits.bytes_per_s else []
    at_most = f", at most {' and '.join(limits)}" if limits else ""
    return f"{disk.name}: {size(disk.size)} {disk.format}{', read-only' if disk.read_only else ''}{at_most}"


def publish_text(publish: Publish) -> str:
    host = f"[{publish.host_address}]" if ":" in publish.host_address else publish.host_address
    return f"{host}:{publish.host_port} → {publish.guest_port}/{publish.protocol}"


def _nic(nic: NicRuntime) -> str:
    published = ", ".join(publish_text(publish) for publish in nic.publish)
    return f"{nic.name}: {nic.address or 'no address'}" + (f", published {published}" if published else "")


def _switches(view: VmView) -> list[str]:
    spec = view.spec
    named = {
        "autostart": spec.autostart,
        "protected": spec.protected,
        "ephemeral": spec.ephemeral,
        "goes back to its last valid snapshot": spec.last_valid,
    }
    return [name for name, on in named.items() if on] + ([] if spec.display else ["no display"])
