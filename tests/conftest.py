"""What all tests share: options of the test run."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate", action="store_true", help="write the golden files anew instead of comparing with them"
    )
    parser.addoption("--walk-seed", type=int, default=1, help="which random walk over real machines to take")
    parser.addoption("--walk-steps", type=int, default=30, help="how far")


@pytest.fixture
def regenerate(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--regenerate"))


@pytest.fixture
def walk_seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--walk-seed"))


@pytest.fixture
def walk_steps(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--walk-steps"))
