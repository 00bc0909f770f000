"""Files that are made from the code are as the code makes them now. ``--write`` makes them anew.

Run by ``make check``: ``openapi.json``, the pages of VM states, settings and the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from mica.api.openapi import document
from mica.cli.reference import markdown
from mica.daemon.settings import SETTINGS
from mica.testing.docs import PAGES


def settings_page() -> bytes:
    """``docs/reference/settings.md``."""
    rows = "\n".join(f"| `{name}` | {text} |" for name, text in SETTINGS.items())
    return f"""# Settings

Each setting is an option of `mica daemon run -- --NAME VALUE` (with `-` for `_`), an environment variable `MICA_NAME`
in capitals, or a key of `config.toml` in the daemon's home; the first that is given counts. `MICA_HOME` says where the
home is: `/var/lib/mica` for root, `$XDG_STATE_HOME/mica` or `~/.local/state/mica` for others. Sizes are written
`512M` or `2GiB`, times `90s`, `1h30m` or `7d`. A daemon reads its settings once, when it starts.

| setting | what it is for |
| --- | --- |
{rows}
""".encode()


def generated() -> dict[Path, Callable[[], bytes]]:
    pages: dict[Path, Callable[[], bytes]] = {
        Path("openapi.json"): document,
        Path("docs/reference/settings.md"): settings_page,
        Path("docs/reference/cli.md"): lambda: markdown().encode(),
    }
    for name, make in PAGES.items():
        pages[Path("docs") / name] = lambda make=make: make().encode()  # type: ignore[misc]
    return pages


def main(write: bool) -> int:
    stale = []
    for path, make in generated().items():
        content = make()
        if write:
            path.write_bytes(content)
        elif not path.exists() or path.read_bytes() != content:
            stale.append(path)
    for path in stale:
        print(f"{path} is not what the code makes; run: .venv/bin/python {sys.argv[0]} --write", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
