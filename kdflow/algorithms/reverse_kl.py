"""Reverse KL: the student seeks the teacher's modes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from kdflow.contracts import Divergence
from kdflow.hookspecs import hookimpl
from kdflow.ops.forms import MixtureKL
from kdflow.ops.logspace import kl, log_probabilities


class ReverseKL(Divergence):
    """KL(S‖T) (Gu et al. 2023, MiniLLM, arXiv 2306.08543, eq. 1, at the level of tokens)."""

    name = "reverse_kl"
    paper = "https://arxiv.org/abs/2306.08543"

    @property
    def fused(self) -> MixtureKL:
        """KL(S‖T)."""
        return MixtureKL(teacher=0.0, student=1.0, share=1.0)

    def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """KL(S‖T) of each row, ``[n]``."""
        student, teacher = log_probabilities(student_logits, teacher_logits)
        return kl(student, teacher)


@hookimpl
def kdflow_divergences() -> Iterable[type[Divergence]]:
    """The divergence of this module."""
    return [ReverseKL]
