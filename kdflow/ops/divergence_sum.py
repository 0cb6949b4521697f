"""The sum of a divergence over target positions, from hidden states and heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kdflow.contracts import LEAST_TEMPERATURE, Divergence, Head
from kdflow.ops import fused
from kdflow.ops.cross_entropy import require_ids, weighted
from kdflow.ops.forms import Form
from kdflow.ops.row_sum import row_sum, same_count


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
        if not LEAST_TEMPERATURE <= temperature < math.inf:
            raise ValueError(f"temperature must be a finite number of at least {LEAST_TEMPERATURE}, not {temperature}")
        divergence = divergence.at(temperature)
    labels = targets if ce_weight > 0 else None
    count = same_count([student_hidden, teacher_hidden], [] if labels is None else [labels])
    if labels is not None:
        require_ids(labels, student_head)
    if (
        count
        and (form := form_of(divergence)) is not None
        and _takes_kernel(student_hidden, student_head, teacher_hidden, teacher_head)
    ):
        return fused.fused_parts(
            student_hidden, student_head, teacher_hidden, teacher_head, divergence, form, labels, ce_weight
        )
    columns = None if divergence.across_vocabularies else _shared_width(student_head, teacher_head)
    rows = _Rows(divergence, ce_weight, columns)
    operands = [(student_hidden, student_head, None), (teacher_hidden, teacher_head, None)]
    total, kd, ce = row_sum(rows, operands, [] if labels is None else [labels], compiled=student_hidden.is_cuda)
    return total, kd, ce


@dataclass(frozen=True)
class _Rows:
    """The loss of each row and its parts, from logits; an object, so that the compiler knows it again in every call."""

    divergence: Divergence
    ce_weight: float
    columns: tuple[int, int] | None

    def __call__(self, student: Tensor, teacher: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        columns = self.columns
        sides = (logits if columns is None else cut(logits, *columns) for logits in (student, teacher))
        kd = self.divergence(*sides)
        if not labels:
            return kd, kd.detach(), torch.zeros_like(kd)
        ce = cross_entropy(student, labels[0], reduction="none")
        return weighted(kd, ce, self.ce_weight), kd.detach(), ce.detach()


def form_of(divergence: Divergence) -> Form | None:
    """Its form, unless a subclass computes something else than the class that gave the form."""
    kind = type(divergence)
    form, formula = (next(cls for cls in kind.__mro__ if name in vars(cls)) for name in ("fused", "per_token"))
    known: Form | None = divergence.fused
    return known if form is formula and kind.__call__ is Divergence.__call__ else None


def _takes_kernel(student_rows: Tensor, student: Head, teacher_rows: Tensor, teacher: Head) -> bool:
    """Whether there is a kernel: for bf16 on a GPU of CUDA or a CPU, where nothing of the teacher wants a gradient.

    It makes logits as :class:`Head` does, and takes no other's. A CPU's takes every logit for finite, which a bias need
    not leave it.
    """
    if any(type(head).logits is not Head.logits for head in (student, teacher)):
        return False
    sides = (student_rows, teacher_rows)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (teacher_rows, *teacher.parameters()))
    biases = student.bias is not None or teacher.bias is not None
    devices = all(x.is_cuda for x in sides) or (all(x.is_cpu for x in sides) and not biases)
    return devices and not learns and all(x.dtype == torch.bfloat16 for x in sides)


def shared_columns(student: Head, teacher: Head) -> Callable[[Tensor], Tensor]:
    """Cuts logits ``[n, V]`` to the columns both heads have, with ids that are padding on either side at -inf."""
    width, shared = _shared_width(student, teacher)
    return lambda logits: cut(logits, width, shared)


def _shared_width(student: Head, teacher: Head) -> tuple[int, int]:
    """How many columns both heads have, and how many of these are padding on neither side."""
    width = min(student.vocab_size, teacher.vocab_size)
    return width, min(width, *(head.valid_vocab or head.vocab_size for head in (student, teacher)))


def cut(logits: Tensor, width: int, shared: int) -> Tensor:
    """The first ``width`` columns of logits ``[n, V]``, those from ``shared`` on at -inf."""
    logits = logits[:, :width]
    if shared == width:
        return logits
    return logits.masked_fill(torch.arange(width, device=logits.device) >= shared, float("-inf"))
