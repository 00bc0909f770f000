"""The Debian image: installed by mmdebstrap into a tar archive, changed where it must be ours, put on a disk."""

from __future__ import annotations

import io
import os
import re
import signal
import tarfile
import threading
import uuid
from pathlib import Path

from mica.images import debian_files, disk
from mica.images.apt import Apt, Deb
from mica.images.commands import Commands
from mica.images.debian_files import Identity
from mica.images.disk import Layout
from mica.images.files import Stopped, in_thread, need_space
from mica.images.sources import Source
from mica.images.store import Draft, Facts
from mica.images.userns import TREE, Namespace
from mica.model.errors import Code, MicaError, invalid
from mica.model.image import DebianRecipe, DirectBoot, Firmware
from mica.model.units import GIB, MIB, Bytes
from mica.ports.progress import Progress

SPACE = 3 * GIB
# Measured with Debian 12: with 256 MiB it boots, and apt installs packages; 166 MiB are available at rest.
MIN_MEMORY = Bytes(256 * MIB)
MAX_SIZE = 16 * 1024 * GIB

_INSTALL_TIMEOUT_S = 3600
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE)
# Debian 13 has it signed for secure boot, and only so.
_LOADERS = tuple(f"usr/lib/systemd/boot/efi/systemd-bootx64.efi{suffix}" for suffix in ("", ".signed"))
_STEPS = (
    ("extracting archives", 0.10),
    ("installing essential packages", 0.15),
    ("installing remaining packages", 0.25),
    ("cleaning package lists", 0.90),
    ("creating tarball", 0.92),
)


def check(recipe: DebianRecipe) -> None:
    """Raises ``invalid`` for values that no build could take."""
    for package in recipe.include:
        if not _PACKAGE.fullmatch(package):
            raise invalid(f"{package!r} is not the name of a Debian package", field="include")
    if not _HOSTNAME.fullmatch(recipe.hostname):
        raise invalid(
            f"{recipe.hostname!r} is not a host name",
            hint="letters, digits and dashes, 63 at most (RFC 1123)",
            field="hostname",
        )
    if recipe.size % MIB or recipe.size > MAX_SIZE:
        raise invalid(f"a disk of {recipe.size} bytes: not a multiple of 1 MiB, or more than 16 TiB", field="size")


class DebianBuild:
    """One build into ``draft``. ``root`` is where the root file system is unpacked."""

    def __init__(
        self,
        recipe: DebianRecipe,
        draft: Draft,
        commands: Commands,
        apt: Apt,
        namespace: Namespace,
        progress: Progress,
    ) -> None:
        self._recipe = recipe
        self._draft = draft
        self._commands = commands
        self._apt = apt
        self._namespace = namespace
        self._progress = progress
        self._root = draft.scratch / TREE / "root"
        self._archive = draft.scratch / "root.tar"

    async def run(self) -> None:
        """Raises what :meth:`Apt.fetch` raises, ``invalid``, ``insufficient-disk``, ``command-failed``."""
        recipe, scratch = self._recipe, self._draft.scratch
        check(recipe)
        disk.check_size(recipe.size, 512 * MIB)
        self._namespace.check()
        for program in ("sfdisk", "mformat", "mke2fs", "qemu-img", "tar"):
            self._commands.find(program)
        need_space(scratch, SPACE, "building a Debian image")
        late = () if recipe.suite == "bookworm" else debian_files.SPLIT_OFF_LATER
        packages = (*debian_files.PACKAGES, *late, *recipe.include)
        (scratch / "debs").mkdir()
        debs = await self._apt.fetch(
            ("?essential", "?priority(required)", "apt", *packages),
            scratch / "debs",
            lambda done, text: self._progress((done or 0) * 0.1, text),
        )
        epoch = await self._apt.copy_lists(scratch / "lists")
        await self._install(packages, len(debs), epoch)
        self._progress(0.7, "Unpacking the root file system")
        identity = _identity(recipe, debs)
        kernel, size = await in_thread(lambda stop: _take_kernel(self._draft, self._archive, stop))
        disk.check_size(recipe.size, size)
        await self._unpack(identity, epoch)
        self._progress(0.8, "Making the disk")
        await self._make_disk(identity, kernel, epoch)
        self._draft.facts = _facts(recipe, identity, kernel, debs)

    async def _install(self, packages: tuple[str, ...], count: int, epoch: int) -> None:
        """Run mmdebstrap without the network: packages and lists were fetched, and checked, before."""
        scratch = self._draft.scratch
        (scratch / "initramfs.conf").write_text(debian_files.INITRAMFS_CONF)
        (scratch / "initramfs.modules").write_text("\n".join(debian_files.INITRAMFS_MODULES) + "\n")
        (scratch / "mica.sources").write_text("\n".join(source.stanza() for source in self._apt.sources))
        hooks = [
            '--setup-hook=mkdir -p "$1/var/cache/apt/archives" "$1/var/lib/apt/lists"',
            "--setup-hook=sync-in lists /var/lib/apt/lists",
            "--setup-hook=sync-in debs /var/cache/apt/archives",
            '--essential-hook=mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"',
            "--essential-hook=upload initramfs.conf /etc/initramfs-tools/conf.d/mica",
            "--essential-hook=upload initramfs.modules /usr/share/initramfs-tools/modules.d/mica",
        ]
        how = [f"--mode={self._namespace.mode}", "--variant=minbase", "--format=tar", "--architectures=amd64"]
        argv = [
            *self._namespace.builder,
            "mmdebstrap",
            "--verbose",
            *how,
            "--skip=update",
            "--dpkgopt=force-unsafe-io",
            *hooks,
        ]
        argv += [f"--include={','.join(packages)}", self._recipe.suite, "-", "./mica.sources"]
        with self._archive.open("wb") as file:
            await self._commands.run(
                argv,
                stdout=file,
                stderr=_Steps(count, self._progress),
                cwd=scratch,
                environment={"TMPDIR": str(self._namespace.temporary(scratch)), "SOURCE_DATE_EPOCH": str(epoch)},
                timeout_s=_INSTALL_TIMEOUT_S,
                # At once, with all its processes: what it leaves lies in our scratch directory.
                stop=signal.SIGKILL,
            )

    async def _unpack(self, identity: Identity, epoch: int) -> None:
        """Unpack what mmdebstrap made, without what must not be in an image, then our own files over it."""
        tree = self._root.parent
        tree.mkdir()
        tree.chmod(0o777)  # the ids of the namespace are "others"; only we can enter the directory above
        prefix = self._namespace.prefix
        await self._commands.run([*prefix, "mkdir", self._root.name], cwd=tree, timeout_s=60)
        overlay = self._draft.scratch / "overlay.tar"
        _write_overlay(overlay, self._recipe, identity, self._apt.sources, epoch)
        unpack = [*prefix, "tar", "--extract", "--numeric-owner", "--same-permissions", "--file=-"]
        xattrs = ["--xattrs", "--xattrs-include=*"]
        dropped = ["--anchored", "--wildcards", *(f"--exclude={pattern}" for pattern in debian_files.DROPPED)]
        with self._archive.open("rb") as file:
            await self._commands.run([*unpack, *xattrs, *dropped], stdin=file, cwd=self._root, timeout_s=600)
        with overlay.open("rb") as file:
            await self._commands.run([*unpack, "--unlink-first"], stdin=file, cwd=self._root, timeout_s=60)
        # Our own files changed the directories they lie in; everything is as old as the packages' lists.
        age = [
            "find",
            ".",
            "-newermt",
            f"@{epoch}",
            "-exec",
            "touch",
            "--no-dereference",
            f"--date=@{epoch}",
            "{}",
            "+",
        ]
        await self._commands.run([*prefix, *age], cwd=self._root, timeout_s=120)
        self._archive.unlink()

    async def _make_disk(self, identity: Identity, kernel: str, epoch: int) -> None:
        draft, token = self._draft, debian_files.ENTRY_TOKEN
        entry = debian_files.loader_entry(identity, kernel, f"Debian ({self._recipe.suite})")
        files = {
            "EFI/BOOT/BOOTX64.EFI": draft.scratch / "loader.efi",
            "EFI/systemd/systemd-bootx64.efi": draft.scratch / "loader.efi",
            f"{token}/{kernel}/linux": draft.file("vmlinuz"),
            f"{token}/{kernel}/initrd.img-{kernel}": draft.file("initrd"),
        }
        small = {
            "loader/loader.conf": debian_files.LOADER_CONF,
            "loader/entries.srel": "type1\n",
            f"loader/entries/{token}-{kernel}.conf": entry,
        }
        for number, (name, text) in enumerate(small.items()):
            files[name] = draft.scratch / f"esp.{number}"
            files[name].write_text(text)
        for path in files.values():
            os.utime(path, (epoch, epoch))
        raw = draft.scratch / "disk.raw"
        layout = Layout(self._recipe.size, identity)
        dated = self._commands.with_environment({"SOURCE_DATE_EPOCH": str(epoch), "E2FSPROGS_FAKE_TIME": str(epoch)})
        await disk.partition(dated, raw, layout)
        await disk.fill_esp(dated, raw, identity, files)
        self._progress(0.82, "Writing the root file system")
        await disk.fill_root(dated, self._namespace, raw, self._root, layout)
        self._progress(0.92, "Writing the disk image")
        await disk.to_qcow2(dated, raw, draft.file("disk.qcow2"))
        raw.unlink()


class _Steps:
    """Progress from what mmdebstrap and dpkg say: their stages, and each package unpacked and set up."""

    def __init__(self, packages: int, progress: Progress) -> None:
        self._total = max(2 * packages, 1)
        self._done = 0
        self._fraction = 0.0
        self._progress = progress

    def __call__(self, line: str) -> None:
        if line.startswith("I: "):
            for words, fraction in _STEPS:
                if line.startswith(f"I: {words}"):
                    self._tell(fraction, words.capitalize())
        elif line.startswith(("Unpacking ", "Setting up ")):
            self._done = min(self._done + 1, self._total)
            words = " ".join(line.split()[:3]).removesuffix(" ...")
            self._tell(0.15 + 0.70 * self._done / self._total, words)
        elif line.startswith("update-initramfs: Generating"):
            self._tell(0.15 + 0.70 * self._done / self._total, "Making the initial RAM file system")

    def _tell(self, fraction: float, text: str) -> None:
        self._fraction = max(self._fraction, fraction)
        self._progress(0.1 + 0.6 * self._fraction, text)


def _identity(recipe: DebianRecipe, debs: list[Deb]) -> Identity:
    """UUIDs made from what goes in, so that the same build is the same image."""
    content = repr((recipe.suite, recipe.size, recipe.hostname, sorted((deb.name, deb.version) for deb in debs)))

    def make(name: str) -> uuid.UUID:
        return uuid.uuid5(uuid.NAMESPACE_URL, f"mica:{name}:{content}")

    return Identity(
        disk=str(make("disk")),
        esp_partition=str(make("esp partition")),
        root_partition=str(make("root partition")),
        root=str(make("root")),
        esp_serial=make("esp").hex[:8],
        entries=make("entries").hex,
    )


def _take_kernel(draft: Draft, archive: Path, stop: threading.Event) -> tuple[str, int]:
    """Copy kernel, initial RAM file system and boot loader out of the archive.

    Returns the kernel's version, and how many bytes all files take in blocks of 4 KiB.
    """
    wanted: dict[str, tarfile.TarInfo] = {}
    size = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            if stop.is_set():
                raise Stopped
            size += member.size + -member.size % 4096 + 256  # and the inode
            name = member.name.removeprefix("./")
            if name.startswith(("boot/vmlinuz-", "boot/initrd.img-")) or name in _LOADERS:
                wanted[name] = member
        kernels = [name.removeprefix("boot/vmlinuz-") for name in wanted if name.startswith("boot/vmlinuz-")]
        if not kernels:
            raise MicaError(Code.CORRUPT, "the installed Debian has no kernel below /boot")
        kernel = max(kernels, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])
        for name, target in (
            (f"boot/vmlinuz-{kernel}", draft.file("vmlinuz")),
            (f"boot/initrd.img-{kernel}", draft.file("initrd")),
            (next((name for name in _LOADERS if name in wanted), _LOADERS[0]), draft.scratch / "loader.efi"),
        ):
            stream = tar.extractfile(wanted[name]) if name in wanted else None
            if stream is None:
                raise MicaError(Code.CORRUPT, f"the installed Debian lacks /{name}")
            target.write_bytes(stream.read())
    return kernel, size


def _write_overlay(
    path: Path, recipe: DebianRecipe, identity: Identity, sources: tuple[Source, ...], epoch: int
) -> None:
    with tarfile.open(path, "w") as tar:
        for name, text in sorted(debian_files.files(identity, recipe.hostname, sources).items()):
            _add(tar, tarfile.TarInfo(f"./{name}"), epoch, text.encode())
        for name, target in sorted(debian_files.links().items()):
            member = tarfile.TarInfo(f"./{name}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            _add(tar, member, epoch)
        folder = tarfile.TarInfo("./boot/efi")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        _add(tar, folder, epoch)


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, epoch: int, data: bytes = b"") -> None:
    member.size, member.mtime = len(data), epoch
    tar.addfile(member, io.BytesIO(data))


def _facts(recipe: DebianRecipe, identity: Identity, kernel: str, debs: list[Deb]) -> Facts:
    named = {*debian_files.PACKAGES, *recipe.include}
    return Facts(
        os=f"Debian ({recipe.suite})",
        disk="disk.qcow2",
        disk_size=recipe.size,
        firmware=Firmware.UEFI,
        direct_boot=DirectBoot(kernel="vmlinuz", initrd="initrd", cmdline=debian_files.kernel_cmdline(identity)),
        min_memory=MIN_MEMORY,
        agent=True,
        cloud_init=True,
        build={
            "recipe": "debian",
            "suite": recipe.suite,
            "kernel": kernel,
            "hostname": recipe.hostname,
            "console": debian_files.CONSOLE_POLICY,
            **{f"package:{deb.name}": deb.version for deb in sorted(debs, key=lambda d: d.name) if deb.name in named},
        },
    )
