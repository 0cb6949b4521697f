"""Total variation distance, bounded by 1."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from kdflow.contracts import Divergence
from kdflow.hookspecs import hookimpl
from kdflow.ops.forms import AbsoluteDifference
from kdflow.ops.logspace import log_probabilities


class TotalVariation(Divergence):
    """½ Σ|T - S| (Wen et al. 2023, arXiv 2307.15190, eq. 8)."""

    name = "tvd"
    paper = "https://arxiv.org/abs/2307.15190"

    @property
    def fused(self) -> AbsoluteDifference:
        """The same formula."""
        return AbsoluteDifference()

    def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The total variation distance of each row, ``[n]``."""
        student, teacher = log_probabilities(student_logits, teacher_logits)
        return 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)


@hookimpl
def kdflow_divergences() -> Iterable[type[Divergence]]:
    """The divergence of this module."""
    return [TotalVariation]
