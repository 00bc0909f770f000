"""Boot once, with real guests: the second run of an image begins where the image had booted, as another machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from mica.client import Client
from mica.model.views import ImageView
from tests.integration.conftest import MEMORY
from tests.integration.world import World, new_world

pytestmark = pytest.mark.guest

BOOTED_S = 180.0


@pytest.fixture
def booting() -> Iterator[World]:
    with new_world(boot_once="true") as made:
        yield made


async def booted(world: World, client: Client) -> ImageView:
    """The image once it has booted for nobody, and whoever booted it is gone."""
    async with asyncio.timeout(BOOTED_S):
        while True:
            view = await client.images.get("micro")
            if view.booted and not world.qemus():
                return view
            await asyncio.sleep(0.1)  # states of images are told by no event


async def test_an_image_is_booted_once_for_all_that_come_after(booting: World) -> None:
    async with booting.client() as client:
        done = booting.cli("run", "--rm", "--memory", MEMORY, "micro", "--", "sh", "-c", "echo mine >/tmp/word")
        assert done.returncode == 0, done.stderr
        state = (await booted(booting, client)).booted[0]
        assert (state.spec.image, state.size > 0) == ((await client.images.get("micro")).image.digest, True)
        vms = [await client.run("micro", memory=MEMORY) for _ in range(2)]
        # Nothing that somebody did to it is in what others begin at, and no two are the same.
        assert [(await vm.exec("ls", "/tmp/word", check=False)).exit_code for vm in vms] == [1, 1]
        random = {(await vm.exec("head", "-c", "16", "/dev/urandom")).stdout for vm in vms}
        macs = {str(await vm.exec("cat", "/sys/class/net/eth0/address")) for vm in vms}
        assert (len(random), macs) == (2, {vm.view.spec.nics[0].mac for vm in vms})
        cold = await client.run("micro", memory=MEMORY, cold=True, wait_agent=False)
        assert cold.view.usage.shared is None
        assert all(0 < (vm.view.usage.shared or 0) <= vm.view.spec.memory for vm in vms)
        for vm in (*vms, cold):
            await vm.remove()
