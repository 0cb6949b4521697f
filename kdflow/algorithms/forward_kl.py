"""Forward KL: the student covers what the teacher does."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from kdflow.contracts import Divergence
from kdflow.hookspecs import hookimpl
from kdflow.ops.forms import MixtureKL
from kdflow.ops.logspace import kl, log_probabilities


class ForwardKL(Divergence):
    """KL(T‖S), the teacher's entropy included (Hinton et al. 2015, arXiv 1503.02531; without their temperature²)."""

    name = "forward_kl"
    paper = "https://arxiv.org/abs/1503.02531"

    @property
    def fused(self) -> MixtureKL:
        """KL(T‖S)."""
        return MixtureKL(teacher=1.0, student=0.0, share=0.0)

    def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """KL(T‖S) of each row, ``[n]``."""
        student, teacher = log_probabilities(student_logits, teacher_logits)
        return kl(teacher, student)


@hookimpl
def kdflow_divergences() -> Iterable[type[Divergence]]:
    """The divergence of this module."""
    return [ForwardKL]
