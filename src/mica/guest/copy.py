"""Files in and out of guests: a tar stream through a command in the guest, checked against its checksum.

Into a guest, the stream is unpacked into a hidden directory beside where it belongs; only when the guest has said
which bytes it got, and they are ours, is it moved into place. Out of a guest, the last piece is held back until the
guest's checksum has agreed, so that whoever reads sees a broken stream instead of a wrong file. A copy that breaks off
leaves nothing behind. What streams, waits and survives is :mod:`mica.guest.exec`.

The guest needs ``sh``, ``tar``, ``mktemp``, ``mkfifo`` and ``tee``; ``sha256sum`` or ``cksum`` where the check is to
happen there, ``df`` to see whether there is space, and ``gzip`` to take what goes in compressed: the agent's way in is
several times slower than its way out, and than unpacking.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import posixpath
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import msgspec
import structlog

from mica.guest.digests import PROGRAMS, Digest
from mica.guest.guests import AgentGuests
from mica.guest.sessions import COPY_MARK, ExecSessions
from mica.guest.stdin import CHUNK
from mica.model.errors import Code, MicaError, invalid
from mica.model.exec import ExecRecord, ExecSpec, ExecState
from mica.model.units import KIB, Bytes, format_size
from mica.model.vm import VmRuntime

log = structlog.get_logger()

# What a copy may pass through the host's disk while it is on its way out.
MAX_COPY = Bytes(1024**4)
NO_SUCH = 65
# A piece that does not become this much smaller is sent as it is.
WORTHWHILE = 0.9

_HASH = f"""
hash=
for c in {" ".join(PROGRAMS)}; do
  command -v $c >/dev/null 2>&1 && hash=$c && break
done
"""

COPY_IN = (
    r"""
d=$1
[ -d "$d" ] || { echo "there is no directory $d in the guest" >&2; exit 65; }
"""
    + _HASH
    + r"""
zip=
command -v gzip >/dev/null 2>&1 && zip=gzip
echo "$(df -Pk "$d" 2>/dev/null | tail -n 1)"
echo "${hash:-none} ${zip:-none}"
s=$(mktemp -d "$d/.mica-cp-XXXXXX") || exit 66
trap 'rm -rf "$s"' EXIT
trap 'exit 1' INT TERM HUP
mkdir "$s/new" && mkfifo "$s/h" || exit 66
if [ "$hash" ]; then $hash <"$s/h" >"$s/sum" & else { cat >/dev/null; echo none >"$s/sum"; } <"$s/h" & fi
h=$!
if [ "$zip" ]; then gzip -dc || : >"$s/bad"; else cat; fi |
  tee "$s/h" | { tar -C "$s/new" -xpf -; r=$?; cat >/dev/null; [ $r = 0 ]; } || exit 67
wait $h
[ -e "$s/bad" ] && exit 70
read -r sum rest <"$s/sum"
echo "$s $sum"
i=0
while [ ! -e "$s/ok" ]; do
  [ $i -lt 1200 ] || exit 68
  sleep 0.1
  i=$((i + 1))
done
cd "$s/new" || exit 66
for e in * .[!.]* ..?*; do
  [ -e "$e" ] || [ -h "$e" ] || continue
  if [ -d "$e" ] && [ ! -h "$e" ]; then
    if [ -d "$d/$e" ]; then cp -a "$e/." "$d/$e/" || exit 69; continue; fi
  elif [ -d "$d/$e" ] && [ ! -h "$d/$e" ]; then
    echo "$d/$e is a directory in the guest, the source is not" >&2
    exit 69
  fi
  mv -f "$e" "$d/$e" || exit 69
done
"""
)
"""Argument: the directory. Says what ``df`` says of it, its programs for checksum and compression (a name or ``none``),
and, when it has everything, where that lies and its checksum; moves it into place when it finds a file ``ok`` there."""

COPY_OUT = (
    r"""
cd "$1" 2>/dev/null && { [ -e "$2" ] || [ -h "$2" ]; } || { echo "there is no ${1%/}/$2 in the guest" >&2; exit 65; }
p=$(mktemp -d) || exit 66
trap 'rm -rf "$p"' EXIT
trap 'exit 1' INT TERM HUP
mkfifo "$p/h" || exit 66
"""
    + _HASH
    + r"""
echo "mica-hash ${hash:-none}" >&2
if [ "$hash" ]; then $hash <"$p/h" >"$p/sum" & else { cat >/dev/null; echo none >"$p/sum"; } <"$p/h" & fi
h=$!
{ tar -cf - -- "$2"; echo $? >"$p/status"; } | tee "$p/h"
wait $h
cat "$p/sum" >&2
read -r r <"$p/status"
exit "$r"
"""
)
"""Arguments: the directory and the name in it. Says on stderr which program makes the checksum, and at the end its
output."""


class CopySummary(msgspec.Struct, frozen=True):
    """What was copied in: bytes of the tar stream. ``checked_by`` is what showed that the guest has the same bytes:
    ``sha256sum``, ``cksum``, ``gzip`` (a CRC), or empty where the guest has none of them."""

    bytes: Bytes
    sha256: str
    checked_by: str


def absolute(path: str) -> str:
    """A path in a guest, normalised. Raises ``invalid`` unless it is absolute and free of NUL bytes."""
    if not path.startswith("/") or "\0" in path:
        raise invalid(f"{path!r} is no absolute path in a guest", hint="begin it with /")
    return posixpath.normpath(path)


class Copies:
    """Copies files between this host's API and guests."""

    def __init__(self, sessions: ExecSessions, guests: AgentGuests) -> None:
        self._sessions = sessions
        self._guests = guests

    async def copy_in(
        self, vm_id: str, name: str, runtime: VmRuntime, dest: str, tar: AsyncIterator[bytes], *, size: int = 0
    ) -> CopySummary:
        """Unpack ``tar`` into the directory ``dest``. Nothing of it is there until all of it is.

        ``size`` is how many bytes the files have, as far as is known. Raises ``not-found`` (no such directory),
        ``insufficient-disk``, ``corrupt`` (the guest got something else), ``command-failed`` with tar's last words,
        and what :meth:`ExecSessions.start` raises.
        """
        dest = absolute(dest)
        record = await self._sessions.start(vm_id, name, runtime, _spec(COPY_IN, dest, stdin=True))
        total = hashlib.sha256()
        sent = 0
        try:
            async with aclosing(self._lines(record)) as told:
                _check_space(name, dest, await self._line(record, told), size)
                program, packer = (await self._line(record, told)).split()
                digest = Digest(program)
                try:
                    async for piece in _pieces(tar):
                        total.update(piece)
                        digest.update(piece)
                        sent += len(piece)
                        data = piece if packer == "none" else await asyncio.to_thread(_packed, piece)
                        await self._sessions.stdin(vm_id, record.id, data)
                    await self._sessions.stdin(vm_id, record.id, None)
                except MicaError as error:
                    if error.code is not Code.STATE_CONFLICT:
                        raise
                    # The command ended before it had read everything: its own words say why.
                stage, _, seen = (await self._line(record, told)).rpartition(" ")
            if seen not in ("none", digest.text()):
                raise MicaError(Code.CORRUPT, "the guest got other bytes than were sent", retryable=True)
            agent = self._guests.agent(vm_id, name, runtime)
            await agent.file_close(await agent.file_open(f"{stage}/ok", "w"))
            _check(await self._sessions.wait(vm_id, record.id), await self._words(record))
        finally:
            await asyncio.shield(self._sessions.discard(vm_id, record.id))
        checked_by = next((p for p in (program, packer) if p != "none"), "")
        return CopySummary(Bytes(sent), total.hexdigest(), checked_by)

    async def _lines(self, record: ExecRecord, stream: str = "stdout") -> AsyncGenerator[str, None]:
        text = b""
        async for piece in self._sessions.follow(record.vm_id, record.id, stream, 0):
            *lines, text = (text + piece).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace").strip()

    async def _line(self, record: ExecRecord, told: AsyncGenerator[str, None]) -> str:
        """The next line that the guest tells. Raises what the command failed with, if it ends instead."""
        async for line in told:
            return line
        _check(await self._sessions.wait(record.vm_id, record.id), await self._words(record))
        raise MicaError(Code.AGENT_FAILED, "the guest ended the copy without a word")

    async def copy_out(self, vm_id: str, name: str, runtime: VmRuntime, path: str) -> AsyncGenerator[bytes, None]:
        """A tar stream of ``path``, its last component being the name in it. Ends early by raising.

        Raises ``not-found``, ``corrupt`` before the last piece, ``command-failed``, and what a start raises.
        """
        directory, base = posixpath.split(absolute(path))
        spec = _spec(COPY_OUT, directory, base or ".")
        record = await self._sessions.start(vm_id, name, runtime, spec, max_output=MAX_COPY)
        held = b""
        try:
            program = await self._checked_by(record)
            if program == "none":
                log.warning("a copy out of a guest is not verified: it has no checksum program", vm=name, path=path)
            digest = Digest(program)
            async for piece in self._sessions.follow(vm_id, record.id, "stdout", 0):
                digest.update(piece)
                if held:
                    yield held
                held = piece
            ended = await self._sessions.wait(vm_id, record.id)
            words = await self._words(record)
            _check(ended, words)
            seen = words.splitlines()[-1].split()[0] if words else ""
            if seen not in ("none", digest.text()):
                raise MicaError(Code.CORRUPT, "other bytes arrived than the guest sent", retryable=True)
            yield held
        finally:
            await asyncio.shield(self._sessions.discard(vm_id, record.id))

    async def _checked_by(self, record: ExecRecord) -> str:
        """Which program makes the checksum of what comes out; ``none`` also where the command fails at once."""
        async with aclosing(self._lines(record, "stderr")) as told:
            async for line in told:
                mark, _, program = line.partition(" ")
                return program if mark == "mica-hash" else "none"
        return "none"

    async def _words(self, record: ExecRecord) -> str:
        """What the command wrote to stderr, its end."""
        text = b""
        async for piece in self._sessions.follow(record.vm_id, record.id, "stderr", 0):
            text = (text + piece)[-4096:]
        return text.decode(errors="replace").strip()


async def _pieces(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes, in pieces as large as the agent takes at once: each costs a conversation with it."""
    held = bytearray()
    async for data in stream:
        held += data
        while len(held) >= CHUNK:
            yield bytes(held[:CHUNK])
            del held[:CHUNK]
    if held:
        yield bytes(held)


def _packed(piece: bytes) -> bytes:
    """A member of a gzip file (RFC 1952); several, one after the other, are one file."""
    small = gzip.compress(piece, 1, mtime=0)
    return small if len(small) < len(piece) * WORTHWHILE else gzip.compress(piece, 0, mtime=0)


def _check_space(guest: str, dest: str, told: str, size: int) -> None:
    """Raises ``insufficient-disk``. ``told`` is the last line of ``df -Pk``; who cannot say is not asked."""
    numbers = re.search(r"\s(\d{1,15})\s+\d+\s+(\d{1,15})\s+\d+%", told)
    if numbers is None or not int(numbers[1]):
        return
    free = Bytes(int(numbers[2]) * KIB)
    if size > free:
        raise MicaError(
            Code.INSUFFICIENT_DISK,
            f"the copy needs {format_size(size)} in {dest} of {guest}, {format_size(free)} are free there",
            hint="free some there, or copy to another file system of the guest",
            details={"needed": size, "free": free},
        )


def _spec(script: str, *arguments: str, stdin: bool = False) -> ExecSpec:
    return ExecSpec(argv=("sh", "-c", script, "mica-cp", *arguments), stdin=stdin, env={COPY_MARK: "1"}, cwd="/")


def _check(record: ExecRecord, words: str) -> None:
    """Raises what went wrong in the guest."""
    if record.state is ExecState.EXITED and record.exit_code == 0:
        return
    if record.error is not None:
        raise MicaError.of(record.error)
    last = words.splitlines()[-1] if words else f"status {record.exit_code}"
    if record.exit_code == NO_SUCH:
        raise MicaError(Code.NOT_FOUND, last)
    if "No space left on device" in words:  # strerror(ENOSPC), also in busybox and on BSD
        raise MicaError(
            Code.INSUFFICIENT_DISK, f"the guest's disk is full: {last}", hint="free some there; nothing was copied"
        )
    raise MicaError(Code.COMMAND_FAILED, f"the guest could not copy: {last}", details={"exit_code": record.exit_code})
