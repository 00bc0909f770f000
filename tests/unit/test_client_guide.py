"""The examples of ``docs/guides/python.md`` run, one after the other as they stand there."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mica.model.exec import ExecView
from mica.model.operation import Actor
from mica.model.views import VmView
from mica.model.vm import AgentState, VmState
from tests.unit.client_fixtures import Engine, Served, served

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "python.md"


class Guests(Engine):
    """Agents answer at once, and every program but ``cat`` prints the same and succeeds."""

    async def _put(self, view: VmView) -> VmView:
        running = view.observed.state is VmState.RUNNING
        agent = AgentState.READY if running else AgentState.WAITING
        return await super()._put(
            msgspec.structs.replace(view, observed=msgspec.structs.replace(view.observed, agent=agent))
        )

    async def _begin(self, record: ExecView) -> None:
        if record.spec.argv[0] == "test":
            await self.end(record.id, 1)
        elif record.spec.argv[0] != "cat":
            await self.say(record.id, "stdout", b"6.1.0\n")
            await self.end(record.id, 0)

    async def copy_in(
        self, vm: str, dest: str, tar: AsyncIterator[bytes], *, by: Actor, size: int = 0
    ) -> dict[str, object]:
        self.kept = [piece async for piece in tar]
        return {}

    async def copy_out(self, vm: str, path: str, *, by: Actor) -> AsyncIterator[bytes]:
        for piece in self.kept:
            yield piece


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with served(Guests) as running:
        monkeypatch.setenv("MICA_URL", running.url)
        yield running


async def test_the_examples_run(
    api: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 8
    names: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, str(GUIDE), "exec"), names)
        await names["main"]()
        assert api.engine.machines == {}, example
    assert "6.1.0" in capsys.readouterr().out
