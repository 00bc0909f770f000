"""Makes the adapters of one daemon from its settings and from what the host turns out to have."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mica.daemon.settings import Settings, default_boot_space, default_reserve, default_warm
from mica.engine.definition import Policy
from mica.host.doctor import Examination, Probes, examine
from mica.host.local import LocalHost, SystemClock
from mica.host.processes import may_limit_others
from mica.host.slices import HostSlices
from mica.images.directory import DirectoryImages
from mica.model.doctor import AcceleratorProof, DoctorReport
from mica.model.errors import MicaError
from mica.network import passt, proof, slirp
from mica.network.user import UserNetworks
from mica.qemu.accel import Accelerator
from mica.qemu.accelerators.platforms import ProverContext, provers
from mica.qemu.accelerators.prover import Accelerators
from mica.qemu.command_line import QemuHost
from mica.qemu.discover import BINARY, Qemu, write_atomically
from mica.qemu.discover_firmware import best_uefi
from mica.qemu.hypervisor import FIXED_FILE_LIMIT, MIN_FILE_LIMIT, QemuHypervisor, can_direct_io
from mica.qemu.jail import Jail, JailUsers, detect
from mica.storage.branches import DirectoryBranches
from mica.storage.directory import DirectoryVolumes
from mica.storage.parts import DirectoryParts

USERS = JailUsers()


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _own_files(binary: Path) -> tuple[Path, ...]:
    """What a QEMU that is not installed below /usr needs to see of itself: program, data and libraries."""
    if binary.is_relative_to("/usr"):
        return ()
    prefix = binary.parent.parent
    return (binary, *(path for name in ("share/qemu", "lib", "lib64") if (path := prefix / name).is_dir()))


class Builder:
    """Makes every object of one daemon from its settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.root = settings.uid == 0
        self.clock = SystemClock()
        self.cache = settings.home / "cache"
        self.qemu = Qemu(path=settings.path, cache=self.cache, binary=settings.qemu or BINARY)
        self.firmware = best_uefi()

    async def accelerators(self) -> Accelerators:
        build = await self.qemu.build()
        context = ProverContext(build=build, uid=self.settings.uid, user=_user(self.settings.uid))
        return Accelerators(provers(sys.platform, context), cache=self.cache, now=self.clock.now)

    async def probe(self) -> tuple[QemuHost, Jail]:
        """QEMU, the best accelerator that is proven to work, and the strongest jail. Raises ``host-lacks``."""
        build = await self.qemu.build()
        # A jail shows what is below /usr, and links out of there lead nowhere in it.
        binary = Path(build.path).resolve()
        build = msgspec.structs.replace(build, path=str(binary))
        if self.settings.accelerator:
            accelerator = Accelerator(self.settings.accelerator)
        else:
            accelerator = Accelerator((await (await self.accelerators()).best()).name)
        host = QemuHost(
            build=build,
            accelerator=accelerator,
            firmware_code=Path(self.firmware.code) if self.firmware else None,
            firmware_format=self.firmware.format.value if self.firmware else "raw",
            direct_io=can_direct_io,
        )
        return host, await detect(root=self.root, off=self.settings.jail_off, system=_own_files(binary))

    async def find_passt(self) -> passt.Passt:
        """passt, with the proof that a guest cannot reach the host's loopback through it; kept for its binary."""
        found = await passt.detect(self.settings.passt or None)
        status = os.stat(found.path)
        key = f"{found.path}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{proof.confinement()}"
        file = self.cache / "passt.json"
        try:
            known = msgspec.json.decode(file.read_bytes(), type=dict[str, passt.Passt])
        except (OSError, msgspec.MsgspecError):
            known = {}
        if key not in known:
            known = {key: await proof.prove_anywhere(found, self._network_places, lambda: self.passt_owner(0))}
            write_atomically(file, msgspec.json.encode(known))
        return known[key]

    async def instead_of_passt(self, lack: MicaError) -> slirp.Slirp:
        """Whether QEMU's own user mode may do where passt cannot be had. Raises what is to be said when it may not."""
        build = await self.qemu.build()
        return slirp.permit(
            lack, setting=self.settings.slirp, root=self.root, built_in=build.has_netdev("user", "hostfwd")
        )

    async def clear_proofs(self) -> None:
        """Remove what the last daemon left when it was killed while it proved something. Before anything is proven."""
        await proof.clear(self._network_places)

    @property
    def _network_places(self) -> tuple[Path, ...]:
        """Where NICs may have their sockets: where all others are, or where AppArmor lets passt have some."""
        runtime = self.settings.runtime_dir
        return runtime / "net", Path("/tmp") / f"mica-net-{runtime.name}"  # noqa: S108 - see proof.own_place

    def passt_owner(self, slot: int) -> passt.Owner | None:
        if not self.root:
            return None
        own, vm = USERS.network(slot), USERS.vm(slot)
        return passt.Owner(uid=own.uid, gid=own.gid, peer_gid=vm.gid)

    def volumes(self) -> DirectoryVolumes:
        home = self.settings.home
        template = Path(self.firmware.vars) if self.firmware else None
        qemu_img = shutil.which("qemu-img", path=self.settings.path) or ""
        images, parts = home / "images", home / "parts"
        return DirectoryVolumes(home / "volumes", qemu_img, template, bases=(images,), parts=parts)

    def parts(self) -> DirectoryParts:
        return DirectoryParts(self.settings.home / "parts")

    def branches(self) -> DirectoryBranches:
        home = self.settings.home
        qemu_img = shutil.which("qemu-img", path=self.settings.path) or ""
        # Idle for the disk, last for the processor: what is done there can wait for every guest.
        gently: list[str] = []
        for program, how in (("nice", ("-n", "19")), ("ionice", ("-c", "3"))):
            if path := shutil.which(program, path=self.settings.path):
                gently += [path, *how]
        return DirectoryBranches(home / "volumes", home / "parts", qemu_img, bases=(home / "images",), gently=gently)

    async def doctor(self, share: HostSlices, fresh: bool) -> DoctorReport:
        """Examine the host now."""
        s = self.settings

        async def prove(again: bool) -> Sequence[AcceleratorProof]:
            return await (await self.accelerators()).prove(fresh=again)

        probes = Probes(
            qemu=self.qemu.build,
            accelerators=prove,
            jail=lambda: detect(root=self.root, off=s.jail_off),
            network=self.find_passt,
            reduced_network=self.instead_of_passt,
            firmware=lambda: self.firmware,
            slices=share,
        )
        return await examine(
            Examination(
                home=s.home,
                path=s.path,
                uid=s.uid,
                user=_user(s.uid),
                probes=probes,
                fresh=fresh,
            )
        )

    def policy(self, memory: int) -> Policy:
        s = self.settings
        return Policy(
            reserve=default_reserve(memory) if s.reserve is None else s.reserve,
            trash_s=s.trash_s,
            operation_retention_s=s.keep_operations_s,
            scrub_rate=s.scrub_rate,
            uid_base=USERS.first if self.root and not s.jail_off else None,
            boot_space=self._boot_space() if s.boot_once else 0,
            warm=default_warm(memory),
        )

    def _boot_space(self) -> int:
        if self.settings.boot_space is not None:
            return self.settings.boot_space
        self.settings.home.mkdir(parents=True, exist_ok=True)
        return default_boot_space(shutil.disk_usage(self.settings.home).total)

    def hypervisor(self, share: HostSlices) -> QemuHypervisor:
        s = self.settings
        return QemuHypervisor(
            probe=self.probe,
            users=USERS,
            runtime_dir=s.runtime_dir,
            log_dir=s.log_dir,
            join_slice=share.join,
            clock=self.clock,
            also_reduced=share.reduced,
            # A VM's process has a user id of its own when we are root, and else ours.
            file_limit=MIN_FILE_LIMIT if not self.root or may_limit_others() else FIXED_FILE_LIMIT,
        )

    def networks(self) -> UserNetworks:
        return UserNetworks(
            places=self._network_places,
            find=self.find_passt,
            owner=self.passt_owner,
            instead=self.instead_of_passt,
        )

    def images(self) -> DirectoryImages:
        return DirectoryImages(self.settings.home / "images")

    def host(self) -> LocalHost:
        return LocalHost(home=self.settings.home)
