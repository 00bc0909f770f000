"""Where one daemon keeps its state and its sockets: the rule that the daemon and its clients share.

All state of one daemon lies in its ``MICA_HOME``. Its sockets lie in a runtime directory whose name is short, because
the path of a UNIX socket ends at 108 bytes with its NUL (unix(7)), and which is derived from the real path of the
home, so that any number of homes live side by side. The environment is an argument: only entry points read it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

# A VM's sockets are named runtime/<8 digits>/vm/<uuid>/<name>.sock: what is left of 107 bytes for the base.
MAX_RUNTIME_BASE = 36


def state_home(environ: Mapping[str, str], uid: int) -> Path:
    """``MICA_HOME``, else ``/var/lib/mica`` for root, else ``mica`` in the XDG state directory of this user.

    XDG Base Directory Specification 0.8: ``$XDG_STATE_HOME``, ``$HOME/.local/state`` by default; relative paths in
    these variables are invalid and ignored.
    """
    given = environ.get("MICA_HOME", "")
    if given:
        return Path(given).absolute()
    if uid == 0:
        return Path("/var/lib/mica")
    state = environ.get("XDG_STATE_HOME", "")
    if state.startswith("/"):
        return Path(state) / "mica"
    home = environ.get("HOME", "")
    return Path(home if home.startswith("/") else f"/var/tmp/mica-{uid}") / ".local" / "state" / "mica"  # noqa: S108


def runtime_dir(home: Path, environ: Mapping[str, str], uid: int) -> Path:
    """The directory for the sockets of the daemon of ``home`` that runs as ``uid``. Nothing is created.

    The last component is eight hexadecimal digits of the SHA-256 of the real path of ``home``, so that a symbolic
    link leads to the same daemon. Below ``/tmp`` whoever creates or trusts it must check that it is owned by ``uid``
    with mode 0700.
    """
    digits = hashlib.sha256(os.fsencode(os.path.realpath(home))).hexdigest()[:8]
    return runtime_base(environ, uid) / digits


def runtime_base(environ: Mapping[str, str], uid: int) -> Path:
    """Where ``runtime_dir`` lies: ``/run/mica`` for root, ``$XDG_RUNTIME_DIR/mica`` or ``/tmp/mica-<uid>`` otherwise.

    An ``XDG_RUNTIME_DIR`` that is relative or too long for socket paths is not used.
    """
    if uid == 0:
        return Path("/run/mica")
    given = environ.get("XDG_RUNTIME_DIR", "")
    if given.startswith("/") and len(os.fsencode(given)) + len("/mica") <= MAX_RUNTIME_BASE:
        return Path(given) / "mica"
    return Path(f"/tmp/mica-{uid}")  # noqa: S108


def api_socket(runtime: Path) -> Path:
    """The HTTP API's UNIX socket in a runtime directory."""
    return runtime / "api.sock"
