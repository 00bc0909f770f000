"""The fixtures of the integration tests, for faults on real guests."""

from __future__ import annotations

from tests.integration.conftest import (
    _qemu_is_there,
    client,
    pytest_runtest_makereport,
    session_world,
    shared_client,
    shared_world,
    world,
)

__all__ = [
    "_qemu_is_there",
    "client",
    "pytest_runtest_makereport",
    "session_world",
    "shared_client",
    "shared_world",
    "world",
]
