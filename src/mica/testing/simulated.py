"""A host that exists in memory only: shipped fakes of every port over one world.

:class:`SimulatedHost` is the world, with everything that outlives a daemon: processes, volumes, networks, slices,
images, guests. The fakes of the ports (:class:`SimulatedHypervisor` and its like) are what one daemon sees of it, and
are made anew over the same world as a new daemon does. They are strict: a machine whose disk, NIC or slice does not
exist does not start, and what lives cannot be removed from under it.

    async with SimulatedHost(clock) as world:
        engine = Engine(simulated_ports(world, Records(store)))
        async with engine.running(): ...
"""

from __future__ import annotations

from mica.engine.definition import Policy, Ports
from mica.engine.records import Records
from mica.model.units import MIB
from mica.testing.simulated_faults import Faults
from mica.testing.simulated_identity import SimulatedIdentities
from mica.testing.simulated_machines import SimulatedGuests, SimulatedHypervisor, SimulatedMachine, SimulatedRamImages
from mica.testing.simulated_ports import (
    SimulatedHostFacts,
    SimulatedImages,
    SimulatedNetworks,
    SimulatedSlices,
)
from mica.testing.simulated_storage import SimulatedBranches, SimulatedParts, SimulatedVolumes
from mica.testing.simulated_world import Behaviour, SimulatedHost, SimulatedProcess, make_image

__all__ = [
    "Behaviour",
    "Faults",
    "SimulatedBranches",
    "SimulatedGuests",
    "SimulatedHost",
    "SimulatedHostFacts",
    "SimulatedHypervisor",
    "SimulatedImages",
    "SimulatedMachine",
    "SimulatedNetworks",
    "SimulatedParts",
    "SimulatedProcess",
    "SimulatedSlices",
    "SimulatedVolumes",
    "make_image",
    "simulated_ports",
]


def simulated_ports(world: SimulatedHost, records: Records, policy: Policy | None = None) -> Ports:
    """A daemon's view of ``world``, for :class:`mica.engine.engine.Engine`."""
    ram = SimulatedRamImages(world)
    return Ports(
        records=records,
        clock=world.clock,
        host=SimulatedHostFacts(world),
        hypervisor=SimulatedHypervisor(world, ram),
        volumes=SimulatedVolumes(world),
        networks=SimulatedNetworks(world),
        slices=SimulatedSlices(world),
        images=SimulatedImages(world),
        guests=SimulatedGuests(world),
        identities=SimulatedIdentities(world),
        parts=SimulatedParts(world),
        branches=SimulatedBranches(world),
        ram=ram,
        policy=policy or Policy(reserve=512 * MIB),
    )
