"""Every command of the readme and the first guide does what the page says, on a real guest.

What needs a person (a console), a long build (``debian``) or changes the host (``make``, ``--fix``) is left out here;
``make demo`` and other tests cover it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.world import World

pytestmark = pytest.mark.guest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = re.compile(r"^make |vm console|debian| deb\b|--fix|daemon stop")


def commands(page: str) -> Iterator[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
        for line in block.splitlines():
            command = line.partition("   #")[0].strip()
            if command and not LEFT_OUT.search(command):
                yield command


@pytest.mark.parametrize("page", ["README.md", "docs/guides/first-steps.md"])
def test_commands_work_as_printed(world: World, page: str, tmp_path: Path) -> None:
    ran = 0
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == ".venv/bin/mica":
            here = {"README.md": str(ROOT / "README.md"), "/tmp/passwd-of-first": str(tmp_path / "passwd")}
            done = world.cli(*[here.get(word, word) for word in words[1:]])
        else:
            done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        ran += 1
    assert ran >= 5
    with_trash = world.cli("vm", "list", "--trash", "--json")
    assert '"first"' in with_trash.stdout


def test_the_python_of_the_readme_runs(world: World, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    python = [sys.executable, "-P", str(script)]
    done = subprocess.run(python, env=world.environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d+\.\d+", done.stdout)
