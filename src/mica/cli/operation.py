"""``mica operation``: the verbs and where they are."""

from __future__ import annotations

from cyclopts import App

app = App(name="operation", help="Operations: what Mica is doing and has done.", help_format="plaintext")

for _order, (_name, _attribute, _help) in enumerate(
    (
        ("list", "list_", "List operations, the newest first."),
        ("show", "show", "Show an operation with its steps."),
        ("wait", "wait", "Wait until operations have ended."),
        ("cancel", "cancel", "Cancel an operation; what it has done is undone."),
        ("resolve", "resolve", "Decide about an operation that is stuck."),
    )
):
    app.command(f"mica.cli.operation_verbs:{_attribute}", name=_name, help=_help, sort_key=_order)
