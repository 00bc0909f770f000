"""Which directories a daemon takes as its MICA_HOME, and what it says of others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mica.daemon.home import owned
from mica.daemon.settings import Settings, load
from mica.model.errors import Code, MicaError

as_root = os.geteuid() == 0


def settings(home: Path, tmp_path: Path, *, uid: int | None = None) -> Settings:
    return load({"home": str(home)}, {"XDG_RUNTIME_DIR": str(tmp_path / "run")}, uid)


def refusal(home: Path, tmp_path: Path, *, uid: int | None = None) -> MicaError:
    with pytest.raises(MicaError) as caught, owned(settings(home, tmp_path, uid=uid)):
        pass
    assert str(home) in caught.value.message or repr(str(home)) in caught.value.message
    assert "MICA_HOME" in str(caught.value)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("name", ['quoted "home"', "two\nlines", "a\tb"])
def test_a_name_that_apt_cannot_be_told(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name, tmp_path).code is Code.INVALID
    assert not (tmp_path / name).exists()


def test_what_is_no_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert refusal(file, tmp_path).code is Code.INVALID
    assert refusal(file / "below", tmp_path).code is Code.INVALID
    assert refusal(Path("/proc/nowhere"), tmp_path).code is Code.INVALID


def test_the_home_of_somebody_else(tmp_path: Path) -> None:
    error = refusal(tmp_path, tmp_path, uid=os.geteuid() + 1)
    assert error.code is Code.FORBIDDEN
    assert f"belongs to user {os.geteuid()}" in error.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(as_root, reason="root may write everywhere")
def test_a_home_that_may_not_be_written(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    assert refusal(home, tmp_path).code is Code.FORBIDDEN


def test_a_settings_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(MicaError, match=r"config\.toml cannot be read: Is a directory"):
        settings(tmp_path, tmp_path)
