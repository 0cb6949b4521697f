"""What ``kdflow check`` tells of a run's data, from a sample of each source's records."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from kdflow.config import RunConfig, SourceConfig
from kdflow.contracts import KdflowError, Pair, Tokens
from kdflow.data.rendering import SideTokenizer
from kdflow.data.samples import preparation
from kdflow.data.sources import open_records, stream_records
from kdflow.data.steps import nothing_to_learn
from kdflow.data.tokenization import PairTokenizer, Prepared
from kdflow.engines.cache.shards import Shards, sequence_key
from kdflow.plugins import Plugins

_SAMPLED = 500  # records of a source that are tokenized; the rest is taken to be like them
_PERCENTILES = (0, 50, 90, 99, 100)


class Problems(list[str]):
    """What keeps a run from its start, in sentences."""

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Add what the block raises; what two sides have in common is at fault once."""
        try:
            yield
        except KdflowError as error:
            if str(error) not in self:
                self.append(str(error))


def find_data(config: RunConfig, problems: Problems) -> None:
    """Whether the sources are there, where nothing can tokenize them."""
    for source in (*config.data.train, *config.data.eval):
        with problems.collected():
            stream_records(source) if source.streaming else open_records(source)


class DataCheck:
    """The sources of a run as its tokenizers cut them.

    Args:
        config: of the run.
        plugins: that it uses.
        tokenize: its tokenizers.
        captured: where the teacher's rows are read from, if they are not computed.
        problems: where what is found at fault is told.

    Attributes:
        looked_at: samples of the training data, once :meth:`figures` has been asked for.
    """

    def __init__(
        self, config: RunConfig, plugins: Plugins, tokenize: PairTokenizer, captured: Shards | None, problems: Problems
    ) -> None:
        self.config, self.plugins, self.tokenize = config, plugins, tokenize
        self.captured, self.problems = captured, problems
        self.looked_at: list[Pair] = []

    def figures(self) -> dict[str, Any]:
        """The sources that can be read; one that cannot does not hide the next."""
        found: dict[str, Any] = {"train": [], "eval": []}
        for part, sources in found.items():
            firsts: list[Prepared] = []
            for source in getattr(self.config.data, part):
                with self.problems.collected():
                    figures, first = self._source(source)
                    sources.append(figures)
                    firsts.append(first)
            told = self.config.data.on_error == "stop" and any(one["unusable"] for one in sources)
            if sources and not told and not any(one["usable_share"] for one in sources):
                looked_at = sum(one["looked_at"] for one in sources)
                self.problems.append(nothing_to_learn(part, f"{looked_at} records looked at", firsts[0]))
        return found

    def _source(self, source: SourceConfig) -> tuple[dict[str, Any], Prepared]:
        """Counts of a source, from a sample of its records, and the first of these.

        Raises:
            KdflowError: it cannot be opened, or is empty.
        """
        asked = source in self.config.data.train and self.config.rollout_fraction > 0
        work = preparation(source, self.plugins, self.tokenize, needs_prompt=asked)
        if source.streaming:
            records, count = list(itertools.islice(stream_records(source).read(0), _SAMPLED)), None
            if not records:
                raise KdflowError(f"{source.path}: the data file is empty")
        else:
            opened = open_records(source)
            chosen = np.random.default_rng(0).permutation(len(opened))[:_SAMPLED]
            records, count = [opened[int(index)] for index in np.sort(chosen)], len(opened)
        prepared = [work(record) for record in records]
        pairs = [one.pair for one in prepared if one.pair is not None]
        bad = [one.problem for one in prepared if one.problem is not None]
        if bad and self.config.data.on_error == "stop":
            more = f", and {len(bad) - 1} more of the {len(records)} records looked at" if bad[1:] else ""
            self.problems.append(f"{bad[0]}{more}; data.on_error=skip leaves out what cannot be used")
        sides = [pair.teacher for pair in pairs if pair.teacher is not None]
        if (captured := self.captured) is not None and (
            missing := sum(not captured.holds(sequence_key(tokens.ids), tokens.targets) for tokens in sides)
        ):
            self.problems.append(
                f"{source.path}: the teacher's rows of {missing} of {len(sides)} samples that were looked at are not "
                "captured: kdflow cache RUN.YAML adds what is missing"
            )
        if source in self.config.data.train:
            self.looked_at += pairs
        lengths = [len(pair.student) for pair in pairs]
        aligned: Counter[str] = Counter()
        for pair in pairs:
            if pair.alignment is not None:
                aligned.update(pair.alignment.shares())
        return {
            "path": source.path, "format": source.format, "weight": source.weight, "records": count,
            "looked_at": len(records), "unusable": len(bad), "truncated": sum(one.truncated for one in prepared),
            "dropped": sum(one.dropped is not None for one in prepared),
            "tokens": _percentiles(lengths), "targets": _percentiles([len(pair.student.targets) for pair in pairs]),
            "mean_tokens": float(np.mean(lengths)) if lengths else 0.0,
            "mean_targets": float(np.mean([len(pair.student.targets) for pair in pairs])) if pairs else 0.0,
            "usable_share": len(pairs) / len(records),
            "aligned": {name: count / aligned.total() for name, count in aligned.items()},
        }, prepared[0]  # fmt: skip

    def sample(self) -> dict[str, Any]:
        """The first sample of the training data as each side sees it: stretches of text that are learnt or not."""
        source = self.config.data.train[0]
        prepared = map(preparation(source, self.plugins, self.tokenize), stream_records(source).read(0))
        pair = next((one.pair for one in itertools.islice(prepared, _SAMPLED) if one.pair is not None), None)
        if pair is None:
            return {}
        sides = {"student": (self.tokenize.student, pair.student)}
        if pair.teacher is not None and self.tokenize.teacher is not None:
            sides["teacher"] = (self.tokenize.teacher, pair.teacher)
        return {"id": pair.id, **{name: _stretches(side, tokens) for name, (side, tokens) in sides.items()}}


def _percentiles(values: Sequence[int]) -> dict[str, int]:
    return {f"p{p}": int(np.percentile(values, p)) for p in _PERCENTILES} if values else {}


def _stretches(side: SideTokenizer, tokens: Tokens) -> list[dict[str, Any]]:
    learnt = np.zeros(len(tokens), bool)
    learnt[tokens.targets + 1] = True
    groups = itertools.groupby(zip(learnt.tolist(), tokens.ids.tolist(), strict=True), key=lambda item: item[0])
    return [{"learnt": flag, "text": side.tokenizer.decode([index for _, index in items])} for flag, items in groups]
