"""``mica template``: the verbs and where they are."""

from __future__ import annotations

from cyclopts import App

app = App(name="template", help="Templates: VMs as they were, for others to begin at.", help_format="plaintext")

for _order, (_name, _path, _help) in enumerate(
    (
        ("create", "mica.cli.template_verbs:create", "Freeze a VM as it is now, for others to begin at."),
        ("list", "mica.cli.template_verbs:list_", "List templates."),
        ("show", "mica.cli.template_verbs:show", "Show everything known of a template."),
        ("set", "mica.cli.template_verbs:set_", "Rename, describe or protect a template."),
        ("delete", "mica.cli.template_verbs:delete", "Delete templates."),
        ("verify", "mica.cli.template_verbs:verify", "Read every byte of templates and compare."),
    )
):
    app.command(_path, name=_name, help=_help, sort_key=_order)
