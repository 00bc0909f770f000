"""``mica image``: the verbs and where they are."""

from __future__ import annotations

from cyclopts import App

app = App(name="image", help="Images: what VMs start from.", help_format="plaintext")
build = App(name="build", help="Build an image from a distribution's packages.", help_format="plaintext", sort_key=2)

for _name, _help in (
    ("micro", "Build the small guest: seconds to build, seconds to boot."),
    ("debian", "Build a full Debian with systemd, agent, SSH, cloud-init and a serial console."),
):
    build.command(f"mica.cli.image_make:{_name}", name=_name, help=_help)

app.command("mica.cli.image_show:list_", name="list", sort_key=0, help="List images.")
app.command("mica.cli.image_show:show", name="show", sort_key=1, help="Show everything known of an image.")
app.command(build)
app.command(
    "mica.cli.image_make:import_", name="import", sort_key=3, help="Import a disk image that lies on this host."
)
app.command("mica.cli.image_make:verify", name="verify", sort_key=4, help="Read every byte of images and compare.")
app.command("mica.cli.image_make:delete", name="delete", sort_key=5, help="Delete images that no VM was made from.")
