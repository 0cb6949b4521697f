"""Skew KL: forward KL against a mixture, finite wherever the student is."""

from __future__ import annotations

from collections.abc import Iterable

import pydantic
from torch import Tensor

from kdflow.contracts import Divergence, Options
from kdflow.hookspecs import hookimpl
from kdflow.ops.forms import MixtureKL
from kdflow.ops.logspace import kl, log_mixture, log_probabilities


class SkewKLOptions(Options):
    """Options of :class:`SkewKL`."""

    skew: float = pydantic.Field(0.1, ge=0, lt=1)
    """λ, the share of the teacher in the mixture; 0 is plain forward KL."""


class SkewKL(Divergence):
    """KL(T‖λT + (1 - λ)S) (Ko et al. 2024, DistiLLM, arXiv 2402.03898, eq. 2)."""

    name = "skew_kl"
    paper = "https://arxiv.org/abs/2402.03898"
    Options = SkewKLOptions

    @property
    def fused(self) -> MixtureKL:
        """The same formula."""
        return MixtureKL(teacher=1.0, student=0.0, share=self.options.skew)

    def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """KL(T‖λT + (1 - λ)S) of each row, ``[n]``."""
        student, teacher = log_probabilities(student_logits, teacher_logits)
        skew = self.options.skew
        return kl(teacher, log_mixture(teacher, student, skew) if skew > 0 else student)


@hookimpl
def kdflow_divergences() -> Iterable[type[Divergence]]:
    """The divergence of this module."""
    return [SkewKL]
