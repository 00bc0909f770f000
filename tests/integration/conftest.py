"""The ladder of fixtures: ``world`` (a daemon) → ``client`` → ``vm`` (created) → ``booted`` (its agent answers).

``shared_world`` and ``shared_vm`` live as long as the test run: for tests that change nothing which others look at.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from mica.client import Client
from mica.client.handle import VmHandle
from mica.client.vms import make_create, vm_id
from tests.integration.world import World, new_world

MEMORY = "128M"

needs_qemu = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A failed test shows the daemon's log, and console and QEMU log of every VM."""
    report: pytest.TestReport = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, World):
                report.sections += [(f"{name}: {file}", text) for file, text in value.report().items()]
    return report


@pytest.fixture(autouse=True)
def _qemu_is_there(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("guest") and shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed")


@pytest.fixture
def world() -> Iterator[World]:
    """A daemon of this test alone."""
    with new_world() as made:
        yield made


@pytest.fixture(scope="session")
def session_world() -> Iterator[World]:
    with new_world() as made:
        yield made


@pytest.fixture
def shared_world(session_world: World) -> World:
    """The daemon that many tests share; what a test makes in it, it removes."""
    return session_world


@pytest.fixture
async def client(world: World) -> AsyncIterator[Client]:
    async with world.client() as made:
        yield made


@pytest.fixture
async def shared_client(shared_world: World) -> AsyncIterator[Client]:
    async with shared_world.client() as made:
        yield made


async def create(client: Client, name: str = "", **more: Any) -> VmHandle:
    """A VM from ``micro``, small."""
    more.setdefault("memory", MEMORY)
    operation = await client.vms.create(make_create("micro", name=name, **more))
    return await client.vms.get(vm_id(operation))


@pytest.fixture
async def vm(shared_client: Client) -> AsyncIterator[VmHandle]:
    """A stopped VM of this test alone, in the shared world."""
    made = await create(shared_client)
    try:
        yield made
    finally:
        await made.remove()


@pytest.fixture
async def running(vm: VmHandle) -> VmHandle:
    """A running VM of this test alone; its guest has only begun to boot."""
    return await vm.start()


@pytest.fixture
async def booted(running: VmHandle) -> VmHandle:
    """A running VM of this test alone, whose agent answers."""
    return await running.wait_agent(timeout_s=90)


@pytest.fixture(scope="session")
def session_vm(session_world: World) -> str:
    """The name of a VM that runs as long as the test run does."""

    async def start() -> str:
        async with session_world.client() as client:
            made = await client.run(
                "micro", name="shared", memory=MEMORY, publish=["0:8080", "0:2525"], agent_timeout_s=90
            )
            return made.name

    return asyncio.run(start())


@pytest.fixture
async def shared_vm(session_vm: str, shared_client: Client) -> VmHandle:
    """A running VM that tests share: look, do not touch."""
    return await shared_client.vms.get(session_vm)


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(scope="session", autouse=True)
def _no_stray_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
