"""Sizes and durations as people write them."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mica.model.errors import Code, MicaError
from mica.model.units import GIB, KIB, MIB, format_duration, format_size, parse_duration, parse_size

TIB = 1024 * GIB


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("1k", KIB),
        ("1K", KIB),
        ("1KiB", KIB),
        ("1kb", 1000),
        ("512M", 512 * MIB),
        ("512 MiB", 512 * MIB),
        (" 512m ", 512 * MIB),
        ("1000MB", 10**9),
        ("2G", 2 * GIB),
        ("2GiB", 2 * GIB),
        ("2GB", 2 * 10**9),
        ("1.5G", 3 * GIB // 2),
        ("1T", TIB),
        ("1Ti", TIB),
        ("1TB", 10**12),
        (4096, 4096),
    ],
)
def test_sizes_that_people_write(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1X", "1 2", "1.M", ".5G", "1e9", "1,5G", "0x10", "1GG", "inf"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(MicaError) as caught:
        parse_size(text)
    assert caught.value.code is Code.INVALID
    assert repr(text) in caught.value.message
    assert "512M" in caught.value.hint


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (256 * MIB, "256 MiB"),
        (1610612736, "1.5 GiB"),
        (TIB, "1 TiB"),
        (5000 * TIB, "5000 TiB"),
    ],
)
def test_sizes_that_mica_prints(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 2**60))
def test_a_printed_size_is_read_back_within_its_last_digit(size: int) -> None:
    unit = next(unit for unit in (TIB, GIB, MIB, KIB, 1) if size >= unit or unit == 1)
    assert abs(parse_size(format_size(size)) - size) <= max(unit * 0.05 + 1, 2**-50 * size)


@given(st.integers(0, 1023), st.sampled_from([("B", 1), ("KiB", KIB), ("MiB", MIB), ("GiB", GIB), ("TiB", TIB)]))
def test_whole_sizes_are_read_back_exactly(number: int, unit: tuple[str, int]) -> None:
    assert parse_size(f"{number}{unit[0]}") == number * unit[1]
    assert parse_size(format_size(number * unit[1])) == number * unit[1]


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_invalid(text: str) -> None:
    size: int | None = None
    with contextlib.suppress(MicaError):
        size = parse_size(text)
    assert size is None or size >= 0


def test_an_endless_number_is_no_size() -> None:
    with pytest.raises(MicaError):
        parse_size("9" * 400)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("90s", 90),
        ("250ms", 0.25),
        ("5m", 300),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("7d", 604800),
        ("1w", 604800),
        ("1.5h", 5400),
        (12, 12),
        (0.5, 0.5),
    ],
)
def test_durations_that_people_write(text: str | float, seconds: float) -> None:
    assert math.isclose(parse_duration(text), seconds)


@pytest.mark.parametrize("text", ["", "s", "1x", "5 minutes", "1h30", "h1", "1,5h", "--"])
def test_what_is_no_duration_is_named(text: str) -> None:
    with pytest.raises(MicaError) as caught:
        parse_duration(text)
    assert caught.value.code is Code.INVALID
    assert "1h30m" in caught.value.hint


@pytest.mark.parametrize("text", ["nan", "inf", "-5", "1_000", "1e5"])
def test_what_only_python_calls_a_number_is_no_duration(text: str) -> None:
    with pytest.raises(MicaError):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (3.14, "3.1s"), (10, "10s"), (59.9, "59s"), (60, "1m"), (5400, "1h30m"), (90061, "1d1h")],
)
def test_durations_that_mica_prints(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(10, 10**8))
def test_a_printed_duration_is_read_back_within_its_second_unit(seconds: int) -> None:
    back = parse_duration(format_duration(seconds))
    unit = next(unit for limit, unit in ((86400, 3600), (3600, 60), (0, 1)) if seconds >= limit)
    assert 0 <= seconds - back < unit
