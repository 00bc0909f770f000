"""Each code has its section in the reference, and the section says what the table says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mica.model.errors import TABLE, Code

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "errors.md").read_text()
SECTIONS = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def test_there_is_a_section_for_each_code_and_for_nothing_else_in_the_order_of_the_table() -> None:
    assert list(SECTIONS) == [str(code) for code in TABLE]
    assert set(TABLE) == set(Code)


@pytest.mark.parametrize("code", list(Code))
def test_a_section_has_the_statuses_and_says_what_it_means_why_and_what_to_do(code: Code) -> None:
    section = SECTIONS[str(code)]
    info = TABLE[code]
    assert f"HTTP {info.http_status} · exit status {info.exit_status}" in section
    for part in ("**Means** ", "**Typical cause** ", "**What to do** "):
        assert section.count(part) == 1
        text = section.partition(part)[2].split("\n\n")[0]
        assert len(text.split()) >= 2, f"{code}: {part} says nothing"


def test_exit_statuses_are_distinct_and_leave_room_for_guests() -> None:
    statuses = [info.exit_status for info in TABLE.values()]
    assert len(set(statuses)) == len(statuses)
    assert all(2 < status < 64 for status in statuses)
