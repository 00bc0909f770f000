"""The micro image: Debian's cloud kernel, and an initial RAM file system with busybox and the guest agent.

No root and no namespaces are needed: the packages are only unpacked, and the archive is written directly.
"""

from __future__ import annotations

import re
import tarfile
import threading
from pathlib import Path, PurePosixPath

from mica.images import cpio, elf, kmod, micro_files
from mica.images.apt import Apt, Deb
from mica.images.commands import Commands
from mica.images.files import Stopped, in_thread, need_space
from mica.images.store import Draft, Facts
from mica.model.errors import Code, MicaError
from mica.model.image import DirectBoot, MicroRecipe
from mica.model.units import MIB, Bytes
from mica.ports.progress import Progress

PACKAGES = ("linux-image-cloud-amd64", "busybox-static", "qemu-guest-agent")
SPACE = 400 * MIB
# Measured with the kernels of Debian 12 and 13: with 96 MiB the agent answers and 22 MiB are free; 80 do not boot.
MIN_MEMORY = Bytes(96 * MIB)
# The kernel's self-tests of its ciphers take a tenth of an emulated boot.
CMDLINE = "console=ttyS0 quiet panic=-1 cryptomgr.notests"

_LIBRARY_FOLDERS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64")
_KERNEL_PACKAGE = re.compile(r"linux-image-\d.*")
_UNPACK_TIMEOUT_S = 120


class Tree:
    """The files of some unpacked packages: their archives lie in a directory and are read as needed."""

    def __init__(self) -> None:
        self._archives: list[tarfile.TarFile] = []
        self._members: dict[str, tuple[tarfile.TarFile, tarfile.TarInfo]] = {}

    def add(self, path: Path) -> None:
        archive = tarfile.open(path)  # noqa: SIM115 - closed by close()
        self._archives.append(archive)
        for member in archive:
            self._members[member.name.removeprefix("./")] = (archive, member)

    def close(self) -> None:
        for archive in self._archives:
            archive.close()

    def names(self) -> list[str]:
        return list(self._members)

    def read(self, name: str) -> bytes | None:
        """The content of a file, symbolic links followed; ``None`` when there is no such file."""
        for _ in range(8):
            if name not in self._members:
                return None
            archive, member = self._members[name]
            if not member.issym():
                stream = archive.extractfile(member)
                return stream.read() if stream is not None else None
            target = PurePosixPath("/", PurePosixPath(name).parent, member.linkname)
            parts: list[str] = []
            for part in target.parts[1:]:
                parts = parts[:-1] if part == ".." else [*parts, part]
            name = "/".join(parts)
        return None

    def need(self, *names: str) -> bytes:
        """The first of ``names`` that there is. Raises ``corrupt``: then Debian's packages are not what we know."""
        for name in names:
            if (data := self.read(name)) is not None:
                return data
        raise MicaError(
            Code.CORRUPT,
            f"Debian's packages lack the file {' or '.join(names)}",
            hint="try another suite; bookworm and trixie are known to work",
        )


async def build(recipe: MicroRecipe, draft: Draft, commands: Commands, apt: Apt, progress: Progress) -> None:
    """Build into ``draft``. Raises what :meth:`Apt.fetch` raises, and ``insufficient-disk``."""
    need_space(draft.scratch, SPACE, "building the micro image")
    debs = await apt.fetch(PACKAGES, draft.scratch, lambda done, text: progress((done or 0) * 0.7, text))
    wanted = set(await apt.closure(["qemu-guest-agent", "busybox-static"]))
    chosen = [deb for deb in debs if deb.name in wanted or _KERNEL_PACKAGE.fullmatch(deb.name)]
    kernel = next(deb for deb in chosen if _KERNEL_PACKAGE.fullmatch(deb.name))
    progress(0.7, "Unpacking the kernel and the guest agent")
    archives = [await _unpack(commands, deb, draft.scratch) for deb in chosen]
    progress(0.85, "Writing the initial RAM file system")
    await in_thread(lambda stop: _assemble(recipe, draft, archives, stop))
    versions = {deb.name: deb.version for deb in debs if deb.name in PACKAGES}
    draft.facts = Facts(
        os=f"Mica micro (Debian {recipe.suite})",
        direct_boot=DirectBoot(kernel="vmlinuz", initrd="initrd", cmdline=CMDLINE),
        min_memory=MIN_MEMORY,
        agent=True,
        build={
            "recipe": "micro",
            "suite": recipe.suite,
            "kernel": kernel.name.removeprefix("linux-image-"),
            **{f"package:{name}": version for name, version in sorted(versions.items())},
        },
    )


async def _unpack(commands: Commands, deb: Deb, into: Path) -> Path:
    path = into / f"{deb.name}.tar"
    with path.open("wb") as file:
        await commands.run(["dpkg-deb", "--fsys-tarfile", str(deb.path)], stdout=file, timeout_s=_UNPACK_TIMEOUT_S)
    return path


def _assemble(recipe: MicroRecipe, draft: Draft, archives: list[Path], stop: threading.Event) -> None:
    tree = Tree()
    try:
        for path in archives:
            tree.add(path)
            if stop.is_set():
                raise Stopped
        (image,) = [name for name in tree.names() if name.startswith("boot/vmlinuz-")]
        kernel = image.removeprefix("boot/vmlinuz-")
        draft.file("vmlinuz").write_bytes(tree.need(image))
        entries = _entries(tree, recipe.suite, kernel)
        with draft.file("initrd").open("wb") as file:
            cpio.write(file, entries)
    finally:
        tree.close()


def _entries(tree: Tree, suite: str, kernel: str) -> dict[str, cpio.Entry]:
    entries = {
        "dev/console": cpio.character_device(5, 1, 0o600),
        "dev/null": cpio.character_device(1, 3, 0o666),
        "etc/os-release": cpio.regular(micro_files.os_release(suite, kernel)),
        **{name: cpio.directory() for name in ("mnt", "proc", "run", "sys", "var/log", "usr/share", "lib/firmware")},
        "root": cpio.directory(0o700),
        "tmp": cpio.directory(0o1777),
        "var/run": cpio.symlink("../run"),
        "var/tmp": cpio.symlink("../tmp"),
        "etc/mtab": cpio.symlink("/proc/mounts"),
        "init": cpio.symlink("/sbin/init"),
    }
    busybox = tree.need("bin/busybox", "usr/bin/busybox")
    entries["bin/busybox"] = cpio.regular(busybox, 0o755)
    for applet in applets(busybox):
        if applet != "busybox":
            entries[f"{'sbin' if applet in _SBIN else 'bin'}/{applet}"] = cpio.symlink("/bin/busybox")
    entries["usr/sbin/qemu-ga"] = cpio.regular(tree.need("usr/sbin/qemu-ga", "usr/bin/qemu-ga"), 0o755)
    entries.update(_libraries(tree, entries["usr/sbin/qemu-ga"].data))
    entries.update(_modules(tree, kernel))
    entries.update(_own_files())
    return entries


# Where scripts and the agent look for them by path; all other applets are in /bin.
_SBIN = frozenset({"init", "halt", "poweroff", "reboot", "modprobe", "insmod", "mdev", "ip", "acpid", "udhcpc"})


def applets(busybox: bytes) -> list[str]:
    """The names that this busybox answers to, from the table in the program: NUL-ended, sorted, starting at ``[``.

    (busybox, applets/applet_tables.c.) Raises ``corrupt`` when there is no such table.
    """
    start = busybox.find(b"[\0[[\0")
    end = busybox.find(b"\0\0", start)
    names = busybox[start:end].decode("ascii", "replace").split("\0") if start >= 0 else []
    if not {"init", "sh", "mount", "modprobe", "udhcpc"} <= set(names):
        raise MicaError(Code.CORRUPT, "Debian's busybox lacks programs that the micro image is made of")
    return names


def _libraries(tree: Tree, program: bytes) -> dict[str, cpio.Entry]:
    """The shared libraries of the program and theirs, where the dynamic linker looks."""
    entries: dict[str, cpio.Entry] = {}
    waiting = elf.needed(program)
    while waiting:
        name = waiting.pop()
        place = name.lstrip("/") if "/" in name else f"lib/x86_64-linux-gnu/{name}"
        if place in entries:
            continue
        base = PurePosixPath(name).name
        data = tree.need(place, *(f"{folder}/{base}" for folder in _LIBRARY_FOLDERS))
        entries[place] = cpio.regular(data, 0o755)
        waiting += elf.needed(data)
    return entries


def _modules(tree: Tree, kernel: str) -> dict[str, cpio.Entry]:
    folder = f"lib/modules/{kernel}"
    prefixes = (f"{folder}/", f"usr/{folder}/")
    paths = {kmod.module_name(name): name for name in tree.names() if name.startswith(prefixes) and ".ko" in name}
    available = {name: kmod.read_module(path, tree.need(path)) for name, path in _reachable(tree, paths).items()}
    chosen = kmod.closure(micro_files.MODULES, available)
    return {
        **{f"{folder}/{module.name}.ko": cpio.regular(module.data) for module in chosen},
        f"{folder}/modules.dep": cpio.regular(kmod.modules_dep(chosen)),
        f"{folder}/modules.alias": cpio.regular(kmod.modules_alias(chosen)),
    }


def _reachable(tree: Tree, paths: dict[str, str]) -> dict[str, str]:
    """The modules that we want and what they depend on, so that the other thousand need not be unpacked."""
    found: dict[str, str] = {}
    waiting = list(micro_files.MODULES)
    while waiting:
        name = waiting.pop()
        if name in paths and name not in found:
            found[name] = paths[name]
            waiting += kmod.read_module(paths[name], tree.need(paths[name])).depends
    return found


def _own_files() -> dict[str, cpio.Entry]:
    early = micro_files.EARLY.replace("EARLY_MODULES", " ".join(micro_files.EARLY_MODULES))
    files = {
        "etc/inittab": micro_files.INITTAB,
        "etc/fstab": micro_files.FSTAB,
        "etc/fstab.dev": micro_files.FSTAB_DEV,
        "etc/mdev.conf": micro_files.MDEV_CONF,
        "etc/profile": micro_files.PROFILE,
        "etc/passwd": micro_files.USERS,
        "etc/group": micro_files.GROUP,
        "etc/hosts": micro_files.HOSTS,
        "etc/hostname": "micro\n",
        "etc/shells": "/bin/sh\n",
        "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    }
    programs = {
        "etc/init.d/early": early,
        "etc/init.d/late": micro_files.LATE,
        "etc/udhcpc/script": micro_files.UDHCPC_SCRIPT,
        "etc/acpi/PWRF/00000080": "#!/bin/sh\nexec /sbin/shutdown\n",
        "sbin/agent": micro_files.AGENT,
        "sbin/nic": micro_files.NIC,
        "sbin/shutdown": micro_files.SHUTDOWN,
    }
    return {
        **{name: cpio.regular(text) for name, text in files.items()},
        "etc/shadow": cpio.regular(micro_files.NO_PASSWORDS, 0o600),
        **{name: cpio.regular(text, 0o755) for name, text in programs.items()},
    }
