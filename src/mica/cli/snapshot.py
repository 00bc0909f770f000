"""``mica snapshot``: the verbs and where they are."""

from __future__ import annotations

from cyclopts import App

app = App(name="snapshot", help="Snapshots: whole machines at one moment.", help_format="plaintext")

for _order, (_name, _path, _help) in enumerate(
    (
        ("create", "mica.cli.snapshot_verbs:create", "Take a snapshot of a VM, while it runs or not."),
        ("list", "mica.cli.snapshot_show:list_", "List snapshots as a tree."),
        ("show", "mica.cli.snapshot_show:show", "Show everything known of a snapshot."),
        ("restore", "mica.cli.snapshot_verbs:restore", "Bring a VM back to a snapshot."),
        ("delete", "mica.cli.snapshot_verbs:delete", "Delete snapshots."),
        ("rename", "mica.cli.snapshot_verbs:rename", "Give a snapshot another name."),
        ("describe", "mica.cli.snapshot_verbs:describe", "Say what a snapshot is for."),
        ("protect", "mica.cli.snapshot_verbs:protect", "Protect a snapshot from being deleted."),
        ("schedule", "mica.cli.snapshot_schedule:schedule", "Have snapshots taken by themselves."),
        ("schedules", "mica.cli.snapshot_schedule:schedules", "List what has snapshots taken by itself."),
        ("unschedule", "mica.cli.snapshot_schedule:unschedule", "Have no more snapshots taken by themselves."),
        ("verify", "mica.cli.snapshot_verbs:verify", "Read every byte of snapshots and compare."),
    )
):
    app.command(_path, name=_name, help=_help, sort_key=_order)
