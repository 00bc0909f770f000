"""``mica snapshot list`` and ``mica snapshot show``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, NamedTuple

from cyclopts import Parameter

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Flag, Hidden, Options, SnapshotArg, VmArg
from mica.cli.text import age, facts, moment, size, table
from mica.model.snapshot import Snapshot, SnapshotKind
from mica.model.views import SnapshotView


async def list_(
    vm: VmArg = "",
    /,
    *,
    all_: Annotated[Flag, Parameter(name="--all")] = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """List snapshots as a tree: each below the one that it descends from.

    Parameters
    ----------
    vm
        Name or id of the VM; those of all VMs by default.
    all_
        Also the moments at which forks began.
    """
    async with ctx.client() as client:
        views = await client.snapshots.list(vm, forks=all_)
    ctx.emit(views, lambda: _list(ctx, vm, views))


def _list(ctx: Context, vm: str, views: list[SnapshotView]) -> str:
    if not views:
        ctx.say(f"no snapshots yet; take one with: mica snapshot create {vm or 'VM'}")
        return ""
    names = {view.snapshot.vm_id: view.snapshot.vm_name for view in views}
    out = []
    for vm_id, name in sorted(names.items(), key=lambda item: item[1]):
        nodes = tree(view for view in views if view.snapshot.vm_id == vm_id)
        out.append("\n".join([*([] if vm else [ctx.title(name)]), _table(ctx, nodes)]))
    return "\n\n".join(out)


class Node(NamedTuple):
    """One line of a tree. ``branch`` is what stands before its name."""

    branch: str
    view: SnapshotView


def tree(views: Iterable[SnapshotView]) -> list[Node]:
    """The snapshots of one VM in the order of a tree, siblings oldest first.

    one
    two         descends from one
    ├─ three    and so do three and five from two
    │  four
    └─ five
    """
    known = {view.snapshot.id: view for view in views}
    children: dict[str, list[SnapshotView]] = {}
    for view in sorted(known.values(), key=lambda view: view.snapshot.created_at):
        parent = view.snapshot.parent
        children.setdefault(parent if parent in known else "", []).append(view)
    out: list[Node] = []
    # A stack, because a thousand snapshots in a row are deeper than Python calls.
    waiting = _branches(children.get("", []), "")
    while waiting:
        view, branch, below = waiting.pop()
        out.append(Node(branch, view))
        waiting += _branches(children.get(view.snapshot.id, []), below)
    return out


def _branches(children: list[SnapshotView], before: str) -> list[tuple[SnapshotView, str, str]]:
    """Each with what stands before it and before what follows it, the last one first.

    What follows alone stays in the column of the one above; the tree grows to the right only where it divides.
    """
    if len(children) == 1:
        return [(children[0], before, before)]
    out = [(child, f"{before}├─ ", f"{before}│  ") for child in children]
    if out:
        out[-1] = (children[-1], f"{before}└─ ", f"{before}   ")
    return out[::-1]


def _table(ctx: Context, nodes: list[Node]) -> str:
    head = ("NAME", "SIZE", "AGE", "MEMORY", "STATE", "ABOUT")
    rows = [
        (
            f"{node.branch}{node.view.snapshot.name}{' ← now' if node.view.current else ''}",
            size(node.view.size),
            age(node.view.snapshot.created_at, ctx.now),
            "yes" if node.view.memory else "no",
            state(node.view),
            ", ".join(_about(node.view)),
        )
        for node in nodes
    ]
    return table(head, rows, right=(1, 2), colour=ctx.colour, width=ctx.width)


def state(view: SnapshotView) -> str:
    """In one word how far it is to be trusted."""
    if view.damaged:
        return "damaged"
    return "ok" if view.complete else view.snapshot.state.value


def _about(view: SnapshotView) -> list[str]:
    snapshot = view.snapshot
    forks = f"{len(view.forks)} fork{'s' if len(view.forks) > 1 else ''}" if view.forks else ""
    kinds = {
        SnapshotKind.SAFETY: "before a restore",
        SnapshotKind.SCHEDULE: "by schedule",
        SnapshotKind.FORK: "a fork began here",
    }
    parts = (kinds.get(snapshot.kind, ""), "protected" if snapshot.protected else "", forks, snapshot.description)
    return [part for part in parts if part]


async def show(
    vm: VmArg, snapshot: SnapshotArg, /, *, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]
) -> None:
    """Show everything known of a snapshot.

    Parameters
    ----------
    vm
        Name or id of the VM.
    snapshot
        Name or id of the snapshot.
    """
    async with ctx.client() as client:
        view = await client.snapshots.get(vm, snapshot)
        known = {other.snapshot.id: other.snapshot.name for other in await client.snapshots.list(vm, forks=True)}
    ctx.emit(view, lambda: describe(view, known, ctx.now, colour=ctx.colour))


def describe(view: SnapshotView, known: dict[str, str], now: float, *, colour: bool = False) -> str:
    """All of a snapshot for a reader; ``known`` are the names of its VM's snapshots by id."""
    snapshot = view.snapshot
    return facts(
        (
            ("name", snapshot.name),
            ("id", snapshot.id),
            ("of", f"{snapshot.vm_name} ({snapshot.vm_id})"),
            ("state", state(view)),
            ("damage", "\n".join(view.damaged)),
            ("made", f"{moment(snapshot.created_at)} ({age(snapshot.created_at, now)} ago) by {snapshot.created_by}"),
            ("why", snapshot.kind.value),
            ("description", snapshot.description),
            ("after", known.get(snapshot.parent, snapshot.parent)),
            ("now", f"{snapshot.vm_name} goes on from here" if view.current else ""),
            ("forks", "\n".join(view.forks)),
            ("standby", _standby(view)),
            ("size", size(view.size)),
            ("memory", _memory(snapshot)),
            ("machine", f"{snapshot.spec.machine}, {snapshot.spec.firmware}"),
            ("vCPUs", str(snapshot.spec.cpus)),
            ("RAM", size(snapshot.spec.memory)),
            ("disks", ", ".join(sorted(snapshot.disks))),
            ("lost", " and ".join(snapshot.lost)),
            ("pause", "" if snapshot.pause_s is None else f"{snapshot.pause_s * 1000:.0f} ms"),
            ("verified", "" if view.verified_at is None else f"{age(view.verified_at, now)} ago"),
            ("protected", "yes" if snapshot.protected else "no"),
        ),
        colour=colour,
    )


def _standby(view: SnapshotView) -> str:
    if not (view.snapshot.standby or view.standing_by):
        return ""
    promised = f", {size(view.standby_memory)} of memory promised" if view.standby_memory else ""
    return f"{view.standing_by} of {view.snapshot.standby} VMs{promised}"


def _memory(snapshot: Snapshot) -> str:
    if snapshot.memory is None:
        return "no: restored, it is stopped"
    build = snapshot.memory.build
    return f"yes, for {build.machine}, CPU {build.cpu}, {build.accelerator}, QEMU build {build.qemu}"
