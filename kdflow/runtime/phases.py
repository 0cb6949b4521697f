"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Phases:
    """Seconds that each of several phases took, as this process saw them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.seconds = dict.fromkeys(names, 0.0)
        self._within = 0.0  # of the blocks inside the one that is being timed

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block as part of phase ``name``, without the blocks of other phases in it."""
        started, before, self._within = time.perf_counter(), self._within, 0.0
        yield
        took = time.perf_counter() - started
        self.seconds[name] += took - self._within
        self._within = before + took
