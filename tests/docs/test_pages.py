"""Every setting, verb and word of the documentation is there, and what the pages name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mica.daemon.settings import SETTINGS
from mica.engine.registry import DEFINITIONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")
    assert [name for name in SETTINGS if f"`{name}`" not in page] == []


def test_every_verb_is_in_the_reference_of_the_command_line() -> None:
    page = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    words = {
        "vm.purge": "--purge",
        "image.make": "mica image build",
        "snapshot.set": "mica snapshot rename",
        "vm.discard": "--discard",
        "schedule.create": "mica snapshot schedule",
        "schedule.delete": "mica snapshot unschedule",
    }
    missing = [v for v in DEFINITIONS if words.get(v, f"mica {v.replace('.', ' ')}") not in page]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", t)]
    broken = [t for t in targets if not (page.parent / t.partition("#")[0]).exists()]
    assert broken == []


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = sorted(int(p.name[:4]) for p in (ROOT / "docs/decisions").glob("*.md"))
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_tree_names_no_path_of_the_machine_it_was_made_on() -> None:
    # Written so that this line itself is not one.
    pattern = re.compile(r"(?<![\w.~-])/(" + "roo" + r"t|wor" + r"k)/")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (*ROOT.glob("src/**/*.py"), *ROOT.glob("scripts/*"), *PAGES)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []
