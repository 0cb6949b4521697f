"""The seeded stream of samples, cut into optimizer steps before anything knows of ranks and micro-batches."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kdflow.contracts import KdflowError, Pair, Sample
from kdflow.data.sources import Sources
from kdflow.data.tokenization import Prepared


class Stream:
    """An endless order of ``size`` samples: epoch after epoch, each shuffled by ``seed`` and its number."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.epoch, self.index = 0, 0
        self._order = self._shuffled()

    def __next__(self) -> int:
        if self.index >= self.size:
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self._shuffled()
        drawn = int(self._order[self.index])
        self.index += 1
        return drawn

    def state(self) -> dict[str, int]:
        """Where the stream stands."""
        return {"epoch": self.epoch, "index": self.index}

    def restore(self, state: dict[str, int]) -> None:
        """Go to where :meth:`state` was taken."""
        self.epoch, self.index = state["epoch"], state["index"]
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.size)


@dataclass(frozen=True)
class Step:
    """The samples of one optimizer step, of all ranks together."""

    pairs: tuple[Pair, ...]

    @property
    def tokens(self) -> int:
        """The student's tokens, prompts included."""
        return sum(len(pair.student) for pair in self.pairs)

    @property
    def target_tokens(self) -> int:
        """The tokens that are learnt: what the sum of losses is divided by."""
        return sum(len(pair.student.targets) for pair in self.pairs)

    @property
    def digest(self) -> str:
        """A hash of the ids of the samples, in order."""
        return hashlib.sha256("\n".join(pair.id for pair in self.pairs).encode()).hexdigest()[:16]


class Steps:
    """Draws step after step, and accounts for every sample: drawn = trained + dropped."""

    def __init__(self, sources: Sources, tokenize: Callable[[Sample, str], Prepared], prepare: Callable[[Pair], Pair],
                 tokens_per_step: int, seed: int) -> None:  # fmt: skip
        self._sources, self._tokenize, self._prepare = sources, tokenize, prepare
        self._tokens_per_step = tokens_per_step
        self.stream = Stream(len(sources), seed)
        self.accounting: Counter[str] = Counter(drawn=0, trained=0, truncated=0)

    def draw(self) -> Step:
        """The shortest run of samples, from where the stream stands, that reaches ``tokens_per_step``.

        Raises:
            KdflowError: a whole epoch holds no sample that can be used.
        """
        pairs: list[Pair] = []
        tokens = unusable = 0
        while tokens < self._tokens_per_step:
            sample_id, sample = self._sources.sample(next(self.stream))
            prepared = self._tokenize(sample, sample_id)
            self.accounting["drawn"] += 1
            if prepared.pair is None:
                self.accounting[f"dropped: {prepared.dropped}"] += 1
                unusable += 1
                if unusable == 2 * len(self._sources):  # as many draws as are sure to hold a whole epoch
                    raise KdflowError(
                        f"no trainable tokens: all {len(self._sources)} samples of the training data were dropped "
                        f"({prepared.dropped}); raise data.max_length"
                    )
                continue
            unusable = 0
            pair = self._prepare(prepared.pair)
            self.accounting["trained"] += 1
            self.accounting["truncated"] += prepared.truncated
            tokens += len(pair.student)
            pairs.append(pair)
        return Step(tuple(pairs))

    def rehearse(self) -> None:
        """Draw a step and forget it, so that samples which cannot be used are told before the run begins."""
        before = self.state()
        self.draw()
        self.restore(before)

    def state(self) -> dict[str, dict[str, int]]:
        """For the checkpoint."""
        return {"stream": self.stream.state(), "accounting": dict(self.accounting)}

    def restore(self, state: dict[str, dict[str, int]]) -> None:
        """Go on from a checkpoint."""
        self.stream.restore(state["stream"])
        self.accounting = Counter(state["accounting"])
