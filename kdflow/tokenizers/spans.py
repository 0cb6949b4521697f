"""Spans as pairs of slices, many of them at once without waking Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Most spans hold one token: their slices are made once a process. New slices, which the collector counts and follows,
# would have it go through all vocabularies in memory every few hundred responses: two thirds of the time.
_ones: list[slice] = []


def spans_to(student: Sequence[int], teacher: Sequence[int]) -> tuple[tuple[slice, slice], ...]:
    """Spans that follow one another, by the index at which each stops on either side; as many as there are stops."""
    global _ones
    longest = max((*student[-1:], *teacher[-1:]), default=0)
    with _collector_paused():
        if len(_ones) < longest:
            _ones = [slice(index, index + 1) for index in range(2 * longest)]
        ones = _ones  # of this size, whatever another thread does
        sides = (
            [
                ones[start] if stop - start == 1 else slice(start, stop)
                for start, stop in zip([0, *stops], stops, strict=False)
            ]
            for stops in (student, teacher)
        )
        return tuple(zip(*sides, strict=True))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Nothing that is made inside is garbage; in a long response the collector would go over it again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
