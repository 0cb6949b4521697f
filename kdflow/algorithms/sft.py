"""Supervised fine-tuning: cross-entropy on the reference response, without a teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import pydantic
from torch import Tensor
from torch.nn.functional import cross_entropy

from kdflow.contracts import Algorithm, Batch, LossSum, Options, Side
from kdflow.hookspecs import hookimpl
from kdflow.ops.cross_entropy import require_ids
from kdflow.ops.row_sum import row_sum


class SFTOptions(Options):
    """Options of :class:`SFT`."""

    label_smoothing: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of the target distribution that is spread evenly over the vocabulary (Szegedy et al. 2015, 1512.00567)."""


class SFT(Algorithm):
    """Cross-entropy on the reference response; with label smoothing ε, (1 - ε)·CE + ε·mean over ids of -log S."""

    name = "sft"
    Options: ClassVar[type[Options]] = SFTOptions
    needs = frozenset[str]()

    def loss(self, student: Side, teacher: Side | None, batch: Batch) -> LossSum:
        """Sum of the cross-entropy over target positions."""
        smoothing: float = self.options.label_smoothing

        def rows(logits: Tensor, labels: Tensor) -> Tensor:
            nll = cross_entropy(logits, labels, reduction="none")
            if smoothing == 0.0:
                return nll
            padding = logits.isneginf()
            log_probabilities = logits.log_softmax(-1).masked_fill(padding, 0.0)
            uniform = -log_probabilities.sum(-1) / (~padding).sum(-1)
            return (1.0 - smoothing) * nll + smoothing * uniform

        require_ids(student.tokens.labels, student.head)  # of another, the smoothing would count all the same
        operands = [(student.rows, student.head, None)]
        return LossSum(row_sum(rows, operands, [student.tokens.labels]))


@hookimpl
def kdflow_algorithms() -> Iterable[type[Algorithm]]:
    """The algorithm of this module."""
    return [SFT]
