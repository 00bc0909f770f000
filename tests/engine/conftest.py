"""The engine logs what tests provoke on purpose; nobody wants to read that."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[dict[str, object]]]:
    """What the engine logged, instead of printing it."""
    with capture_logs() as captured:
        yield captured  # type: ignore[misc]
