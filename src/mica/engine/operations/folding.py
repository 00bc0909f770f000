"""When a machine that has changed much of its RAM image goes on over a new one, that has its changes in it.

What a private child of a RAM image has changed is written down whole with every snapshot, and only ever becomes more.
Folded, it costs the RAM once, copied while the machine runs, and then again no more than what changes from there.
"""

from __future__ import annotations

from mica.engine.definition import Env
from mica.engine.operations.forecasting import LONG_PAUSE_S, expected_pause
from mica.model.snapshot import SnapshotKind
from mica.model.units import GIB, MIB
from mica.model.vm import VmRuntime
from mica.ports.hypervisor import StatefulMachine

# After these a machine goes on, and nobody waits for them: forks do for their moment, going back for what it keeps.
_KINDS = frozenset({SnapshotKind.USER, SnapshotKind.SCHEDULE, SnapshotKind.TEMPLATE})
# A copy has all that the image holds, so it is worth its while when as much has changed. Where the pause would be long
# it is from what a usual host writes down in a short one, if that is more than a little of the machine: with less, a
# large machine that is busy would be copied again and again. Bytes, and a share of the image.
_MUCH, _LEAST = 150 * MIB, 0.25
# What stays free on the host beside a copy. Bytes.
_SPARE = GIB // 2


async def worth(env: Env, kind: SnapshotKind, runtime: VmRuntime, machine: StatefulMachine) -> bool:
    """Whether such a snapshot of a machine is to give it a RAM image of its own.

    Never where its network is a part of its QEMU: the guest would lose its connections by it.
    """
    if not runtime.ram or kind not in _KINDS or any(nic.inside for nic in runtime.nics):
        return False
    now = await machine.forecast()
    long = await expected_pause(env, now.changed) > LONG_PAUSE_S
    if now.changed < (min(now.ram, max(_MUCH, now.ram * _LEAST)) if long else now.ram):
        return False
    copy = min(now.ram + now.changed, runtime.spec.memory)
    return env.host.capacity().available >= copy + env.hypervisor.overhead(runtime.spec) + _SPARE
