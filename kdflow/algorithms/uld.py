"""Universal logit distillation: the sorted probabilities of two vocabularies, whatever their tokens are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from kdflow.algorithms._options import mixed, on_device
from kdflow.contracts import (
    LEAST_TEMPERATURE,
    Algorithm,
    Batch,
    Divergence,
    LossSum,
    Options,
    Pair,
    Side,
    TargetAlignment,
)
from kdflow.hookspecs import hookimpl
from kdflow.ops import row_sum
from kdflow.ops.kd import CEOptions
from kdflow.ops.logspace import nonnegative
from kdflow.ops.row_sum import Operand

_SMALLEST_FACTOR = 1e-8  # of a token's probability inside a span, as in TRL's GOLD


class SortedL1(Divergence):
    """Σ|S↓ - T↓| over probabilities sorted in descending order, the shorter side padded with zeros (eq. 3)."""

    name = "sorted_l1"
    paper = "https://arxiv.org/abs/2402.12030"
    across_vocabularies = True

    def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The distance of each row, ``[n]``, from 0 to 2; the two sides may differ in their number of columns."""
        return _sorted_distance(student_logits.softmax(-1), teacher_logits.softmax(-1))


class ULDOptions(CEOptions):
    """Options of :class:`ULD`."""

    student_temperature: float = pydantic.Field(1.0, ge=LEAST_TEMPERATURE)
    """The student's logits are divided by it."""
    teacher_temperature: float = pydantic.Field(1.0, ge=LEAST_TEMPERATURE)
    """The teacher's logits are divided by it."""
    aligner: str = "byte_span"
    """How positions are paired: byte_span, min_edit, or identity, as the authors do, by their numbers."""
    merge: Literal["product", "skip"] = "product"
    """Spans of several tokens: one distribution, or left out."""


class ULD(Algorithm):
    """Sorted L1 distance at aligned positions (Boizard et al. 2024, arXiv 2402.12030), predicting positions throughout.

    A span of several tokens counts once: its distribution is that of its last token, times the probabilities that the
    model gives the tokens before it (TRL's GOLD, ``bayesian``; arXiv 2508.21038).
    """

    name = "uld"
    paper = "https://arxiv.org/abs/2402.12030"
    Options: ClassVar[type[Options]] = ULDOptions
    needs = frozenset({"teacher", "aligner"})

    @property
    def aligner(self) -> Mapping[str, Any]:
        """The option's."""
        return {"name": self.options.aligner}

    def prepare(self, pair: Pair) -> Pair:
        """Drop the teacher's rows that no span needs."""
        assert pair.alignment is not None
        return pair.with_teacher_targets(np.append(self._wanted(pair.alignment), False)[pair.alignment.teacher])

    def _wanted(self, alignment: TargetAlignment) -> np.ndarray:
        """Which spans are learnt from."""
        ours, theirs = alignment.counts()
        wanted: np.ndarray = (ours > 0) & (theirs > 0)
        return wanted & (ours == 1) & (theirs == 1) if self.options.merge == "skip" else wanted

    def loss(self, student: Side, teacher: Side | None, batch: Batch) -> LossSum:
        """Sum of the distances of spans."""
        assert teacher is not None
        assert batch.alignment is not None
        places, spans = _places(batch.alignment, self._wanted(batch.alignment))
        last = np.append(spans[1:] != spans[:-1], True)[: len(spans)]
        operands = list[Operand]()
        row_args = [on_device(spans, student.rows), on_device(last, student.rows)]
        for side, place in zip((student, teacher), places, strict=True):
            rows = on_device(np.maximum(place, 0), side.rows)
            # A row that only fills up the shorter side of a span is any row, and no factor.
            counts = on_device(~last & (place >= 0), side.rows)
            operands.append((side.rows[rows], side.head, None))
            row_args += [side.tokens.labels[rows], counts]
        options = self.options

        def distances(ours: Tensor, theirs: Tensor, span: Tensor, last: Tensor, *factors: Tensor) -> Tensor:
            p = _merged((ours / options.student_temperature).log_softmax(-1), span, *factors[:2])
            q = _merged((theirs / options.teacher_temperature).log_softmax(-1), span, *factors[2:])
            return _sorted_distance(p, q) * last

        kd = row_sum(distances, operands, row_args, torch.from_numpy(spans))
        return mixed(kd, int(last.sum()), student, options.ce_weight)


def _places(alignment: TargetAlignment, wanted: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of both sides, span by span, each as long as its longer side and aligned at its end; -1 fills the shorter.

    Returns:
        For either side the row at each place, ``[m]``, and the span of each place, ``[m]``, numbered without gaps.
    """
    counts = [np.where(wanted, of_side, 0) for of_side in alignment.counts()]
    lengths = np.maximum(*counts)
    ends = np.cumsum(lengths)
    places = []
    for numbers, of_side in zip((alignment.student, alignment.teacher), counts, strict=True):
        rows = np.flatnonzero(np.append(wanted, False)[numbers])
        span = numbers[rows]
        behind = np.cumsum(of_side)[span] - np.arange(len(rows))  # rows up to the end of the span, itself included
        place = np.full(int(lengths.sum()), -1, np.int64)
        place[ends[span] - behind] = rows
        places.append(place)
    lengths = lengths[lengths > 0]
    return places, np.repeat(np.arange(len(lengths)), lengths)


def _merged(log_probabilities: Tensor, span: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Each row's distribution, times the probabilities of the labels of those rows of its span that count."""
    of_label = log_probabilities.gather(1, labels[:, None])[:, 0].exp().clamp_min(_SMALLEST_FACTOR).log()
    local = span - span[:1]
    summed = of_label.new_zeros(len(span)).index_add(0, local, of_label * counts)
    return (log_probabilities + summed[local][:, None]).exp()


def _sorted_distance(p: Tensor, q: Tensor) -> Tensor:
    """L1 between sorted rows. What the longer side has beyond the shorter meets zeros: its sum will do, unsorted."""
    width = min(p.shape[1], q.shape[1])
    (p, rest_of_p), (q, rest_of_q) = (_largest(side, width) for side in (p, q))
    return nonnegative((p - q).abs().sum(-1) + rest_of_p + rest_of_q)


def _largest(p: Tensor, width: int) -> tuple[Tensor, Tensor | float]:
    """The ``width`` largest of each row in descending order, and the sum of the others."""
    if p.shape[1] == width:
        return p.sort(dim=-1, descending=True).values, 0.0
    largest = p.topk(width, dim=-1).values
    return largest, p.sum(-1) - largest.sum(-1)


@hookimpl
def kdflow_divergences() -> Iterable[type[Divergence]]:
    """The divergence of this module."""
    return [SortedL1]


@hookimpl
def kdflow_algorithms() -> Iterable[type[Algorithm]]:
    """The algorithm of this module."""
    return [ULD]
