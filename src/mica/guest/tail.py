"""A growing file in the guest, read by offset: losing the handle, or an answer, loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mica.guest.agent import AgentRefusedError, GuestAgent, Request
from mica.model.units import KIB

MIN_READ = 16 * KIB
MAX_READ = 256 * KIB


class Tail:
    """Reads ``path`` from ``offset`` on. Ask with :meth:`request`, look at the answer, then :meth:`advance`.

    Reads are never shorter than the agent's buffer, so the agent holds nothing back from one to the next.
    """

    def __init__(self, agent: GuestAgent, path: str, offset: int = 0) -> None:
        self.path = path
        self.offset = offset
        self._agent = agent
        self._handle: int | None = None
        self._stale: list[int] = []
        self._count = MIN_READ

    @property
    def open(self) -> bool:
        return self._handle is not None

    @property
    def handle(self) -> int | None:
        return self._handle

    @property
    def full(self) -> bool:
        """The last read brought all that it asked for: there is probably more."""
        return self._count > MIN_READ

    def request(self) -> Request[Any]:
        assert self._handle is not None
        return self._agent.read_request(self._handle, self._count)

    def look(self, answer: Any) -> tuple[bytes, bool]:
        """Bytes and whether the end was reached. Nothing is taken before :meth:`advance`."""
        if isinstance(answer, AgentRefusedError):
            if not answer.lost_handle:
                raise answer
            self.forget()
            return b"", False
        self._agent.check_read(answer, self._count)
        return answer.buf_b64, answer.eof

    def advance(self, count: int) -> None:
        """That many bytes are safe."""
        self.offset += count
        self._count = min(self._count * 2, MAX_READ) if count == self._count else MIN_READ

    def drop(self) -> None:
        """The next read begins at ``offset`` whatever the agent thinks; its handle is closed then."""
        if self._handle is not None:
            self._stale.append(self._handle)
            self._handle = None
        self._count = MIN_READ

    def forget(self) -> None:
        """The agent has forgotten its handles."""
        self._handle = None
        self._stale.clear()
        self._count = MIN_READ

    def leftovers(self) -> list[int]:
        """Handles to give back to the agent when nothing is read any more."""
        self.drop()
        stale, self._stale = self._stale, []
        return stale


async def open_tails(agent: GuestAgent, tails: Sequence[Tail]) -> bool:
    """Open those that are not; false where one does not exist (then none was opened). Raises ``agent-failed``."""
    missing = [tail for tail in tails if not tail.open]
    if not missing:
        return True
    closing = [handle for tail in missing for handle in tail.leftovers()]
    answers = await agent.batch(
        [*(agent.open_request(tail.path) for tail in missing), *(agent.close_request(handle) for handle in closing)]
    )
    opened = answers[: len(missing)]
    refusals = [answer for answer in opened if isinstance(answer, AgentRefusedError)]
    handles = [answer for answer in opened if not isinstance(answer, AgentRefusedError)]
    seeks = [
        agent.seek_request(handle, tail.offset)
        for tail, handle in zip(missing, opened, strict=True)
        if tail.offset and not isinstance(handle, AgentRefusedError)
    ]
    if refusals:
        if handles:
            await agent.batch([agent.close_request(handle) for handle in handles])
        if refusals[0].absent_file:
            return False
        raise await agent.explain(refusals[0]) from refusals[0]
    if seeks:
        for answer in await agent.batch(seeks):
            if isinstance(answer, AgentRefusedError):
                raise answer
    for tail, handle in zip(missing, handles, strict=True):
        tail._handle = handle  # noqa: SLF001 - the other half of Tail
    return True
