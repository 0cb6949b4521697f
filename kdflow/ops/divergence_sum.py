"""The sum of a divergence over target positions, from hidden states and heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kdflow.contracts import Divergence, Head
from kdflow.ops.row_sum import row_sum


def divergence_sum(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    divergence: Divergence,
    *,
    temperature: float | None = None,
    targets: Tensor | None = None,
    ce_weight: float = 0.0,
) -> Tensor:
    """Sum ``(1 - ce_weight) · divergence + ce_weight · cross-entropy`` over rows, a chunk at a time.

    Args:
        student_hidden: ``[N, H_s]``; gradients reach it and the student's head where they require them.
        student_head: the student's head, over V_s columns.
        teacher_hidden: ``[N, H_t]``.
        teacher_head: the teacher's head, over V_t columns. Columns past the smaller vocabulary, and ids that are
            padding on either side, take no part in the divergence.
        divergence: see :func:`kdflow.get_divergence`.
        temperature: in place of the divergence's own.
        targets: reference tokens ``[N]``, for the cross-entropy (at temperature 1, over the student's vocabulary).
        ce_weight: share of the cross-entropy, 0 to 1.

    Returns:
        Scalar sum in nats, fp32 or fp64.
    """
    total, _, _ = divergence_parts(
        student_hidden, student_head, teacher_hidden, teacher_head, divergence, temperature, targets, ce_weight
    )
    return total


def divergence_parts(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    divergence: Divergence,
    temperature: float | None,
    targets: Tensor | None,
    ce_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`divergence_sum`, and the sums of its two parts, which carry no gradient."""
    if not isinstance(divergence, Divergence):
        example = "kdflow.get_divergence('jsd')"  # type: ignore[unreachable]
        raise TypeError(f"divergence must be a kdflow.Divergence, such as {example}, not {divergence!r}")
    if not 0.0 <= ce_weight <= 1.0:
        raise ValueError(f"ce_weight must lie between 0 and 1, not {ce_weight}")
    if ce_weight > 0 and targets is None:
        raise ValueError("ce_weight > 0 needs targets, the reference tokens [N]")
    if temperature is not None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        divergence = divergence.at(temperature)
    select = (lambda logits: logits) if divergence.across_vocabularies else shared_columns(student_head, teacher_head)

    def rows(student_logits: Tensor, teacher_logits: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kd = divergence(select(student_logits), select(teacher_logits))
        if not labels:
            return kd, kd.detach(), torch.zeros_like(kd)
        ce = cross_entropy(student_logits, labels[0], reduction="none")
        # A weight of 0 or 1 drops the other term instead of multiplying it, since 0 · inf is NaN.
        loss = ce if ce_weight == 1.0 else (1.0 - ce_weight) * kd + ce_weight * ce
        return loss, kd.detach(), ce.detach()

    operands: Any = [(student_hidden, student_head, None), (teacher_hidden, teacher_head, None)]
    labels = [targets] if targets is not None and ce_weight > 0 else []
    total, kd, ce = row_sum(rows, operands, labels)
    return total, kd, ce


def shared_columns(student: Head, teacher: Head) -> Callable[[Tensor], Tensor]:
    """Cuts logits ``[n, V]`` to the columns both heads have, with ids that are padding on either side at -inf."""
    width = min(student.vocab_size, teacher.vocab_size)
    shared = min(width, *(head.valid_vocab or head.vocab_size for head in (student, teacher)))

    def select(logits: Tensor) -> Tensor:
        logits = logits[:, :width]
        if shared == width:
            return logits
        padding = torch.arange(width, device=logits.device) >= shared
        return logits.masked_fill(padding, float("-inf"))

    return select
