"""Names for shell completion, from the daemon if it answers at once. Nothing is started for it."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from mica.cli.world import World
from mica.model.paths import api_socket, runtime_dir, state_home

if TYPE_CHECKING:
    from cyclopts.completion import CompletionContext

_TIMEOUT_S = 0.3
_PAGED = ("vms", "operations")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(self._path)


def names(noun: str, context: CompletionContext) -> list[str]:
    """Names of ``vms``, ``images``, ``templates`` or ``operations`` for the command line that is being completed."""
    from mica.cli.main import process_world

    home = context.get("--home")
    return names_from(noun, process_world(), (home.raw or "") if home is not None else "")


def snapshots(context: CompletionContext) -> list[str]:
    """Names of the snapshots of the VM that was written before, of all VMs where none was."""
    from mica.cli.main import process_world

    home, vm = context.get("--home"), context.get("vm")
    of = quote(vm.raw or "", safe="") if vm is not None else ""
    where = (home.raw or "") if home is not None else ""
    return names_from(f"vms/{of}/snapshots" if of else "snapshots", process_world(), where)


def names_from(noun: str, world: World, home: str = "") -> list[str]:
    """The same with everything given; none where no daemon answers within 0.3 s."""
    where = Path(home).absolute() if home else state_home(world.environ, world.uid)
    connection = _UnixConnection(str(api_socket(runtime_dir(where, world.environ, world.uid))))
    try:
        connection.request("GET", f"/v1/{noun}" + ("?limit=200" if noun in _PAGED else ""))
        response = connection.getresponse()
        items = msgspec.json.decode(response.read()).get("items", []) if response.status == 200 else []
    except (OSError, http.client.HTTPException, msgspec.DecodeError):
        return []  # no completion is better than an error in the middle of typing
    finally:
        connection.close()
    return [_name(noun, item) for item in items]


def _name(noun: str, item: dict[str, Any]) -> str:
    if noun == "images":
        return str(item["image"]["name"])
    if noun.endswith(("snapshots", "templates")):
        return str(item["snapshot"]["name"])
    return str(item["id"] if noun == "operations" else item["name"])
