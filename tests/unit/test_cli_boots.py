"""What people see, and may say, of images that were booted once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mica.daemon.settings import default_boot_space, default_warm, load
from mica.model.errors import MicaError
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import BootedView, VmCreate
from mica.model.vm import VmSpec
from tests.unit.client_fixtures import Served, mica, served

replace = msgspec.structs.replace


@pytest.fixture
def api() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.mark.parametrize("cold", [True, False])
def test_run_says_whether_it_insists_on_a_boot(api: Served, cold: bool) -> None:
    assert mica("run", "micro", *(["--cold"] if cold else []), url=api.url).status in (0, 16)
    (created,) = [params for verb, _, params, *_ in api.engine.submitted if verb == "vm.create"]
    assert isinstance(created, VmCreate)
    assert created.cold is cold


def test_states_are_shown_with_their_image(api: Served) -> None:
    assert mica("image", "build", "micro", url=api.url).status == 0
    assert "BOOTED" in mica("image", "list", url=api.url).out.splitlines()[0]
    view = api.engine.kept_images["micro"]
    states = tuple(
        BootedView(id=str(n), spec=VmSpec(cpus=n), size=Bytes(60 * MIB), created_at=1.0, used_at=used)
        for n, used in ((1, None), (2, 5.0))
    )
    api.engine.kept_images["micro"] = replace(view, booted=states)
    (line,) = [line for line in mica("image", "list", url=api.url).out.splitlines() if line.startswith("micro")]
    assert "120 MiB" in line
    shown = mica("image", "show", "micro", url=api.url).out
    assert "q35, 1 vCPU, 256 MiB: 60 MiB, not used yet" in shown
    assert "q35, 2 vCPUs, 256 MiB: 60 MiB, used " in shown


def test_the_host_says_what_they_take() -> None:
    with served() as api:
        assert "booted once" in mica("host", "show", url=api.url).out


def test_settings_of_it(tmp_path: Path) -> None:
    plain = load({"home": str(tmp_path)}, {}, 1000)
    assert (plain.boot_once, plain.boot_space) == (True, None)
    (tmp_path / "config.toml").write_text('boot_once = false\nboot_space = "1GiB"\n')
    changed = load({"home": str(tmp_path)}, {}, 1000)
    assert (changed.boot_once, changed.boot_space) == (False, GIB)
    with pytest.raises(MicaError) as caught:
        load({"home": str(tmp_path)}, {"MICA_BOOT_ONCE": "perhaps"}, 1000)
    assert caught.value.hint == "true or false"
    assert (default_boot_space(20 * GIB), default_boot_space(1000 * GIB)) == (2 * GIB, 8 * GIB)
    assert (default_warm(4 * GIB), default_warm(64 * GIB)) == (256 * MIB, GIB)
