"""Adaptive KL: forward KL for the teacher's head, reverse KL for its tail, by where the gap is."""

from __future__ import annotations

from collections.abc import Iterable

import pydantic
import torch
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
    top token always; those that tie for its last place share it, so that the order of ids plays no part. The ratios are
    the shares of Σ|T - S| in head and tail, without gradient; ½ and ½ where S = T.
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
        mass = teacher.exp()
        gap = (mass - student.exp()).abs()
        ordered = mass.sort(dim=-1, descending=True).values
        # Rounding may carry the sum past 1, and mu = 1 means every token.
        count = (ordered.cumsum(-1).clamp_max(1.0) <= self.options.mu).sum(-1, keepdim=True).clamp_min(1)
        last = ordered.gather(-1, count - 1)
        larger, ties = mass > last, mass == last
        inside = (count - larger.sum(-1, keepdim=True)) / ties.sum(-1, keepdim=True)
        in_head = torch.where(ties, inside, larger.to(gap.dtype))
        head, tail = (gap * in_head).sum(-1), (gap * (1.0 - in_head)).sum(-1)
        equal = head + tail == 0
        whole = (head + tail).masked_fill(equal, 1.0)
        return (head / whole).masked_fill(equal, 0.5), (tail / whole).masked_fill(equal, 0.5)


@hookimpl
def kdflow_divergences() -> Iterable[type[Divergence]]:
    """The divergence of this module."""
    return [AdaptiveKL]
