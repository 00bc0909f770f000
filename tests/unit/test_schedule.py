"""What a schedule keeps, and when it is due."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mica.model.errors import MicaError
from mica.model.schedule import Keep, Schedule, Taken, check_every, expired, format_keep, kept, parse_keep

DAY = 86400.0
# A Monday, 00:00 UTC.
MONDAY = 1_767_571_200.0

units = st.permutations("mhdw").flatmap(lambda order: st.integers(1, 4).map(lambda n: order[:n]))
rules = units.flatmap(lambda us: st.tuples(*[st.builds(Keep, st.integers(1, 8), st.just(unit)) for unit in us]))
moments = st.lists(st.floats(0, 90 * DAY), max_size=60).map(
    lambda offsets: {f"s{n}": MONDAY + offset for n, offset in enumerate(offsets)}
)
taken = st.lists(st.builds(Taken, st.floats(0, 90 * DAY), st.booleans(), st.booleans()), max_size=40).map(
    lambda all_: {f"s{n}": one for n, one in enumerate(all_)}
)


def hours(*at: float) -> dict[str, float]:
    return {f"{hour:g}": MONDAY + hour * 3600 for hour in at}


def test_the_last_of_each_span_is_kept() -> None:
    assert kept(hours(0, 0.5, 1, 1.9, 2.5), parse_keep("2h")) == {"1.9", "2.5"}
    assert kept(hours(0, 23, 24, 47, 49), parse_keep("2d")) == {"47", "49"}
    sunday, monday = 7 * 24 - 1, 7 * 24
    assert kept(hours(0, sunday, monday), parse_keep("2w")) == {str(sunday), str(monday)}
    assert kept(hours(0, sunday), parse_keep("2w")) == {str(sunday)}


def test_only_spans_with_snapshots_count() -> None:
    assert kept(hours(0, 1, 500), parse_keep("3h")) == {"0", "1", "500"}


def test_a_year_of_hours_comes_to_what_was_asked_for() -> None:
    # Of the 7 days one is among the 24 hours already; of the 4 weeks one is, and one among the days.
    assert len(kept(hours(*range(24 * 365)), parse_keep("24h,7d,4w"))) == 24 + 6 + 2


@given(moments, rules)
def test_no_more_are_kept_than_the_rules_say_and_the_newest_is(all_: dict[str, float], rules: tuple[Keep, ...]) -> None:
    chosen = kept(all_, rules)
    assert chosen <= all_.keys()
    assert len(chosen) <= sum(rule.count for rule in rules)
    if all_:
        assert max(all_.values()) in {all_[id_] for id_ in chosen}


@given(moments, rules)
def test_each_of_the_last_spans_keeps_one(all_: dict[str, float], rules: tuple[Keep, ...]) -> None:
    chosen = kept(all_, rules)
    for rule in rules:
        spans = sorted({rule.span(at) for at in all_.values()})[-rule.count :]
        assert {rule.span(all_[id_]) for id_ in chosen} >= set(spans)


@given(moments, rules)
def test_taking_away_again_and_again_leaves_what_taking_away_once_leaves(
    all_: dict[str, float], rules: tuple[Keep, ...]
) -> None:
    there: dict[str, float] = {}
    for id_ in sorted(all_, key=lambda id_: (all_[id_], id_)):
        there[id_] = all_[id_]
        there = {id_: there[id_] for id_ in kept(there, rules)}
    assert there.keys() == kept(all_, rules)


@given(taken, rules)
def test_neither_protected_ones_go_nor_the_last_good_one(all_: dict[str, Taken], rules: tuple[Keep, ...]) -> None:
    gone = expired(all_, rules)
    left = all_.keys() - gone
    assert not {id_ for id_, one in all_.items() if one.protected} & gone
    good = {id_: one.at for id_, one in all_.items() if one.good}
    assert kept(good, rules) <= left, "a damaged one takes no good one's place"
    assert expired({id_: all_[id_] for id_ in left}, rules) == set()


@given(st.floats(0, 1000 * DAY), st.floats(60, 40 * DAY))
def test_what_was_missed_is_due_once(passed: float, every_s: float) -> None:
    schedule = Schedule(id="x", every_s=every_s, keep=(), created_at=MONDAY, created_by="me")
    now = MONDAY + passed
    due, following = schedule.due(now), schedule.following(now)
    assert due <= now + 1e-3
    assert following - due == pytest.approx(every_s, rel=1e-6)
    assert due >= MONDAY


def test_a_rule_is_read_and_written() -> None:
    assert format_keep(parse_keep("24h, 7d,4w")) == "24h,7d,4w"
    for wrong in ("", "h", "0h", "24", "24h,", "24h,3h", "501d", "1y", "-1h", "24H"):
        with pytest.raises(MicaError) as caught:
            parse_keep(wrong)
        assert caught.value.hint
    for every_s in (0.0, 59.0, 400 * DAY, float("nan")):
        with pytest.raises(MicaError):
            check_every(every_s)


def test_a_label_covers_those_that_have_it() -> None:
    def of(**how: str) -> Schedule:
        return Schedule(id="x", every_s=60, keep=(), created_at=0, created_by="me", **how)  # type: ignore[arg-type]

    assert of(vm_id="a").covers("a", {})
    assert not of(vm_id="a").covers("b", {})
    assert of(label="web").covers("b", {"web": "1"})
    assert of(label="web", value="1").covers("b", {"web": "1"})
    assert not of(label="web", value="2").covers("b", {"web": "1"})
    assert not of(label="web").covers("b", {})
