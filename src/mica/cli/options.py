"""Parameters that several commands share, and how what people write becomes a value.

This module is imported at every start of ``mica``: it imports nothing slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from mica.model.units import parse_duration, parse_size

if TYPE_CHECKING:
    from cyclopts import Token
    from cyclopts.completion import CompletionContext

GLOBAL = Group("Global options", sort_key=90)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command takes."""

    json: Annotated[bool, Parameter(negative=(), show_default=False, group=GLOBAL)] = False
    """Print one JSON document instead of text; errors as a JSON problem on standard error."""

    home: Annotated[str | None, Parameter(group=GLOBAL)] = None
    """State directory of the daemon to use, instead of MICA_HOME."""

    url: Annotated[str | None, Parameter(group=GLOBAL)] = None
    """Address of the daemon to use, instead of MICA_URL: http://127.0.0.1:PORT or unix:///PATH."""

    token_file: Annotated[str | None, Parameter(group=GLOBAL)] = None
    """File that holds the token for --url, instead of MICA_TOKEN."""


DEFAULTS = Options()


def _size(_type: Any, tokens: Sequence[Token]) -> int:
    return parse_size(tokens[0].value)


def _duration(_type: Any, tokens: Sequence[Token]) -> float:
    return parse_duration(tokens[0].value)


def _vm_names(context: CompletionContext) -> list[str]:
    from mica.cli.complete import names

    return names("vms", context)


def _image_names(context: CompletionContext) -> list[str]:
    from mica.cli.complete import names

    return names("images", context)


def _template_names(context: CompletionContext) -> list[str]:
    from mica.cli.complete import names

    return names("templates", context)


def _image_or_template_names(context: CompletionContext) -> list[str]:
    return _image_names(context) + _template_names(context)


def _operation_ids(context: CompletionContext) -> list[str]:
    from mica.cli.complete import names

    return names("operations", context)


def _snapshot_names(context: CompletionContext) -> list[str]:
    from mica.cli.complete import snapshots

    return snapshots(context)


Size = Annotated[int, Parameter(converter=_size, n_tokens=1, metavar="SIZE")]
Duration = Annotated[float, Parameter(converter=_duration, n_tokens=1, metavar="DURATION")]
Flag = Annotated[bool, Parameter(negative=(), show_default=False)]
Many = Annotated[tuple[str, ...], Parameter(negative=())]
VmArg = Annotated[str, Parameter(completer=_vm_names)]
VmArgs = Annotated[tuple[str, ...], Parameter(completer=_vm_names)]
ImageArg = Annotated[str, Parameter(completer=_image_names)]
TemplateArg = Annotated[str, Parameter(completer=_template_names)]
ImageOrTemplateArg = Annotated[str, Parameter(completer=_image_or_template_names)]
SnapshotArg = Annotated[str, Parameter(completer=_snapshot_names)]
OperationArg = Annotated[str, Parameter(completer=_operation_ids)]
Hidden = Parameter(parse=False)
