"""Mica: a thin layer between computers and the operating systems that run on them.

The public Python interface is :class:`mica.Client`; everything else is reached through it or through the ``mica``
command. The attribute is loaded on first use so that ``import mica`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mica.client import Client as Client
    from mica.model.errors import MicaError as MicaError

__version__ = "0.1.0"
__all__ = ["Client", "MicaError", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from mica.client import Client

        return Client
    if name == "MicaError":
        from mica.model.errors import MicaError

        return MicaError
    raise AttributeError(f"module 'mica' has no attribute {name!r}")
