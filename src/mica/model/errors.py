"""Errors: one class, one table.

A :class:`MicaError` carries what a person may read: a code from the table below, a sentence that names the thing and
the limit, and a hint that names the way out. Internals travel only through ``raise … from``. The table maps a code to
its HTTP status (RFC 9110), its exit status on the command line, and its title; ``docs/reference/errors.md`` has one
section for each code, and a test fails when one is missing.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple

import msgspec


class Code(StrEnum):
    """What went wrong, as a stable word that programs may test."""

    INVALID = "invalid"
    NOT_FOUND = "not-found"
    EXISTS = "exists"
    STATE_CONFLICT = "state-conflict"
    GENERATION_CONFLICT = "generation-conflict"
    IN_USE = "in-use"
    PROTECTED = "protected"
    BUSY = "busy"
    INSUFFICIENT_MEMORY = "insufficient-memory"
    INSUFFICIENT_CPU = "insufficient-cpu"
    INSUFFICIENT_DISK = "insufficient-disk"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    AGENT_UNAVAILABLE = "agent-unavailable"
    AGENT_FAILED = "agent-failed"
    TIMEOUT = "timeout"
    HOST_LACKS = "host-lacks"
    QEMU_FAILED = "qemu-failed"
    COMMAND_FAILED = "command-failed"
    CORRUPT = "corrupt"
    HOME_LOCKED = "home-locked"
    HOME_NEWER = "home-newer"
    CANCELLED = "cancelled"
    STUCK = "stuck"
    GONE = "gone"
    TOO_LARGE = "too-large"
    DAEMON_UNREACHABLE = "daemon-unreachable"
    INTERNAL = "internal"


class CodeInfo(NamedTuple):
    """How one code shows itself outside."""

    http_status: int
    exit_status: int
    title: str


# Exit statuses 1 and 2 are left to "other failure" and "wrong usage"; 64 and above to `mica run` and `mica vm exec`,
# which pass the guest command's own status through.
TABLE: dict[Code, CodeInfo] = {
    Code.INVALID: CodeInfo(400, 3, "The request is not valid"),
    Code.NOT_FOUND: CodeInfo(404, 4, "There is no such thing"),
    Code.EXISTS: CodeInfo(409, 5, "That name is taken"),
    Code.STATE_CONFLICT: CodeInfo(409, 6, "Not possible in the present state"),
    Code.GENERATION_CONFLICT: CodeInfo(412, 7, "It changed in the meantime"),
    Code.IN_USE: CodeInfo(409, 8, "Something still uses it"),
    Code.PROTECTED: CodeInfo(409, 9, "It is protected"),
    Code.BUSY: CodeInfo(503, 10, "Too much is waiting already"),
    Code.INSUFFICIENT_MEMORY: CodeInfo(507, 11, "Not enough memory"),
    Code.INSUFFICIENT_CPU: CodeInfo(507, 12, "Not enough processors"),
    Code.INSUFFICIENT_DISK: CodeInfo(507, 13, "Not enough disk space"),
    Code.UNAUTHENTICATED: CodeInfo(401, 14, "Not signed in"),
    Code.FORBIDDEN: CodeInfo(403, 15, "Not allowed"),
    Code.AGENT_UNAVAILABLE: CodeInfo(409, 16, "The guest agent does not answer"),
    Code.AGENT_FAILED: CodeInfo(502, 17, "The guest agent failed"),
    Code.TIMEOUT: CodeInfo(504, 18, "It took too long"),
    Code.HOST_LACKS: CodeInfo(424, 19, "The host lacks something"),
    Code.QEMU_FAILED: CodeInfo(502, 20, "QEMU failed"),
    Code.COMMAND_FAILED: CodeInfo(502, 21, "A program on the host failed"),
    Code.CORRUPT: CodeInfo(422, 22, "The data is damaged"),
    Code.HOME_LOCKED: CodeInfo(423, 23, "Another daemon owns this MICA_HOME"),
    Code.HOME_NEWER: CodeInfo(409, 24, "Written by a newer Mica"),
    Code.CANCELLED: CodeInfo(409, 25, "It was cancelled"),
    Code.STUCK: CodeInfo(409, 26, "It needs an operator"),
    Code.GONE: CodeInfo(410, 27, "No longer kept"),
    Code.TOO_LARGE: CodeInfo(413, 28, "Too large"),
    Code.DAEMON_UNREACHABLE: CodeInfo(503, 29, "The daemon does not answer"),
    Code.INTERNAL: CodeInfo(500, 30, "A fault in Mica"),
}


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """A :class:`MicaError` as data: what is stored with an operation and sent over the wire."""

    code: Code
    message: str
    hint: str = ""
    retryable: bool = False
    details: dict[str, Any] = {}


class MicaError(Exception):
    """What went wrong and what to do next, for people.

    ``message`` names the thing and the limit; ``hint`` names the way out (a command where there is one); ``details``
    holds the numbers behind the sentence, JSON-serialisable, for programs. ``retryable`` says that the same request
    may succeed later without any change.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        hint: str = "",
        retryable: bool = False,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.retryable = retryable
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    @property
    def info(self) -> CodeInfo:
        return TABLE[self.code]

    def problem(self) -> Problem:
        return Problem(self.code, self.message, self.hint, self.retryable, self.details)

    @classmethod
    def of(cls, problem: Problem) -> MicaError:
        return cls(
            problem.code, problem.message, hint=problem.hint, retryable=problem.retryable, details=problem.details
        )


def invalid(message: str, *, hint: str = "", **details: Any) -> MicaError:
    return MicaError(Code.INVALID, message, hint=hint, details=details)


def not_found(noun: str, key: str, *, hint: str = "") -> MicaError:
    return MicaError(Code.NOT_FOUND, f"there is no {noun} {key!r}", hint=hint, details={"noun": noun, "key": key})
