"""``mica daemon``: the verbs and where they are."""

from __future__ import annotations

from cyclopts import App

app = App(name="daemon", help="The daemon that drives VMs. They live on when it ends.", help_format="plaintext")

for _order, (_name, _help) in enumerate(
    (
        ("run", "Run the daemon in the foreground."),
        ("stop", "Stop the daemon; VMs live on."),
        ("status", "Say whether the daemon runs, and where."),
        ("log", "Show the log of a daemon that was started in the background."),
    )
):
    app.command(f"mica.cli.daemon_verbs:{_name}", name=_name, help=_help, sort_key=_order)
