"""Skew reverse KL: reverse KL against a mixture, finite wherever the teacher is."""

from __future__ import annotations

from collections.abc import Iterable

import pydantic
from torch import Tensor

from kdflow.contracts import Divergence, Options
from kdflow.hookspecs import hookimpl
from kdflow.ops.forms import MixtureKL
from kdflow.ops.logspace import kl, log_mixture, log_probabilities


class SkewReverseKLOptions(Options):
    """Options of :class:`SkewReverseKL`."""

    skew: float = pydantic.Field(0.1, ge=0, lt=1)
    """λ, the share of the student in the mixture; 0 is plain reverse KL."""


class SkewReverseKL(Divergence):
    """KL(S‖λS + (1 - λ)T) (Ko et al. 2024, DistiLLM, arXiv 2402.03898, section 3.1)."""

    name = "skew_reverse_kl"
    paper = "https://arxiv.org/abs/2402.03898"
    Options = SkewReverseKLOptions

    @property
    def fused(self) -> MixtureKL:
        """The same formula."""
        return MixtureKL(teacher=0.0, student=1.0, share=1.0 - self.options.skew)

    def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """KL(S‖λS + (1 - λ)T) of each row, ``[n]``."""
        student, teacher = log_probabilities(student_logits, teacher_logits)
        skew = self.options.skew
        return kl(student, log_mixture(student, teacher, skew) if skew > 0 else teacher)


@hookimpl
def kdflow_divergences() -> Iterable[type[Divergence]]:
    """The divergence of this module."""
    return [SkewReverseKL]
