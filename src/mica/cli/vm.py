"""``mica vm``: the verbs and where they are."""

from __future__ import annotations

from cyclopts import App, Group

_LIFE = Group("Life", sort_key=1)
_INSIDE = Group("Inside the guest", sort_key=2)

app = App(name="vm", help="Virtual machines.", help_format="plaintext")

for _order, (_name, _path, _help, _group) in enumerate(
    (
        ("list", "mica.cli.vm_show:list_", "List VMs.", _LIFE),
        ("show", "mica.cli.vm_show:show", "Show everything known of a VM.", _LIFE),
        ("create", "mica.cli.vm_create:create", "Create a VM and leave it stopped.", _LIFE),
        ("start", "mica.cli.vm_verbs:start", "Start VMs.", _LIFE),
        ("stop", "mica.cli.vm_verbs:stop", "Ask guests to shut down, and force those that do not.", _LIFE),
        ("restart", "mica.cli.vm_verbs:restart", "Stop VMs and start them again.", _LIFE),
        ("pause", "mica.cli.vm_verbs:pause", "Hold VMs where they are.", _LIFE),
        ("suspend", "mica.cli.vm_verbs:suspend", "Put the memory of VMs on disk and end them.", _LIFE),
        ("resume", "mica.cli.vm_verbs:resume", "Let paused and suspended VMs run on.", _LIFE),
        ("set", "mica.cli.vm_set:set_", "Change a VM.", _LIFE),
        ("delete", "mica.cli.vm_verbs:delete", "Put VMs into the trash, or delete them at once.", _LIFE),
        ("restore", "mica.cli.vm_verbs:restore", "Bring a VM back from the trash.", _LIFE),
        ("exec", "mica.cli.vm_exec:exec_", "Run a command in a guest.", _INSIDE),
        ("console", "mica.cli.vm_console:console", "Sit at a VM's serial console.", _INSIDE),
        ("cp", "mica.cli.vm_cp:cp", "Copy files and directories into or out of a guest.", _INSIDE),
        ("log", "mica.cli.vm_log:log", "Show what a VM's console or QEMU said, or what was done with it.", _INSIDE),
    )
):
    app.command(_path, name=_name, help=_help, group=_group, sort_key=_order)
