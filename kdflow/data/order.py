"""The seeded order in which samples are drawn, endless, and resumed anywhere."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

import numpy as np

from kdflow.contracts import KdflowError
from kdflow.data.samples import SampleStream
from kdflow.data.tokenization import Prepared

WINDOW = 2000  # samples of a stream that are held and shuffled at a time
_PATIENCE = 5.0  # seconds, at the end of a run, for the sample that is being read ahead


class Samples(Protocol):
    """Prepared samples by number; an epoch holds each ``weight`` times."""

    weight: float

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Prepared: ...


class Order(Protocol):
    """An endless order of samples."""

    @property
    def epoch(self) -> int:
        """From 0."""
        ...

    def __next__(self) -> Prepared: ...
    def state(self) -> dict[str, Any]:
        """Where it stands."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where :meth:`state` was taken."""
        ...

    def close(self) -> None:
        """Read no further."""
        ...


class Shuffled:
    """Stored samples, epoch after epoch, each shuffled as a whole by ``seed`` and its number."""

    def __init__(self, sources: Sequence[Samples], seed: int) -> None:
        self._sources, self._seed = sources, seed
        self._starts = np.cumsum([0, *(len(source) for source in sources)])
        self.epoch, self.index = 0, 0
        self._order = self.shuffled(0)

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self._order)

    def __next__(self) -> Prepared:
        if self.index >= len(self._order):
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self.shuffled(self.epoch)
        number = int(self._order[self.index])
        self.index += 1
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._sources[source][number - int(self._starts[source])]

    def shuffled(self, epoch: int) -> np.ndarray:
        """Numbers of an epoch's samples, counted through all sources; int64."""
        generator = np.random.default_rng([self._seed, epoch])
        numbers = [
            start + _repeated(len(source), source.weight, generator)
            for start, source in zip(self._starts, self._sources, strict=False)
        ]
        whole = np.concatenate(numbers)
        return whole[generator.permutation(len(whole))]

    def close(self) -> None:
        """Nothing is read ahead."""

    def state(self) -> dict[str, Any]:
        """Where it stands."""
        return {"epoch": self.epoch, "index": self.index}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where :meth:`state` was taken.

        Raises:
            KdflowError: it is that of streams.
        """
        if "streams" in state:
            raise KdflowError("data.train was streamed, and is not: give streaming: true back, or another output")
        self.epoch, self.index = state["epoch"], state["index"]
        self._order = self.shuffled(self.epoch)


def _repeated(size: int, weight: float, generator: np.random.Generator) -> np.ndarray:
    """Each of ``size`` numbers as often as ``weight`` says; of a fraction, which ones is drawn anew each epoch."""
    times, rest = divmod(max(1, round(weight * size)), size)
    numbers = np.tile(np.arange(size), times)
    return np.concatenate([numbers, generator.permutation(size)[:rest]]) if rest else numbers


class Streamed:
    """Samples of streams in proportion to their weights, each stream shuffled a window of 2,000 samples at a time.

    Only the window's start is kept in a checkpoint: it is read again on resume, which gives the same order.
    """

    def __init__(self, sources: Sequence[SampleStream], seed: int) -> None:
        self._streams = [_Window(source, seed, number) for number, source in enumerate(sources)]
        weights = np.array([source.weight for source in sources])
        self._shares = weights / weights.sum()
        self._taken = np.zeros(len(sources), np.int64)

    @property
    def epoch(self) -> int:
        """How often the stream that ended least often has ended."""
        return min(stream.epoch for stream in self._streams)

    def __next__(self) -> Prepared:
        behind = int(np.argmax(self._shares * (self._taken.sum() + 1) - self._taken))
        self._taken[behind] += 1
        return next(self._streams[behind])

    def close(self) -> None:
        """Read no further: what is read ahead is of no use any more."""
        for stream in self._streams:
            stream.close()

    def state(self) -> dict[str, Any]:
        """Where it stands."""
        return {"taken": self._taken.tolist(), "streams": [stream.state() for stream in self._streams]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where :meth:`state` was taken.

        Raises:
            KdflowError: it is that of stored samples, or of more or fewer streams.
        """
        if "streams" not in state:
            raise KdflowError("data.train was not streamed, and is: take streaming: true out, or give another output")
        if (before := len(state["streams"])) != (now := len(self._streams)):
            raise KdflowError(
                f"data.train had {before} streams, and has {now}: give them back as they were, or another output"
            )
        self._taken[:] = state["taken"]
        for stream, its in zip(self._streams, state["streams"], strict=True):
            stream.restore(its)


class _Window:
    """One stream, its current window shuffled; the next one is read beside the work, from this one's middle on."""

    def __init__(self, source: SampleStream, seed: int, number: int) -> None:
        self._source, self._seed = source, [seed, number]
        self._closed = False
        self.restore({"epoch": 0, "start": 0, "index": 0})

    def restore(self, state: dict[str, int]) -> None:
        self.epoch, self._start, self._index = state["epoch"], state["start"], state["index"]
        self._rest: Iterator[Prepared] | None = None
        self._held: list[Prepared] = []
        self._following: Future[list[Prepared]] | None = None

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "start": self._start, "index": self._index}

    def __next__(self) -> Prepared:
        if self._rest is None:
            self._rest = self._source.read(self._start)
            self._fill()
        if self._held and self._index >= len(self._held):  # beyond it where a stream is shorter than it was
            self._start, self._index = self._start + len(self._held), 0
            self._fill()
        if not self._held:
            if self._start == 0:
                raise KdflowError(f"{self._source.name}: the data file is empty")
            self.restore({"epoch": self.epoch + 1, "start": 0, "index": 0})
            return next(self)
        self._index += 1
        if self._index >= len(self._held) // 2 and self._following is None:
            self._following = self._read()
        return self._held[self._index - 1]

    def _read(self) -> Future[list[Prepared]]:
        """The next window, unshuffled; by a thread, for which nobody waits at the end: a hub may never answer it."""
        rest, window = self._rest, Future[list[Prepared]]()
        assert rest is not None

        def read() -> None:
            try:
                window.set_result(list(itertools.takewhile(lambda _: not self._closed, itertools.islice(rest, WINDOW))))
            except BaseException as error:
                window.set_exception(error)

        threading.Thread(target=read, name="kdflow-stream", daemon=True).start()
        return window

    def close(self) -> None:
        """Read no further."""
        self._closed = True
        if self._following is not None:
            wait([self._following], timeout=_PATIENCE)

    def _fill(self) -> None:
        window, self._following = (self._following or self._read()).result(), None
        order = np.random.default_rng([*self._seed, self.epoch, self._start]).permutation(len(window))
        self._held = [window[number] for number in order]
