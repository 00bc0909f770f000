"""Guest RAM: a file in memory that belongs to no directory, and becomes an image that nobody can write any more.

RAM is a memfd (memfd_create(2)), handed to QEMU as a descriptor and opened through ``/proc/self/fd/N``. A machine that
starts cold maps it shared. Sealed, it is a RAM image: whoever maps it privately sees the memory of that moment and
copies what it writes (mmap(2), MAP_PRIVATE). Seals hold against discards too: a balloon in one fork cannot punch holes
into what the others see (fcntl(2), F_SEAL_FUTURE_WRITE: mappings that exist may go on writing, so a machine may be
sealed while it runs).

A machine that has become a private child of an image, and has changed much of it, is given a new one: a copy is made
beside it while it runs, and what it changed is written in while it stands still. Only then is the copy sealed. What is
not sealed is no RAM image, whoever maps it.

A memfd lives as long as a process holds it. After the daemon died it is found again in the machines that map it.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mica.host.processes import find
from mica.host.sealed import SEALS
from mica.model.errors import Code, MicaError, not_found
from mica.model.units import MIB, Bytes, format_size
from mica.model.vm import VmRuntime
from mica.qemu import pages

_CHUNK: Final = 8 * MIB


def create(size: Bytes) -> int:
    """Fresh guest RAM of ``size`` bytes; the descriptor is the caller's. Raises ``insufficient-memory``."""
    descriptor = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        os.close(descriptor)
        text = f"{format_size(size)} of guest RAM cannot be made: {error.strerror}"
        raise MicaError(Code.INSUFFICIENT_MEMORY, text) from error
    return descriptor


def copy_data(source: int, target: int, report: Callable[[float], None], stopped: Callable[[], bool]) -> None:
    """Copy what is data from one file to another of the same size, leaving the holes out (lseek(2), SEEK_DATA)."""
    size, at = os.fstat(source).st_size, 0
    while not stopped():
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                return
            raise
        end = os.lseek(source, at, os.SEEK_HOLE)
        os.lseek(target, at, os.SEEK_SET)
        while at < end and not stopped():
            at += os.sendfile(target, source, at, min(_CHUNK, end - at))
            report(at / size)


async def _in_thread(source: int, target: int, report: Callable[[float], None]) -> None:
    """:func:`copy_data` beside the loop; cancelling ends the thread before anyone closes its descriptors."""
    cancelled = False
    loop = asyncio.get_running_loop()

    def tell(fraction: float) -> None:
        loop.call_soon_threadsafe(report, fraction)

    work = loop.run_in_executor(None, copy_data, source, target, tell, lambda: cancelled)
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        cancelled = True
        await asyncio.wait({work})
        raise


class RamImages:
    """Implements :class:`mica.ports.ram.RamImages`. Close it; machines keep what they map."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        # Copies that are no images yet.
        self._making: dict[str, int] = {}

    async def hold(self, runtime: VmRuntime, ram_id: str) -> None:
        if ram_id in self._held:
            return
        descriptor = _of_machine(runtime)
        if descriptor is None:
            raise MicaError(Code.QEMU_FAILED, "the machine ended before its memory could be kept")
        try:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            os.close(descriptor)
            raise
        self._held[ram_id] = descriptor

    def learn(self, runtime: VmRuntime) -> None:
        """As the port says. Also for every machine that is attached, as one that waits may be known to nobody yet."""
        if runtime.ram and runtime.ram not in self._held:
            descriptor = _of_machine(runtime)
            if descriptor is None:
                return
            if _sealed(descriptor):
                self._held[runtime.ram] = descriptor
            else:  # it waits on a copy that is being made
                os.close(descriptor)

    async def prepare(self, runtime: VmRuntime, ram_id: str, report: Callable[[float], None]) -> None:
        if ram_id in self._making or ram_id in self._held:
            return
        source = _of_machine(runtime)
        if source is None:
            raise MicaError(Code.QEMU_FAILED, "the machine ended before its memory could be copied")
        try:
            descriptor = create(Bytes(os.fstat(source).st_size))
            try:
                await _in_thread(source, descriptor, report)
                await _fill(runtime, descriptor)  # most of it will not have changed when the machine stands still
            except BaseException:
                os.close(descriptor)
                raise
        finally:
            os.close(source)
        self._making[ram_id] = descriptor

    async def fill(self, runtime: VmRuntime, waiting: VmRuntime) -> None:
        if waiting.ram in self._held:
            return
        descriptor = _of_machine(waiting)
        if descriptor is None:
            raise MicaError(Code.QEMU_FAILED, "the machine that was to go on has ended", retryable=True)
        try:
            if not _sealed(descriptor):  # else a daemon before this one came so far
                await _fill(runtime, descriptor)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            os.close(descriptor)
            raise
        self._held[waiting.ram] = descriptor
        self.discard(waiting.ram)

    def discard(self, ram_id: str) -> None:
        descriptor = self._making.pop(ram_id, None)
        if descriptor is not None:
            os.close(descriptor)

    async def open(self, ram_id: str, file: Path) -> int:
        """The image, read from ``file`` unless it is in memory; the descriptor stays ours. Raises ``not-found``."""
        if ram_id in self._making:
            return self._making[ram_id]
        if ram_id not in self._held:
            self._held[ram_id] = await self._read(ram_id, file)
        self._held[ram_id] = self._held.pop(ram_id)  # the last one used is the last one
        return self._held[ram_id]

    async def _read(self, ram_id: str, file: Path) -> int:
        try:
            source = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise not_found(
                "RAM image", ram_id, hint="it was never written to disk, and no machine maps it now"
            ) from None
        try:
            descriptor = create(Bytes(os.fstat(source).st_size))
            try:
                await _in_thread(source, descriptor, lambda _: None)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_WRITE)
            except BaseException:
                os.close(descriptor)
                raise
        finally:
            os.close(source)
        return descriptor

    async def save(self, ram_id: str, file: Path, report: Callable[[float], None]) -> None:
        source = self._held.get(ram_id)
        if source is None:
            raise not_found("RAM image", ram_id, hint="no machine maps it any more")
        mine = os.dup(source)  # it may be released meanwhile
        try:
            target = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(target, os.fstat(mine).st_size)
                await _in_thread(mine, target, report)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                text = f"no room for a RAM image at {file}: {error.strerror}"
                raise MicaError(Code.INSUFFICIENT_DISK, text, hint="delete snapshots or VMs") from error
            finally:
                os.close(target)
        finally:
            os.close(mine)

    def held(self) -> list[str]:
        return list(self._held)

    def size(self, ram_id: str) -> Bytes:
        descriptor = self._held.get(ram_id)
        # In units of 512 bytes whatever the page size (stat(2)); pages that were swapped out count.
        return Bytes(0 if descriptor is None else os.fstat(descriptor).st_blocks * 512)

    def release(self, ram_id: str) -> None:
        descriptor = self._held.pop(ram_id, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        for ram_id in list(self._held):
            self.release(ram_id)
        for ram_id in list(self._making):
            self.discard(ram_id)


def _sealed(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS


async def _fill(runtime: VmRuntime, target: int) -> None:
    """What a machine changed in memory that is another's, into ``target``. Raises ``qemu-failed``.

    Cancelled, it ends only when the thread has: that would write to a descriptor which may be another file's by then.
    """
    ended = MicaError(Code.QEMU_FAILED, "the machine ended before its memory could be copied")
    live = find(runtime.process)
    if live is None:
        raise ended
    with live:
        try:
            inode = os.stat(f"/proc/{live.pid}/fd/{runtime.handle['ram']}").st_ino
            where = pages.mapping_of(live.pid, inode, runtime.spec.memory)
            work = asyncio.get_running_loop().run_in_executor(None, pages.write_into, live.pid, where, target)
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait({work})
                raise
        except (FileNotFoundError, ProcessLookupError) as error:
            raise ended from error


def _of_machine(runtime: VmRuntime) -> int | None:
    """The RAM file of a living machine: the descriptor it was started with is open in it under the same number."""
    live = find(runtime.process)
    if live is None:
        return None
    with live:
        path = f"/proc/{live.pid}/fd/{runtime.handle['ram']}"
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
