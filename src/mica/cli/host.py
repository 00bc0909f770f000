"""``mica host``."""

from __future__ import annotations

from cyclopts import App

app = App(name="host", help="This host.", help_format="plaintext")
app.command("mica.cli.host_show:show", name="show", help="Show this host and what its VMs use of it.")
