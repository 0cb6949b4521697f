"""The order of samples, cut into optimizer steps before anything knows of ranks and micro-batches."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdflow.config import RunConfig
from kdflow.contracts import KdflowError, Pair
from kdflow.data.order import Order, Shuffled, Streamed
from kdflow.data.samples import open_streams, open_tables
from kdflow.data.tokenization import PairTokenizer, Prepared
from kdflow.plugins import Plugins


@dataclass(frozen=True)
class Step:
    """The samples of one optimizer step, of all ranks together.

    Attributes:
        pairs: in the order in which they were drawn.
        on_policy: numbers of those whose responses the student is to write itself.
        epoch: how often the data had been gone through.
        state: from which a run goes on after this step.
    """

    pairs: tuple[Pair, ...]
    on_policy: frozenset[int] = frozenset()
    epoch: int = 0
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def aligned(self) -> dict[str, float]:
        """Shares of the student's target tokens that are aligned one-to-one, in longer spans, or not at all.

        It is empty where nothing is aligned.
        """
        found: Counter[str] = Counter()
        for pair in self.pairs:
            if pair.alignment is not None:
                found.update(pair.alignment.shares())
        return {f"aligned_{name}": count / found.total() for name, count in found.items()}

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
    """Draws step after step, and accounts for every sample: drawn = trained + dropped.

    Args:
        order: where samples come from.
        tokens_per_step: of the student, prompts included, over all ranks.
        samples: how many are drawn in all; None is no end.
        stop_on_problem: whether a record that cannot be used ends the run, or is dropped and listed in ``skipped``.
        fraction: share of the samples whose responses the student is to write itself.
        seed: draws these.

    Attributes:
        records: hashes of stored sources, by their names.
        chat: whether there are conversations among the samples; of a stream, as its first one is.
    """

    def __init__(self, order: Order, tokens_per_step: int, samples: int | None = None, stop_on_problem: bool = True,
                 fraction: float = 0.0, seed: int = 0) -> None:  # fmt: skip
        self._order, self._tokens_per_step = order, tokens_per_step
        self._samples = math.inf if samples is None else samples
        self._stop_on_problem, self._fraction, self._seed = stop_on_problem, fraction, seed
        self.accounting: Counter[str] = Counter(drawn=0, trained=0, truncated=0)
        self.skipped: dict[str, str] = {}
        self.records: dict[str, str] = {}
        self.chat = False

    def draw(self) -> Step:
        """The shortest run of samples, from where the order stands, that reaches ``tokens_per_step``, or the last ones.

        Raises:
            KdflowError: a whole epoch holds no sample that can be used.
        """
        pairs: list[Pair] = []
        on_policy: set[int] = set()
        tokens, useful, left_out = 0, self._order.epoch, 0
        while tokens < self._tokens_per_step and self.accounting["drawn"] < self._samples:
            prepared = next(self._order)
            self.accounting["drawn"] += 1
            if prepared.pair is None:
                self._drop(prepared)
                if self._order.epoch == useful + 2:  # a whole epoch lies between
                    raise KdflowError(nothing_to_learn("train", f"{left_out} records drawn in an epoch", prepared))
                left_out += self._order.epoch == useful + 1
                continue
            useful, left_out = self._order.epoch, 0
            if self._fraction > np.random.default_rng([self._seed, self.accounting["drawn"], 1]).random():
                on_policy.add(len(pairs))
            self.accounting["trained"] += 1
            self.accounting["truncated"] += prepared.truncated
            tokens += len(prepared.pair.student)
            pairs.append(prepared.pair)
        return Step(tuple(pairs), frozenset(on_policy), self._order.epoch, self.state())

    def _drop(self, prepared: Prepared) -> None:
        if prepared.problem is not None:
            if self._stop_on_problem:
                raise KdflowError(prepared.problem)
            self.skipped[prepared.id] = prepared.problem
        self.accounting[f"dropped: {prepared.dropped or 'unusable'}"] += 1

    def close(self) -> None:
        """Read no further."""
        self._order.close()

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"stream": self._order.state(), "accounting": dict(self.accounting), "skipped": dict(self.skipped)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._order.restore(state["stream"])
        self.accounting, self.skipped = Counter(state["accounting"]), dict(state["skipped"])


def open_steps(config: RunConfig, plugins: Plugins, tokenize: PairTokenizer) -> tuple[Steps, int]:
    """The steps of a run, and the number of the last.

    Raises:
        KdflowError: the training data is missing, empty, or holds what cannot be used.
    """
    data, training, last_step = config.data, config.training, config.training.steps
    stop, fraction = data.on_error == "stop", config.rollout_fraction
    if data.train[0].streaming:
        assert last_step is not None
        streams = open_streams(data.train, plugins, tokenize, fraction > 0)
        opened = Steps(Streamed(streams, config.seed), training.tokens_per_step, None, stop, fraction, config.seed)
        opened.chat = any(stream.chat for stream in streams)
        return opened, last_step
    tables = open_tables(data.train, data, plugins, tokenize, fraction > 0)
    order, lengths = Shuffled(tables, config.seed), np.concatenate([table.lengths for table in tables])
    if not lengths.any():
        raise KdflowError(nothing_to_learn("train", f"{len(lengths)} records", tables[0][0]))
    samples = None
    if training.epochs is not None:
        steps, samples = count_steps(order, lengths, training.tokens_per_step, training.epochs)
        if steps == 0:
            raise KdflowError(
                f"training.epochs: the {samples} samples that {training.epochs:g} epochs draw hold no trainable "
                "tokens; raise it, or data.max_length"
            )
        last_step = min(steps, last_step or steps)
    assert last_step is not None
    opened = Steps(order, training.tokens_per_step, samples, stop, fraction, config.seed)
    opened.skipped.update(problem for table in tables for problem in table.problems)
    opened.records = {name: key for table in tables for name, key in table.records.items()}
    opened.chat = any(table.chat for table in tables)
    return opened, last_step


def nothing_to_learn(part: str, records: str, example: Prepared) -> str:
    """What is told of data of which nothing can be used, in training, held-out samples and checks.

    Args:
        part: ``train`` or ``eval``.
        records: how many, and which, as in ``3 records looked at``.
        example: one of them: where it stands, and why it was left out.
    """
    # Not by its words: what is wrong with a record may quote anything, "too long" as well.
    if example.dropped is not None:
        why = f"{example.id}: {example.dropped}"
        return f"data.{part}: none of the {records} can be used ({why}); raise data.max_length"
    return f"data.{part}: none of the {records} can be used ({example.problem})"


def count_steps(order: Shuffled, lengths: np.ndarray, tokens_per_step: int, epochs: float) -> tuple[int, int]:
    """How many steps ``epochs`` take, and how many samples they draw.

    Args:
        order: of stored samples.
        lengths: the student's tokens of each sample, through all sources; 0 of one that is dropped.
        tokens_per_step: as in :class:`Steps`.
        epochs: how often the data is gone through; a fraction ends inside an epoch.
    """
    samples = max(1, round(epochs * len(order)))
    steps = tokens = 0
    for epoch in range(-(-samples // len(order))):
        for length in lengths[order.shuffled(epoch)[: samples - epoch * len(order)]].tolist():
            tokens += length
            if tokens >= tokens_per_step:
                steps, tokens = steps + 1, 0
    return steps + (tokens > 0), samples
