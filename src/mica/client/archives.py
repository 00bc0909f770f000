"""Tar streams on this side of a copy: packing what lies here, unpacking what a guest sent.

What a guest sends is hostile input. Only directories that the unpacking itself has made are written into, so no link
leads out; absolute names and ``..`` are refused; devices, FIFOs and links that point outside are left out and named.
Everything is unpacked beside its destination and moved into place at the end, or not at all.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import msgspec

from mica.model.errors import Code, MicaError, invalid, not_found
from mica.model.units import Bytes

CHUNK = 256 * 1024
# An archive ends with two blocks of zeros (POSIX, pax); one that does not was cut off.
_END = 2 * tarfile.BLOCKSIZE
OnBytes = Callable[[int, int | None], None]


class CopyReport(msgspec.Struct, frozen=True):
    """What was copied; ``skipped`` names what could not be: devices, sockets, and links to outside of the copy.

    ``verified`` is false where a guest has no program by which to show that it got the same bytes.
    """

    files: int
    bytes: Bytes
    skipped: tuple[str, ...] = ()
    verified: bool = True


def measure(source: Path) -> CopyReport:
    """Count what a copy of ``source`` will carry. Raises ``not-found``, ``invalid`` for what cannot be copied."""
    files = size = 0
    for _, path in _walk(source, source.name):
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            files += 1
        if stat.S_ISREG(status.st_mode):
            size += status.st_size
    return CopyReport(files, Bytes(size))


def _walk(source: Path, name: str) -> Iterator[tuple[str, Path]]:
    """(name in the archive, path) of ``source`` and everything below it; links are not followed."""
    try:
        mode = source.lstat().st_mode
    except FileNotFoundError:
        raise not_found("file", str(source)) from None
    yield name, source
    if stat.S_ISDIR(mode):
        for entry in sorted(os.scandir(source), key=lambda e: e.name):
            yield from _walk(Path(entry.path), f"{name}/{entry.name}")


def _header(name: str, path: Path, target: IO[bytes] | None) -> tarfile.TarInfo | None:
    """The archive's entry for ``path``, owned by the guest's root; ``None`` for what a copy does not carry."""
    status = os.fstat(target.fileno()) if target is not None else path.lstat()
    info = tarfile.TarInfo(name)
    info.mode = stat.S_IMODE(status.st_mode)
    info.mtime = status.st_mtime
    info.uname = info.gname = "root"
    if stat.S_ISDIR(status.st_mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(status.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        info.size = status.st_size
    else:
        return None
    return info


async def pack(source: Path, name: str, on_progress: OnBytes | None = None) -> AsyncIterator[bytes]:
    """``source`` as a tar stream whose top entry is ``name``. Raises ``not-found``, ``invalid`` when it changes."""
    done, total = 0, measure(source).bytes
    for entry, path in _walk(source, name):
        regular = stat.S_ISREG(path.lstat().st_mode)
        file = path.open("rb") if regular else None
        try:
            info = _header(entry, path, file)
            if info is None:
                continue
            yield info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
            left = info.size
            while file is not None and left:
                data = await asyncio.to_thread(file.read, min(CHUNK, left))
                if not data:
                    raise invalid(
                        f"{path} became shorter while it was copied", hint="copy it when nothing writes to it"
                    )
                left -= len(data)
                done += len(data)
                yield data
                if on_progress is not None:
                    on_progress(done, total)
            if info.size % tarfile.BLOCKSIZE:
                yield bytes(tarfile.BLOCKSIZE - info.size % tarfile.BLOCKSIZE)
        finally:
            if file is not None:
                file.close()
    yield bytes(_END)


class _Unpacking:
    """Unpacks members into ``stage``. Runs in a thread: tarfile reads its stream by blocking."""

    def __init__(self, stage: Path) -> None:
        self._stage = stage
        self._made = {PurePosixPath()}
        self._times: list[tuple[Path, float]] = []
        self.top: set[str] = set()
        self.files = 0
        self.bytes = 0
        self.skipped: list[str] = []

    def run(self, stream: IO[bytes]) -> None:
        # Closed here, so that whoever feeds the stream is told when this ends early.
        with stream:
            try:
                with tarfile.open(fileobj=stream, mode="r|") as archive:
                    for member in archive:
                        self._one(archive, member)
                while stream.read(CHUNK):
                    pass  # whatever follows the end of the archive is the stream's padding
            except tarfile.TarError as error:
                raise MicaError(Code.CORRUPT, f"what the guest sent is no archive: {error}") from error
        for path, mtime in reversed(self._times):
            os.utime(path, (mtime, mtime))

    def _one(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\0" in member.name:
            raise MicaError(Code.CORRUPT, f"the guest's archive names {member.name!r}, outside of what was asked for")
        if name == PurePosixPath():
            return
        self._parents(name.parent)
        path = self._stage / name
        self.top.add(name.parts[0])
        if member.isdir():
            self._directory(name)
            path.chmod(stat.S_IMODE(member.mode) & 0o777 | 0o700)
            self._times.append((path, member.mtime))
        elif member.isreg():
            self._file(archive, member, path)
        elif member.issym() and self._inside(name, member.linkname):
            self._free(path)
            path.symlink_to(member.linkname)
            self.files += 1
        elif member.islnk() and self._known(member.linkname):
            self._free(path)
            os.link(self._stage / member.linkname, path, follow_symlinks=False)
            self.files += 1
        else:
            self.skipped.append(member.name)

    def _parents(self, directory: PurePosixPath) -> None:
        for parent in [*reversed(directory.parents), directory]:
            self._directory(parent)

    def _directory(self, name: PurePosixPath) -> None:
        if name not in self._made:
            # What an earlier member put there, a link perhaps, gives way: nothing is written through it.
            self._free(self._stage / name)
            (self._stage / name).mkdir(mode=0o755)
            self._made.add(name)

    def _free(self, path: Path) -> None:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            raise MicaError(Code.CORRUPT, f"the guest's archive has {path.name!r} twice, once as a directory")

    def _file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        self._free(path)
        source = archive.extractfile(member)
        assert source is not None
        with path.open("xb") as target:
            shutil.copyfileobj(source, target, CHUNK)
            if target.tell() != member.size:
                raise MicaError(Code.CORRUPT, f"{member.name!r} broke off in the middle")
        path.chmod(stat.S_IMODE(member.mode) & 0o777)
        os.utime(path, (member.mtime, member.mtime))
        self.files += 1
        self.bytes += member.size

    def _inside(self, name: PurePosixPath, target: str) -> bool:
        where = posixpath.normpath(str(name.parent / target))
        return not target.startswith("/") and where != ".." and not where.startswith("../")

    def _known(self, target: str) -> bool:
        name = PurePosixPath(target)
        if name.is_absolute() or ".." in name.parts or name.parent not in self._made:
            return False
        return stat.S_ISREG((self._stage / name).lstat().st_mode) if (self._stage / name).exists() else False


async def unpack(stream: AsyncIterator[bytes], dest: Path, on_progress: OnBytes | None = None) -> CopyReport:
    """Unpack a stream with one top entry to ``dest``, or into it where it is a directory or ends with ``/``.

    An existing file is replaced, an existing directory is merged into. Raises ``corrupt``, ``invalid``,
    ``not-found`` (the directory that it goes into).
    """
    into = dest if dest.is_dir() else dest.parent
    if not into.is_dir():
        raise not_found("directory", str(into), hint="make it first")
    stage = Path(tempfile.mkdtemp(prefix=".mica-cp-", dir=into))
    try:
        work = _Unpacking(stage)
        await _feed(stream, work, on_progress)
        for name in sorted(work.top):
            if (stage / name).exists() or (stage / name).is_symlink():
                target = dest / name if dest.is_dir() else dest
                await asyncio.to_thread(_land, stage / name, target)
        return CopyReport(work.files, Bytes(work.bytes), tuple(work.skipped))
    except OSError as error:
        raise invalid(f"cannot write to {into}: {error.strerror}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


async def _feed(stream: AsyncIterator[bytes], work: _Unpacking, on_progress: OnBytes | None) -> None:
    """Give the stream to the thread that unpacks, through a pipe: neither gets ahead of the other."""
    read_end, write_end = os.pipe()
    reading = asyncio.ensure_future(asyncio.to_thread(work.run, os.fdopen(read_end, "rb")))
    done, end = 0, b""
    try:
        with os.fdopen(write_end, "wb", buffering=0) as sink:
            async for piece in stream:
                view = memoryview(piece)
                while view:
                    view = view[await asyncio.to_thread(sink.write, view) :]
                done += len(piece)
                end = (end + piece)[-_END:]
                if on_progress is not None:
                    on_progress(done, None)
    except BrokenPipeError:
        pass  # the thread has ended, and says why
    except BaseException:
        # The pipe is closed by now: the thread sees a broken archive and ends.
        await asyncio.wait({reading})
        reading.exception()
        raise
    await reading
    if end != bytes(_END):
        raise MicaError(Code.CORRUPT, "the archive broke off before its end", retryable=True)


def _land(source: Path, target: Path) -> None:
    """Move into place. Raises ``invalid`` where a directory would be replaced by a file."""
    if source.is_dir() and not source.is_symlink():
        if not target.is_dir():
            source.rename(target)
            return
        for entry in sorted(source.iterdir()):
            _land(entry, target / entry.name)
        return
    if target.is_dir() and not target.is_symlink():
        raise invalid(f"{target} is a directory, what came is not")
    source.replace(target)
