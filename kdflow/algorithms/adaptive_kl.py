"""Adaptive KL: forward KL for the teacher's head, reverse KL for its tail, by where the gap is."""

from __future__ import annotations

from collections.abc import Iterable

import pydantic
from torch import Tensor

from kdflow.contracts import Divergence, Options
from kdflow.hookspecs import hookimpl
from kdflow.ops.forms import SplitKL
from kdflow.ops.logspace import kl, log_probabilities


class AdaptiveKLOptions(Options):
    """Options of :class:`AdaptiveKL`."""

    mu: float = pydantic.Field(0.5, ge=0, le=1)
    """Teacher mass that makes up the head."""


class AdaptiveKL(Divergence):
    """head ratio · KL(T‖S) + tail ratio · KL(S‖T) (Wu et al. 2024, arXiv 2404.02657, section 4.2).

    The head of a row is the tokens whose cumulative teacher mass, in descending order, stays within ``mu``, and the
    top token always. The ratios are the shares of Σ|T - S| in head and tail, without gradient; ½ and ½ where S = T.
    """

    name = "adaptive_kl"
    paper = "https://arxiv.org/abs/2404.02657"
    Options = AdaptiveKLOptions

    @property
    def fused(self) -> SplitKL:
        """The same formula."""
        return SplitKL(self.options.mu)

    def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The adaptive KL of each row, ``[n]``."""
        student, teacher = log_probabilities(student_logits, teacher_logits)
        head, tail = self.ratios(student.detach(), teacher.detach())
        # A part whose ratio is 0 is left out instead of multiplied, since 0 · inf is NaN.
        forward = (head * kl(teacher, student)).masked_fill(head == 0, 0.0)
        reverse = (tail * kl(student, teacher)).masked_fill(tail == 0, 0.0)
        return forward + reverse

    def ratios(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the gap in head and tail, ``[n]`` each, from log-probabilities ``[n, V]``."""
        ordered, order = teacher.exp().sort(dim=-1, descending=True, stable=True)
        gap = (ordered - student.exp().gather(-1, order)).abs()
        # Rounding may carry the sum past 1, and mu = 1 means every token.
        in_head = ordered.cumsum(-1).clamp_max(1.0) <= self.options.mu
        in_head[..., 0] = True
        whole = gap.sum(-1)
        head = gap.masked_fill(~in_head, 0.0).sum(-1)
        equal = whole == 0
        whole = whole.masked_fill(equal, 1.0)
        return (head / whole).masked_fill(equal, 0.5), ((gap.sum(-1) - head) / whole).masked_fill(equal, 0.5)


@hookimpl
def kdflow_divergences() -> Iterable[type[Divergence]]:
    """The divergence of this module."""
    return [AdaptiveKL]
