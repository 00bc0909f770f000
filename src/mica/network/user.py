"""User-mode networking for VMs: the NICs of kind ``user`` get a passt each, those of kind ``none`` nothing.

Where passt cannot be had, and it is allowed, a NIC of kind ``user`` gets QEMU's own user mode.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from mica.model.errors import MicaError, invalid
from mica.model.vm import NetworkKind, NicRuntime, Vm
from mica.network import addresses, passt, slirp
from mica.network.passt import Link, Owner, Passt, PasstHandle
from mica.network.ports import reserve
from mica.network.proof import entries, is_proof, own_place
from mica.network.slirp import Slirp

# What is left of 107 bytes below the longest place (mica.model.paths).
_NAME_MAX = 7


class UserNetworks:
    """Implements :class:`mica.ports.networks.Networks`.

    ``find`` finds and proves passt when a NIC first needs it, and again until there is one; it raises ``host-lacks``.
    ``instead`` is then asked whether QEMU's own user mode may do, and raises what is to be said when it may not.
    ``places`` are where that passt may be found to work. ``owner`` gives the users of a VM's network process by its
    slot, ``None`` without privileges.
    """

    def __init__(
        self,
        *,
        places: Sequence[Path],
        find: Callable[[], Awaitable[Passt]],
        owner: Callable[[int], Owner | None],
        instead: Callable[[MicaError], Awaitable[Slirp]],
    ) -> None:
        self._places = tuple(places)
        self._find = find
        self._tool: Passt | None = None
        self._finding = asyncio.Lock()
        self._owner = owner
        self._instead = instead

    def _directories(self, vm_id: str, nic: str) -> list[Path]:
        # Sockets are made below it, and a UNIX socket's path is short (unix(7)): a long name becomes a digest.
        short = nic if len(nic) <= _NAME_MAX else hashlib.sha256(nic.encode()).hexdigest()[:_NAME_MAX]
        return [place / vm_id / short for place in self._places]

    async def attach(self, vm: Vm, nic: str) -> NicRuntime:
        index, spec = next((i, n) for i, n in enumerate(vm.spec.nics) if n.name == nic)
        if spec.network == NetworkKind.NONE:
            return NicRuntime(name=nic, handle={"kind": "none"})
        if spec.network != NetworkKind.USER:
            raise invalid(f"NIC {nic} asks for network {spec.network!r}", hint="there are: user, none")
        tool = await self._tool_or_slirp()
        pool = addresses.choose_pool([network for _, network in addresses.read_routes()])
        given = addresses.nic_addresses(pool, vm.slot, index)
        # A restart within moments finds its own old ports taken by the passt that is about to be replaced.
        for directory in self._directories(vm.id, nic):
            await passt.stop_left(directory)
        publish = tuple(reserve(spec.publish))
        if isinstance(tool, Slirp):
            slirp.check(publish)
            return NicRuntime(
                name=nic,
                address=given.address.partition("/")[0],
                publish=publish,
                reduced=slirp.reduced(tool, nic, given),
                inside=True,
                handle=slirp.handle(given, publish, ipv6=addresses.ipv6_default() is not None),
            )
        directory = next(path for path in self._directories(vm.id, nic) if path.is_relative_to(tool.place))
        for parent in (Path(tool.place), directory.parent):
            own_place(parent)
        link = Link(directory=directory, addresses=given, publish=publish, owner=self._owner(vm.slot))
        handle = await passt.start(tool, link)
        return NicRuntime(
            name=nic,
            address=given.address.partition("/")[0],
            publish=publish,
            reduced=handle.reduced,
            processes=handle.processes,
            handle={"kind": "stream", "socket": handle.socket, "passt": msgspec.to_builtins(handle)},
        )

    async def _tool_or_slirp(self) -> Passt | Slirp:
        async with self._finding:
            if self._tool is None:
                try:
                    self._tool = await self._find()
                except MicaError as lack:
                    return await self._instead(lack)
            return self._tool

    async def detach(self, vm_id: str, nic: NicRuntime) -> None:
        known = nic.handle.get("passt")
        if known is not None:
            await passt.stop(msgspec.convert(known, PasstHandle))
        for directory in self._directories(vm_id, nic.name):
            await passt.stop_left(directory)
            if directory.parent.is_dir() and not any(directory.parent.iterdir()):
                directory.parent.rmdir()

    async def remove(self, vm_id: str) -> None:
        for directory in (entry for place in self._places for entry in entries(place) if entry.name == vm_id):
            for nic in list(directory.iterdir()):
                await passt.stop_left(nic)
            directory.rmdir()

    async def owners(self) -> set[str]:
        return {entry.name for place in self._places for entry in entries(place) if not is_proof(entry)}

    async def healthy(self, nic: NicRuntime) -> bool:
        known = nic.handle.get("passt")
        return known is None or passt.healthy(msgspec.convert(known, PasstHandle))
