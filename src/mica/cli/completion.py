"""``mica --install-completion``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from mica.cli.app import build_app
from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Hidden, Options
from mica.model.errors import MicaError, invalid

SHELLS = ("bash", "zsh", "fish")


def install(
    *,
    shell: Literal["bash", "zsh", "fish"] | None = None,
    output: Path | None = None,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Complete commands and names of VMs in your shell.

    Parameters
    ----------
    shell
        The shell; the one that you are in by default.
    output
        Where the completion script goes; where the shell looks for it by default.
    """
    from cyclopts.completion import ShellDetectionError

    try:
        path = build_app().install_completion(shell=shell, output=output, add_to_startup=output is None)
    except ShellDetectionError as error:
        raise invalid("it is not clear which shell this is", hint=f"add --shell {'|'.join(SHELLS)}") from error
    except OSError as error:
        raise _unwritable(error) from error
    ctx.emit({"path": str(path)}, lambda: f"{path} is written; open a new shell to use it")


def _unwritable(error: OSError) -> MicaError:
    return invalid(f"cannot write {error.filename}: {error.strerror}", hint="choose another place with --output")
