"""Files in and out of guests: a tar stream through a command in the guest, checked against its SHA-256.

Into a guest, the stream is unpacked into a hidden directory beside where it belongs; only when the guest has said
which bytes it got, and they are ours, is it moved into place. Out of a guest, the last piece is held back until the
guest's checksum has agreed, so that whoever reads sees a broken stream instead of a wrong file. A copy that breaks off
leaves nothing behind. What streams, waits and survives is :mod:`mica.guest.exec`.

The guest needs ``sh``, ``tar``, ``mktemp``, ``mkfifo`` and ``tee``; ``sha256sum`` where the check is to happen there.
"""

from __future__ import annotations

import asyncio
import hashlib
import posixpath
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from mica.guest.guests import AgentGuests
from mica.guest.sessions import COPY_MARK, ExecSessions
from mica.model.errors import Code, MicaError, invalid
from mica.model.exec import ExecRecord, ExecSpec, ExecState
from mica.model.units import Bytes
from mica.model.vm import VmRuntime

# What a copy may pass through the host's disk while it is on its way out.
MAX_COPY = Bytes(1024**4)
NO_SUCH = 65

COPY_IN = r"""
d=$1
[ -d "$d" ] || { echo "there is no directory $d in the guest" >&2; exit 65; }
s=$(mktemp -d "$d/.mica-cp-XXXXXX") || exit 66
trap 'rm -rf "$s"' EXIT
trap 'exit 1' INT TERM HUP
mkdir "$s/new" && mkfifo "$s/h" || exit 66
if command -v sha256sum >/dev/null 2>&1; then
  sha256sum <"$s/h" >"$s/sum" &
else
  { cat >/dev/null; echo none >"$s/sum"; } <"$s/h" &
fi
h=$!
tee "$s/h" | { tar -C "$s/new" -xpf -; r=$?; cat >/dev/null; [ $r = 0 ]; } || exit 67
wait $h
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

COPY_OUT = r"""
cd "$1" 2>/dev/null && { [ -e "$2" ] || [ -h "$2" ]; } || { echo "there is no ${1%/}/$2 in the guest" >&2; exit 65; }
p=$(mktemp -d) || exit 66
trap 'rm -rf "$p"' EXIT
trap 'exit 1' INT TERM HUP
mkfifo "$p/h" || exit 66
if command -v sha256sum >/dev/null 2>&1; then
  sha256sum <"$p/h" >"$p/sum" &
else
  { cat >/dev/null; echo none >"$p/sum"; } <"$p/h" &
fi
h=$!
{ tar -cf - -- "$2"; echo $? >"$p/status"; } | tee "$p/h"
wait $h
cat "$p/sum" >&2
read -r r <"$p/status"
exit "$r"
"""


class CopySummary(msgspec.Struct, frozen=True):
    """What was copied in: bytes of the tar stream. ``checked`` is false where the guest has no ``sha256sum``."""

    bytes: Bytes
    sha256: str
    checked: bool


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
        self, vm_id: str, name: str, runtime: VmRuntime, dest: str, tar: AsyncIterator[bytes]
    ) -> CopySummary:
        """Unpack ``tar`` into the directory ``dest``. Nothing of it is there until all of it is.

        Raises ``not-found`` (no such directory), ``corrupt`` (the guest got something else), ``command-failed`` with
        tar's last words, and what :meth:`ExecSessions.start` raises.
        """
        spec = _spec(COPY_IN, absolute(dest), stdin=True)
        record = await self._sessions.start(vm_id, name, runtime, spec)
        digest, size = hashlib.sha256(), 0
        try:
            try:
                async for piece in tar:
                    digest.update(piece)
                    size += len(piece)
                    await self._sessions.stdin(vm_id, record.id, piece)
                await self._sessions.stdin(vm_id, record.id, None)
            except MicaError as error:
                if error.code is not Code.STATE_CONFLICT:
                    raise
                # The command ended before it had read everything: its own words say why.
            stage, seen = await self._told(record)
            if seen not in ("none", digest.hexdigest()):
                raise MicaError(Code.CORRUPT, "the guest got other bytes than were sent", retryable=True)
            agent = self._guests.agent(vm_id, name, runtime)
            await agent.file_close(await agent.file_open(f"{stage}/ok", "w"))
            _check(await self._sessions.wait(vm_id, record.id), await self._words(record))
        finally:
            await asyncio.shield(self._sessions.discard(vm_id, record.id))
        return CopySummary(Bytes(size), digest.hexdigest(), seen != "none")

    async def _told(self, record: ExecRecord) -> tuple[str, str]:
        """The staging directory and the checksum that the guest tells when it has everything."""
        text = b""
        async for piece in self._sessions.follow(record.vm_id, record.id, "stdout", 0):
            text += piece
            if b"\n" in text:
                stage, _, seen = text.decode(errors="replace").strip().rpartition(" ")
                return stage, seen
        _check(await self._sessions.wait(record.vm_id, record.id), await self._words(record))
        raise MicaError(Code.AGENT_FAILED, "the guest ended the copy without a word")

    async def copy_out(self, vm_id: str, name: str, runtime: VmRuntime, path: str) -> AsyncGenerator[bytes, None]:
        """A tar stream of ``path``, its last component being the name in it. Ends early by raising.

        Raises ``not-found``, ``corrupt`` before the last piece, ``command-failed``, and what a start raises.
        """
        directory, base = posixpath.split(absolute(path))
        spec = _spec(COPY_OUT, directory, base or ".")
        record = await self._sessions.start(vm_id, name, runtime, spec, max_output=MAX_COPY)
        digest, held = hashlib.sha256(), b""
        try:
            async for piece in self._sessions.follow(vm_id, record.id, "stdout", 0):
                digest.update(piece)
                if held:
                    yield held
                held = piece
            ended = await self._sessions.wait(vm_id, record.id)
            words = await self._words(record)
            _check(ended, words)
            seen = words.splitlines()[-1].split()[0] if words else ""
            if seen not in ("none", digest.hexdigest()):
                raise MicaError(Code.CORRUPT, "other bytes arrived than the guest sent", retryable=True)
            yield held
        finally:
            await asyncio.shield(self._sessions.discard(vm_id, record.id))

    async def _words(self, record: ExecRecord) -> str:
        """What the command wrote to stderr, its end."""
        text = b""
        async for piece in self._sessions.follow(record.vm_id, record.id, "stderr", 0):
            text = (text + piece)[-4096:]
        return text.decode(errors="replace").strip()


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
    raise MicaError(Code.COMMAND_FAILED, f"the guest could not copy: {last}", details={"exit_code": record.exit_code})
