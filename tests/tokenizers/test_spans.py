"""Spans by where each of them stops."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdflow.tokenizers.spans import spans_to
from tests.support.draw import quick

STOPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=20)


@quick
@given(sizes=STOPS)
def test_spans_are_the_slices_between_stops(sizes: list[tuple[int, int]]) -> None:
    ends = [[0], [0]]
    for size in sizes:
        for side, of_side in zip(ends, size, strict=True):
            side.append(side[-1] + of_side)
    expected = tuple(zip(*([slice(*both) for both in pairwise(side)] for side in ends), strict=True))
    assert spans_to(ends[0][1:], ends[1][1:]) == expected


def test_sides_have_as_many_stops() -> None:
    with pytest.raises(ValueError, match="zip"):
        spans_to([1, 2], [1])


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        spans_to(range(1, 100), range(1, 100))
        with pytest.raises(ValueError, match="zip"):
            spans_to([1], [])
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_many_responses_wake_the_collector_no_more_than_few() -> None:
    stops = list(range(1, 1001))
    spans_to(stops, stops)
    before = [generation["collections"] for generation in gc.get_stats()]
    for _ in range(50):
        spans_to(stops, stops)
    woken = [now["collections"] - then for now, then in zip(gc.get_stats(), before, strict=True)]
    assert sum(woken) < 25
