"""The one algorithm that minimises a divergence, whichever it is."""

from __future__ import annotations

from typing import Any, ClassVar

import pydantic

from kdflow.contracts import Algorithm, Batch, Divergence, DivergenceOptions, LossSum, Options, Side
from kdflow.ops.divergence_sum import divergence_parts


class CEOptions(Options):
    """A share of plain training beside the distillation."""

    ce_weight: float = pydantic.Field(0.0, ge=0, le=1)
    """Share of the cross-entropy on the reference tokens: loss = (1 - ce_weight) · KD + ce_weight · CE."""


class KDOptions(CEOptions, DivergenceOptions):
    """What every divergence takes when it is trained with."""


class DivergenceAlgorithm(Algorithm):
    """Distillation by one divergence at every target position, between models of one vocabulary."""

    Options: ClassVar[type[Options]] = KDOptions
    divergence_class: ClassVar[type[Divergence]]

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.divergence = self.divergence_class.configured(self.options)

    def loss(self, student: Side, teacher: Side | None, batch: Batch) -> LossSum:
        """Sum over target positions of (1 - ce_weight) · divergence + ce_weight · cross-entropy."""
        assert teacher is not None
        weight = self.options.ce_weight
        labels = student.tokens.labels
        total, kd, ce = divergence_parts(
            student.rows, student.head, teacher.rows, teacher.head, self.divergence, None, labels, weight
        )
        count = float(len(labels))
        return LossSum(total, {"kd": (kd, count), "ce": (ce, count)} if weight > 0 else {})
