"""The typed HTTP client of Mica: the public Python interface, which the ``mica`` command uses too.

Names are loaded on first use: ``mica.client.daemon`` alone needs no HTTP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mica.client.client import Client as Client
    from mica.client.execs import ExecResult as ExecResult
    from mica.client.execs import ExecStream as ExecStream
    from mica.client.handle import VmHandle as VmHandle
    from mica.model.errors import MicaError as MicaError

__all__ = ["Client", "ExecResult", "ExecStream", "MicaError", "VmHandle"]

_HOMES = {
    "Client": "mica.client.client",
    "ExecResult": "mica.client.execs",
    "ExecStream": "mica.client.execs",
    "MicaError": "mica.model.errors",
    "VmHandle": "mica.client.handle",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mica.client' has no attribute {name!r}")
