"""Numerics that divergences share: everything from log-probabilities, never NaN, never negative.

Conventions: a term with p = 0 counts nothing (0 · log 0 = 0), also where both sides are masked with -inf; a term with
p > 0 and q = 0 is +inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Stands for -inf in columns that both sides mask: as probability it is 0 just the same, but differences and mixtures
# of two such columns are finite, where -inf - -inf is NaN.
_MASKED = -1e30


def log_probabilities(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax of both sides ``[n, V]``, free of columns that are -inf on both."""
    masked = torch.isneginf(student_logits) & torch.isneginf(teacher_logits)
    sides = (logits.masked_fill(masked, _MASKED).log_softmax(-1) for logits in (student_logits, teacher_logits))
    student, teacher = sides
    return student, teacher


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) of each row, ``[n]``, from log-probabilities ``[n, V]``.

    A row in which q is 0 where p is not is +inf. Its gradient is finite: that for q is the usual one, that for p leaves
    the infinite terms out.
    """
    p = log_p.exp()
    absent = p == 0
    infinite = torch.isneginf(log_q) & ~absent
    difference = (log_p - log_q).masked_fill(absent, 0.0)
    return nonnegative((torch.where(infinite, p.detach(), p) * difference).sum(-1))


def log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Log of ``weight · p + (1 - weight) · q`` for 0 < weight < 1."""
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def nonnegative(value: Tensor) -> Tensor:
    """Remove what rounding left below zero from a value that is non-negative by definition; the gradient stays."""
    return value - value.detach().clamp_max(0.0)
