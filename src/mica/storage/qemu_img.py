"""``qemu-img``, with its answers as values and its complaints as errors that name the way out.

Exit statuses of ``check`` (qemu-img(1)): 0 consistent, 1 the check could not be done, 2 corrupt, 3 leaked clusters
only, which waste space and harm nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from mica.host.programs import Answer, ask
from mica.model.errors import Code, MicaError
from mica.model.image import DiskFormat
from mica.model.units import GIB, Bytes

# For what only touches metadata. A host that swaps or a network file system may well take seconds.
QUICK_S: Final = 60.0
# A check reads all metadata, a conversion all data: time by size, at a pace that even an old disk keeps.
_CHECK_S_PER_GIB: Final = 2.0
_COPY_S_PER_GIB: Final = 120.0

_LEAKS_ONLY: Final = 3
# What ``-p`` shows as it goes on: ``    (12.34/100%)`` and a carriage return.
_PERCENT: Final = re.compile(rb"\((\d+\.\d+)/100%\)")
# Subclusters of 4 KiB: a small write to a block of the base then copies nothing. Measured with 20,000 scattered
# writes of 4 KiB over a full base: 0.59 s and 81 MB, against 1.42 s and 509 MB with the default of 64 KiB clusters
# (QEMU 5.2 and later; QEMU documentation, interop/qcow2, "Extended L2 Entries").
_LAYER_OPTIONS: Final = "cluster_size=128k,extended_l2=on"


class _Check(msgspec.Struct, frozen=True, rename="kebab"):
    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0


class _Measure(msgspec.Struct, frozen=True):
    required: int


_CHECK: Final = msgspec.json.Decoder(_Check)
_MEASURE: Final = msgspec.json.Decoder(_Measure)


class QemuImg:
    """Runs the program at ``path``, with the words ``before`` it; an empty path means that the host has none.

    Every method raises ``host-lacks``, ``timeout``, ``in-use`` when another process has the image open for writing,
    ``insufficient-disk``, ``invalid`` for a size beyond the format, else ``command-failed`` with its last words.
    """

    def __init__(self, path: str, before: Sequence[str] = ()) -> None:
        self._path = path
        self._before = tuple(before)

    async def create(self, image: Path, size: int, base: Path | None, base_format: DiskFormat) -> None:
        """Make an empty qcow2 image, a layer over ``base`` where there is one.

        ``base`` is not opened (``-u``): a machine may be writing to what is going to be a part.
        """
        below = ("-u", "-b", str(base), "-F", base_format, "-o", _LAYER_OPTIONS) if base is not None else ()
        await self._run(("create", "-q", "-f", "qcow2", *below, str(image), str(size)), image)

    async def convert(
        self,
        source: Path,
        from_: DiskFormat,
        image: Path,
        to: DiskFormat,
        size: int,
        report: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Copy the ``size`` bytes that a guest would see of ``source`` into a new image, leaving holes for zeroes.

        ``report`` is told 0.0 to 1.0.
        """

        def watch(chunk: bytes) -> None:
            if percents := _PERCENT.findall(chunk):
                report(float(percents[-1]) / 100)

        argv = ("convert", "-p", "-f", from_, "-O", to, str(source), str(image))
        await self._run(argv, image, timeout_s=QUICK_S + size / GIB * _COPY_S_PER_GIB, watch=watch)

    async def rebase(self, image: Path, base: Path | None, base_format: DiskFormat, size: int) -> None:
        """Have a qcow2 image lie over ``base``, or over nothing, and read as before: what differs is copied into it."""
        below = ("-b", str(base), "-F", base_format) if base is not None else ("-b", "")
        argv = ("rebase", "-q", "-f", "qcow2", *below, str(image))
        await self._run(argv, image, timeout_s=QUICK_S + size / GIB * _COPY_S_PER_GIB)

    async def compare(self, one: Path, other: Path, size: int) -> None:
        """Raises ``corrupt`` unless a guest would see the same in both qcow2 images."""
        argv = ("compare", "-q", "-U", "-f", "qcow2", "-F", "qcow2", str(one), str(other))
        answer = await self._run(argv, other, timeout_s=QUICK_S + size / GIB * _COPY_S_PER_GIB, accept=(0, 1))
        if answer.status:
            raise MicaError(Code.CORRUPT, f"{other} does not read as {one} does", hint="look at the host's disk: dmesg")

    async def resize(self, image: Path, format_: DiskFormat, size: int) -> None:
        """Grow an image; never smaller, the program refuses that without ``--shrink``."""
        await self._run(("resize", "-q", "-f", format_, str(image), str(size)), image)

    async def required(self, image: Path, format_: DiskFormat, to: DiskFormat) -> Bytes:
        """Bytes that a copy in format ``to`` will take."""
        answer = await self._run(("measure", "--output=json", "-f", format_, "-O", to, str(image)), image)
        return Bytes(_MEASURE.decode(answer.out).required)

    async def check(self, image: Path, size: int) -> None:
        """Check the metadata of a qcow2 image with a virtual size of ``size`` bytes; repair nothing.

        Raises ``corrupt`` naming the file and what was found. Leaked clusters are no error.
        """
        argv = ("check", "--output=json", "-f", "qcow2", str(image))
        answer = await self._run(
            argv, image, timeout_s=QUICK_S + size / GIB * _CHECK_S_PER_GIB, accept=(0, 2, _LEAKS_ONLY)
        )
        if answer.status in (0, _LEAKS_ONLY):
            return
        found = _CHECK.decode(answer.out)
        raise MicaError(
            Code.CORRUPT,
            f"{image} is damaged: qemu-img check found {found.corruptions} corruptions, {found.check_errors} errors",
            hint=f"restore it from a backup; or copy it first and then repair it: qemu-img check -r all {image}",
            details={"path": str(image), "corruptions": found.corruptions, "leaks": found.leaks},
        )

    async def _run(
        self,
        arguments: tuple[str, ...],
        image: Path,
        *,
        timeout_s: float = QUICK_S,
        accept: tuple[int, ...] = (0,),
        watch: Callable[[bytes], None] = lambda _: None,
    ) -> Answer:
        if not self._path:
            raise MicaError(
                Code.HOST_LACKS, "this host has no qemu-img", hint="install it: apt-get install -y qemu-utils"
            )
        answer = await ask([*self._before, self._path, *arguments], timeout_s=timeout_s, watch=watch)
        if answer.status not in accept:
            raise _failure(arguments[0], image, answer)
        return answer


def _failure(verb: str, image: Path, answer: Answer) -> MicaError:
    words = answer.err.decode(errors="replace").strip()
    details = {"path": str(image), "status": answer.status, "said": words[-2000:]}
    if "Is another process using the image" in words:
        return MicaError(
            Code.IN_USE,
            f"{image} is in use by another process",
            hint=f"find it and end it: fuser -v {image}",
            retryable=True,
            details=details,
        )
    if "No space left" in words or "quota exceeded" in words:
        return MicaError(
            Code.INSUFFICIENT_DISK,
            f"the file system of {image} is full",
            hint=f"free some space there: df -h {image.parent}",
            retryable=True,
            details=details,
        )
    if "too large" in words or "must be less than" in words:
        return MicaError(
            Code.INVALID,
            f"{image} cannot be made that large: {answer.last_words}",
            hint="make it smaller",
            details=details,
        )
    return MicaError(
        Code.COMMAND_FAILED,
        f"qemu-img {verb} of {image} failed: {answer.last_words or 'no words'}",
        hint=f"look at the image: qemu-img info {image}; and at the host's log: dmesg",
        details=details,
    )
