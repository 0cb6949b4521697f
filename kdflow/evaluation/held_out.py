"""Held-out divergence, cross-entropy and agreement, from one pass over the rows of a micro-batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from kdflow.contracts import Side
from kdflow.ops.divergence_sum import shared_columns
from kdflow.ops.logspace import kl, log_probabilities
from kdflow.ops.row_sum import row_sum


def measure(student: Side, teacher: Side | None) -> tuple[Tensor, ...]:
    """Sums over target positions: cross-entropy, and with a teacher of the same vocabulary forward KL and agreement.

    Forward KL is at temperature 1, whatever is trained; agreement counts positions with the same most likely token.
    """
    operands = [(student.rows, student.head, None)]
    if teacher is None:

        def alone(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            return (cross_entropy(logits, labels, reduction="none"),)

        return tuple(row_sum(alone, operands, [student.tokens.labels]))

    select = shared_columns(student.head, teacher.head)

    def against(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        ours, theirs = select(logits), select(teacher_logits)
        agree = (ours.argmax(-1) == theirs.argmax(-1)).to(logits.dtype)
        student_log, teacher_log = log_probabilities(ours, theirs)
        return cross_entropy(logits, labels, reduction="none"), kl(teacher_log, student_log), agree

    return tuple(row_sum(against, [*operands, (teacher.rows, teacher.head, None)], [student.tokens.labels]))


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures, per target token; None where there is no teacher that learns the same ids."""

    divergence: float | None
    cross_entropy: float
    perplexity: float
    bits_per_byte: float | None
    agreement: float | None
    target_tokens: int


def summarise(sums: list[float], target_tokens: int, text_bytes: int) -> Evaluation:
    """Figures from the sums of :func:`measure` over all micro-batches and ranks."""
    cross_entropy_sum, *with_teacher = sums
    mean = cross_entropy_sum / target_tokens
    return Evaluation(
        divergence=with_teacher[0] / target_tokens if with_teacher else None,
        cross_entropy=mean,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=cross_entropy_sum / math.log(2) / text_bytes if text_bytes else None,
        agreement=with_teacher[1] / target_tokens if with_teacher else None,
        target_tokens=target_tokens,
    )
