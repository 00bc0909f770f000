"""The runner's log: what has happened to each of its commands.

Lines, as :mod:`mica.guest.script` writes them (``i`` is the command's number, ``S`` is ``o`` or ``e``)::

    r PID           the runner is ready
    a i PID         the process of command i waits to be told what to do; PID is ``*`` in a guest without /proc
    s i             command i was started
    n i REASON      command i could not be started: program, cwd, user, setpriv
    g i S N         N segments of stream S are complete
    e i S N         stream S has ended after N segments
    w i S N         segment N of stream S could not be written: the guest's disk is full
    i i FILE        the command's stdin has taken all of FILE
    x i CODE        command i has ended

The guest writes it, so it is hostile input: bounded, and whatever is not one of these lines is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mica.model.errors import Code, MicaError

MAX_LINE = 256
MAX_SEGMENTS = 10**9

_STREAM_LINE = re.compile(rb"^([gew]) (\d{1,9}) ([oe]) (\d{1,9})$")
_OTHER_LINE = re.compile(rb"^([asnix]) (\d{1,9}) ?([A-Za-z0-9._*-]{0,64})$")
_READY_LINE = re.compile(rb"^r (\d{1,9})$")


@dataclass
class StreamEvents:
    """``complete`` segments cannot grow any more; ``ended`` is their final number."""

    complete: int = 0
    ended: int | None = None
    failed: bool = False


@dataclass
class CommandEvents:
    """What the log says of one command."""

    started: bool = False
    pid: int | None = None
    never_ran: str = ""
    exit_code: int | None = None
    out: StreamEvents = field(default_factory=StreamEvents)
    err: StreamEvents = field(default_factory=StreamEvents)
    stdin_taken: int = 0

    @property
    def over(self) -> bool:
        """It has ended and so have its streams: the runner waits for the next command."""
        return self.exit_code is not None and self.out.ended is not None and self.err.ended is not None


class RunnerLog:
    """Parses the log piece by piece and keeps the events of command ``sequence`` (set it before feeding)."""

    def __init__(self, guest: str) -> None:
        self._guest = guest
        self._rest = b""
        self.runner_pid: int | None = None
        self.sequence = 0
        self.events = CommandEvents()
        self._armed: tuple[int, int | None] = (0, None)

    def follow(self, sequence: int) -> CommandEvents:
        """From now on look for the events of this command."""
        self.sequence, self.events = sequence, CommandEvents()
        if self._armed[0] == sequence:
            self.events.pid = self._armed[1]
        return self.events

    def reset(self) -> None:
        """The log is read from its beginning again."""
        self._rest = b""
        self.events = self.follow(self.sequence)

    def feed(self, data: bytes) -> bool:
        """Take what was appended; true if there was anything. Raises ``agent-failed`` on what no runner writes."""
        if not data:
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise self._foreign(self._rest)
        for line in lines:
            self._line(line)
        return True

    def _line(self, line: bytes) -> None:
        if match := _READY_LINE.match(line):
            self.runner_pid = int(match[1])
        elif match := _STREAM_LINE.match(line):
            if int(match[2]) == self.sequence:
                self._stream(match[1], self.events.out if match[3] == b"o" else self.events.err, int(match[4]))
        elif match := _OTHER_LINE.match(line):
            if match[1] == b"a":
                self._armed = int(match[2]), int(match[3]) if match[3].isdigit() else None
            if int(match[2]) == self.sequence:
                self._other(match[1], match[3].decode("ascii"), line)
        else:
            raise self._foreign(line)

    def _stream(self, kind: bytes, stream: StreamEvents, count: int) -> None:
        if count < stream.complete and kind != b"w":
            raise self._foreign(kind + b" goes back")
        if kind == b"w":
            stream.failed = True
            stream.ended = count
            return
        stream.complete = count
        if kind == b"e":
            stream.ended = count

    def _other(self, kind: bytes, word: str, line: bytes) -> None:
        events = self.events
        if kind == b"a":
            events.pid = self._armed[1]
        elif kind == b"s":
            events.started = True
        elif kind == b"n":
            events.never_ran = word or "unknown"
        elif kind == b"i":
            events.stdin_taken += 1
        elif word.isdigit() and int(word) <= 255:
            events.exit_code = int(word)
        else:
            raise self._foreign(line)

    def _foreign(self, line: bytes) -> MicaError:
        return MicaError(
            Code.AGENT_FAILED,
            f"the log of the commands in {self._guest} has been tampered with: {line[:80]!r}",
            hint="somebody with root rights in the guest wrote into Mica's directory there",
        )
