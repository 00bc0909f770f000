"""What the tests of the engine begin with, and their short words for requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from mica.engine.definition import Policy
from mica.model.errors import Code, MicaError
from mica.model.operation import Operation, OperationState
from mica.model.views import VmCreate, VmView
from mica.testing.harness import Life, Rig


@asynccontextmanager
async def living(policy: Policy | None = None, **world: Any) -> AsyncIterator[Life]:
    """A fresh host with image ``micro`` and one engine on it; afterwards nothing may lie."""
    async with Rig(policy, **world) as rig:
        rig.world.add_image("micro")
        async with rig.life() as life:
            await life.advance(0.1)
            yield life
            await life.rest()
        found = await rig.lies()
        assert found == [], found
        kept = await rig.records.operations.scan()
        told = [o for o in rig.ended if o.id in kept]
        assert {o.id: o for o in told} == {i: r.value for i, r in kept.items() if r.value.state.ended}
        assert len(told) == len({o.id for o in told}), "the end of an operation was told twice"


async def do(life: Life, verb: str, target: str, params: msgspec.Struct, **how: Any) -> Operation:
    """Ask, wait for the end, and demand success."""
    operation = await life.run(verb, target, params, **how)
    assert operation.state is OperationState.SUCCEEDED, operation.problem
    return operation


async def create(life: Life, name: str = "a", **body: Any) -> VmView:
    await do(life, "vm.create", "", VmCreate(name=name, image="micro", **body))
    return await life.engine.views.vm(name)


async def refused(life: Life, code: Code, verb: str, target: str, params: msgspec.Struct, **how: Any) -> MicaError:
    """The error with which a request is refused; nothing may have been written."""
    before = await life.rig.store.revision()
    with pytest.raises(MicaError) as caught:
        await life.submit(verb, target, params, **how)
    assert caught.value.code is code, caught.value
    assert await life.rig.store.revision() == before
    return caught.value
