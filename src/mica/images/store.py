"""Images in a directory, each in a directory named by its digest.

::

    ROOT/<64 hexadecimal digits>/manifest.json, files…    an image: complete, durable, never changed
    ROOT/.work/<random>/{lock,files/,scratch/}            a build or a removal under way; its owner holds the lock
    ROOT/.lock                                            held for moments: a new build, a landing, a sweep

A build becomes an image by one rename(2), after everything in it was fsynced. Whoever finds a directory below ``.work``
whose lock is free knows that its owner died, and removes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import structlog
from blake3 import blake3

from mica.images.files import (
    digest_file,
    disk_full_is_said,
    in_thread,
    locked,
    remove_tree,
    shielded,
    sync_directory,
    sync_file,
    try_lock,
)
from mica.model.errors import Code, MicaError, not_found
from mica.model.image import DirectBoot, DiskFormat, Firmware, Image, ImageFile
from mica.model.units import Bytes
from mica.ports.progress import Progress

MANIFEST = "manifest.json"
_WORK = ".work"
_PREFIX = "blake3:"
_LOCK_TIMEOUT_S = 60

_log = structlog.get_logger(__name__)

Remover = Callable[[Path], Awaitable[None]]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine must know to boot the image, see :class:`Image`; all but ``build`` goes into the digest."""

    os: str
    disk: str | None = None
    disk_format: DiskFormat = DiskFormat.QCOW2
    disk_size: Bytes = Bytes(0)
    firmware: Firmware = Firmware.BIOS
    direct_boot: DirectBoot | None = None
    min_memory: Bytes = Bytes(0)
    agent: bool = False
    cloud_init: bool = False
    build: dict[str, str] = {}


class Draft:
    """An image in the making. The builder fills :meth:`file` and sets ``facts``; ``scratch`` is thrown away."""

    def __init__(self, home: Path) -> None:
        self.files = home / "files"
        self.scratch = home / "scratch"
        self.facts = Facts(os="")

    def file(self, name: str) -> Path:
        return self.files / name


def image_digest(facts: Facts, files: dict[str, ImageFile]) -> str:
    """BLAKE3 over the digests of the files and the facts, as sorted JSON."""
    told = {**msgspec.structs.asdict(facts), "files": files}
    del told["build"]
    return _PREFIX + blake3(msgspec.json.encode(told, order="sorted")).hexdigest()


class ContentStore:
    """The directory of images. Any number of processes may use it at once."""

    def __init__(self, root: Path, remove: Remover | None = None) -> None:
        """``remove`` removes a work directory; builds may leave files in it that need more than our own rights."""
        self._root = root
        self._remove_work = remove or _remove

    def directory(self, digest: str) -> Path:
        """Where an image lies or would lie. Raises ``not-found`` for what is no digest."""
        digits = digest.removeprefix(_PREFIX)
        if not digest.startswith(_PREFIX) or len(digits) != 64 or set(digits) - set("0123456789abcdef"):
            raise not_found("image", digest)
        return self._root / digits

    @contextlib.asynccontextmanager
    async def draft(self) -> AsyncIterator[Draft]:
        """A new draft, removed in the end whatever happens."""
        async with self._work() as home:
            draft = Draft(home)
            draft.files.mkdir(mode=0o755)
            draft.scratch.mkdir(mode=0o755)
            yield draft

    async def land(self, draft: Draft, name: str, progress: Progress) -> Image:
        """Make the draft an image and return it; the same content again is the same image.

        Raises ``insufficient-disk``. A draft is as it was when this raises.
        """
        progress(None, "Computing digests")
        with disk_full_is_said(self._root, f"storing the image {name}"):
            files = await in_thread(lambda stop: _seal(draft.files, stop))
            facts = msgspec.structs.asdict(draft.facts)
            digest = image_digest(draft.facts, files)
            image = Image(digest=digest, name=name, created_at=time.time(), files=files, **facts)
            manifest = draft.files / MANIFEST
            manifest.write_bytes(msgspec.json.format(msgspec.json.encode(image, order="deterministic"), indent=1))
            manifest.chmod(0o444)
            await in_thread(lambda _: _sync_tree(draft.files))
            target = self.directory(digest)
            async with self._locked():
                try:
                    draft.files.rename(target)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    _renew(draft.files, target)
                sync_directory(self._root)
        return image

    async def images(self) -> list[Image]:
        """What is here, oldest first, by the manifests. Directories without a readable one are no images."""
        paths = list(self._root.iterdir()) if self._root.is_dir() else []
        found = [image for path in paths if (image := _read_manifest(path)) is not None]
        return sorted(found, key=lambda image: image.created_at)

    async def verify(self, image: Image, progress: Progress) -> None:
        """Read every byte; see :class:`mica.ports.images.Images`."""
        home = self.directory(image.digest)
        if not home.is_dir():
            raise not_found("image", image.digest, hint="build or import it again")
        facts = Facts(**{field: getattr(image, field) for field in Facts.__struct_fields__})
        if image_digest(facts, image.files) != image.digest:
            raise _damaged(home / MANIFEST, image.digest, image_digest(facts, image.files))
        total = max(image.size, 1)
        done = 0

        def seen(count: int) -> None:
            nonlocal done
            done += count
            loop.call_soon_threadsafe(progress, min(done / total, 1.0), f"Reading {current}")

        loop = asyncio.get_running_loop()
        for current, expected in sorted(image.files.items()):
            path = home / current
            if not path.is_file():
                raise not_found("file", str(path), hint=f"delete the image {image.name} and build it again")
            found = await in_thread(lambda stop, path=path: digest_file(path, stop, seen))  # type: ignore[misc]
            if found != expected:
                raise _damaged(path, expected.blake3, found.blake3)

    async def remove(self, digest: str) -> None:
        """Delete an image's directory. It is moved away first, so that it is never seen in part."""
        target = self.directory(digest)
        if target.is_dir():
            async with self._work() as home, self._locked():
                with contextlib.suppress(FileNotFoundError):
                    target.rename(home / "removed")
                sync_directory(self._root)

    async def sweep(self) -> list[Path]:
        """Directories of builds whose owner has died, removed; returns what they were."""
        removed = []
        work = self._root / _WORK
        if work.is_dir():
            async with self._locked():
                for path in sorted(work.iterdir()):
                    lock = try_lock(path / "lock") if path.is_dir() else None
                    if lock is not None:
                        try:
                            await self._remove_work(path)
                            removed.append(path)
                        except (OSError, MicaError) as error:
                            # What cannot be removed takes space, no more; the images are as good as before.
                            _log.warning("leftovers of a build stay", path=str(path), error=str(error))
                        finally:
                            os.close(lock)
        return removed

    @contextlib.asynccontextmanager
    async def _work(self) -> AsyncIterator[Path]:
        """A directory of ours below ``.work`` with its lock held."""
        work = self._root / _WORK
        with disk_full_is_said(self._root.parent, "starting a build"):
            work.mkdir(parents=True, exist_ok=True)
        home = work / secrets.token_hex(8)
        async with self._locked():
            home.mkdir(mode=0o755)
            lock = try_lock(home / "lock")
        assert lock is not None
        try:
            yield home
        finally:
            try:
                await shielded(self._remove_work(home))
            finally:
                os.close(lock)

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        async with locked(self._root / ".lock", timeout_s=_LOCK_TIMEOUT_S, what="the image store"):
            yield


def _renew(files: Path, target: Path) -> None:
    """It is here already, but may have been damaged since, and what we hold is good: replace file by file.

    So no file is absent at any moment, and whoever has one open keeps it.
    """
    for path in sorted(files.iterdir(), key=lambda path: path.name == MANIFEST):
        path.replace(target / path.name)
    sync_directory(target)


async def _remove(path: Path) -> None:
    await in_thread(lambda _: remove_tree(path))


def _seal(home: Path, stop: threading.Event) -> dict[str, ImageFile]:
    files = {}
    for path in sorted(home.iterdir()):
        if path.name == MANIFEST:
            continue
        path.chmod(0o444)
        files[path.name] = digest_file(path, stop)
    return files


def _sync_tree(home: Path) -> None:
    for path in home.iterdir():
        sync_file(path)
    sync_directory(home)


def _read_manifest(home: Path) -> Image | None:
    try:
        image = msgspec.json.decode((home / MANIFEST).read_bytes(), type=Image)
    except (OSError, msgspec.MsgspecError):
        return None
    complete = all((home / name).is_file() for name in image.files)
    return image if complete and image.digest == _PREFIX + home.name else None


def _damaged(path: Path, expected: str, found: str) -> MicaError:
    return MicaError(
        Code.CORRUPT,
        f"{path} is damaged: its BLAKE3 digest is {found}, expected {expected}",
        hint="delete the image and build or import it again; then check the disk it lies on",
        details={"path": str(path), "expected": expected, "found": found},
    )
