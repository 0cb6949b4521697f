"""Numerics that divergences share: everything from log-probabilities, never NaN, never negative.

Conventions: a term with p = 0 counts nothing (0 · log 0 = 0), also where both sides are masked with -inf; a term with
p > 0 and q = 0 is +inf. Gradients are written out instead of recorded: on logits of a whole vocabulary every pass over
memory counts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdflow.ops.gradients import once_differentiable, without_autocast


def log_probabilities(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax of both sides, ``[n, V]``."""
    return student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) of each row, ``[n]``, from log-probabilities ``[n, V]``.

    A row in which q is 0 where p is not is +inf. Its gradient is finite: that for q is the usual one, that for p leaves
    the infinite terms out.
    """
    with without_autocast(log_p):  # which takes a product of rows in bf16
        return nonnegative(_KL.apply(log_p, log_q))  # type: ignore[no-untyped-call]


def log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Log of ``weight · p + (1 - weight) · q`` for 0 < weight < 1."""
    mixture: Tensor = _LogAddExp.apply(log_p + math.log(weight), log_q + math.log1p(-weight))  # type: ignore[no-untyped-call]
    return mixture


def nonnegative(value: Tensor) -> Tensor:
    """Remove what rounding left below zero from a value that is non-negative by definition; the gradient stays."""
    return value - value.detach().clamp_max(0.0)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
        p = log_p.exp()
        difference = (log_p - log_q).masked_fill_(p == 0, 0.0)
        ctx.save_for_backward(p, difference if ctx.needs_input_grad[0] else None)
        value: Tensor = torch.linalg.vecdot(p, difference)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, difference = ctx.saved_tensors
        for_p = for_q = None
        if ctx.needs_input_grad[0]:
            finite = difference.nan_to_num(nan=0.0, posinf=0.0)
            for_p = torch.addcmul(p, p, finite).mul_(grad.unsqueeze(-1))
        if ctx.needs_input_grad[1]:
            for_q = p * -grad.unsqueeze(-1)
        return for_p, for_q


class _LogAddExp(torch.autograd.Function):
    """torch.logaddexp, whose own gradient is NaN where both sides are -inf."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        total = torch.logaddexp(a, b)
        ctx.save_for_backward(a, b, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *sides, total = ctx.saved_tensors
        return tuple(
            (side - total).exp_().nan_to_num_(nan=0.0).mul_(grad) if needed else None
            for side, needed in zip(sides, ctx.needs_input_grad, strict=True)
        )
