"""The distillation head with a kernel: bf16 products, one kernel between them, gradients formed in the forward pass.

Of a chunk of rows the student's logits live once, and their gradient takes their place; the teacher's live half of a
chunk at a time. The gradient of the head's weight is summed over chunks in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdflow.contracts import Divergence, Head
from kdflow.ops.divergence_sum import kernel_chunk
from kdflow.ops.forms import AbsoluteDifference, Form, Kind, MixtureKL
from kdflow.ops.row_sum import scaled

_LN2 = math.log(2.0)


class Numbers(NamedTuple):
    """What a kernel computes with, besides the products; logarithms are binary.

    Attributes:
        kind: of the form.
        a, b, c: the form's numbers: of MIXTURE teacher, student and share, of SPLIT the mass.
        factor: on the divergence that the kernel tells.
        scale_s, scale_t, cap_s, cap_t: the heads' scales and soft-caps over ln 2; a cap of 0 is none.
        inv_t: one over the temperature of the divergence.
        kd_gain, ce_gain: weights of divergence and cross-entropy, times what a product's logit is scaled by.
    """

    kind: Kind
    a: float
    b: float
    c: float
    factor: float
    scale_s: float
    scale_t: float
    cap_s: float
    cap_t: float
    inv_t: float
    kd_gain: float
    ce_gain: float

    @property
    def jensen(self) -> bool:
        """Whether the mixture is ``a · T + b · S``."""
        return self.a == self.c and self.b == 1.0 - self.c


@dataclass(frozen=True)
class Distillation:
    """Everything but the student's tensors; see :func:`kdflow.ops.divergence_sum`."""

    student: Head
    teacher_rows: Tensor
    teacher: Head
    divergence: Divergence
    form: Form
    labels: Tensor | None
    ce_weight: float
    differentiate: bool

    def numbers(self) -> Numbers:
        """All that is the same for every row."""
        kind, a, b, c, factor = self._form()
        student, teacher, inv_t = self.student, self.teacher, 1.0 / self.divergence.temperature
        return Numbers(
            kind, a, b, c, factor, student.scale / _LN2, teacher.scale / _LN2,
            (student.softcap or 0.0) / _LN2, (teacher.softcap or 0.0) / _LN2, inv_t,
            kd_gain=(1.0 - self.ce_weight) * factor * inv_t * student.scale, ce_gain=self.ce_weight * student.scale,
        )  # fmt: skip

    def _form(self) -> tuple[Kind, float, float, float, float]:
        """The kind, its three numbers, and a factor on the divergence."""
        scaled = self.divergence.temperature**2 if self.divergence.scale_by_temperature_squared else 1.0
        form = self.form
        if isinstance(form, AbsoluteDifference):
            return Kind.ABSOLUTE, 0.0, 0.0, 0.0, scaled
        if not isinstance(form, MixtureKL):
            return Kind.SPLIT, form.mass, 0.0, 0.0, scaled
        if form.share == 0.0:  # M is S, and the student's term 0
            return Kind.FORWARD, 0.0, 0.0, 0.0, scaled * form.teacher
        if form.share == 1.0:
            return Kind.REVERSE, 0.0, 0.0, 0.0, scaled * form.student
        return Kind.MIXTURE, form.teacher, form.student, form.share, scaled

    @property
    def columns(self) -> tuple[int, int]:
        """How many take part in the divergence, and how many in the cross-entropy."""
        valid, others = (head.valid_vocab or head.vocab_size for head in (self.student, self.teacher))
        return min(valid, others), valid


# Runs a kernel: from products ``s [n, V_s]`` and ``t [n, V_t]`` and labels to divergences and cross-entropies, and over
# ``s`` the gradient, if that is wanted.
Launch = Callable[[Tensor, Tensor, "Tensor | None", Tensor, Tensor, Distillation, bool], None]


def kernel_of(device: torch.device) -> Launch:
    """The kernel for tensors of a device."""
    if device.type == "cuda":
        from kdflow.ops.kernels import launch  # Triton, which is there where CUDA is

        return launch
    from kdflow.ops.cpu_kernel import launch as launch_on_cpu

    return launch_on_cpu


def fused_parts(
    rows: Tensor,
    head: Head,
    teacher_rows: Tensor,
    teacher: Head,
    divergence: Divergence,
    form: Form,
    labels: Tensor | None,
    ce_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the loss, of the divergence and of the cross-entropy over rows; the first has gradients.

    Args:
        rows: the student's, ``[N, H]``, bf16, N > 0.
        head: the student's.
        teacher_rows, teacher: without gradients.
        divergence: its temperature and scale count.
        form: what it computes.
        labels: reference tokens ``[N]``, where ``ce_weight`` is not 0.
        ce_weight: share of the cross-entropy.
    """
    work = Distillation(
        head, teacher_rows, teacher, divergence, form, labels, ce_weight, differentiate=torch.is_grad_enabled()
    )
    sums: tuple[Tensor, Tensor, Tensor] = _Fused.apply(work, rows, head.weight, head.bias)  # type: ignore[no-untyped-call]
    return sums


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: Distillation, rows: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        for_rows, for_weight, for_bias = (needed and work.differentiate for needed in ctx.needs_input_grad[1:])
        gradient = for_rows or for_weight or for_bias
        launch, count = kernel_of(rows.device), len(rows)
        size, part = kernel_chunk(count, work.student.vocab_size, rows.device)
        products, others = (
            matrix(height, head.vocab_size, rows)
            for height, head in ((min(size, count), work.student), (min(part, count), work.teacher))
        )
        own, theirs = weight.to(rows.dtype), work.teacher.weight.to(rows.dtype)
        kd, ce = rows.new_empty(count, dtype=torch.float32), rows.new_zeros(count, dtype=torch.float32)
        d_rows = torch.empty_like(rows) if for_rows else None
        d_weight = None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and for_bias else None
        for start in range(0, count, size):
            stop = min(start + size, count)
            for first in range(start, stop, part):
                here = slice(first, min(first + part, stop))
                s, t = products[first - start : here.stop - start], others[: here.stop - first]
                _product(rows[here], own, bias, s)
                _product(work.teacher_rows[here], theirs, work.teacher.bias, t)
                labels = None if work.labels is None else work.labels[here]
                launch(s, t, labels, kd[here], ce[here], work, gradient)
            chunk, gradients = slice(start, stop), products[: stop - start]
            if d_rows is not None:
                torch.mm(gradients, own, out=d_rows[chunk])
            if for_weight:
                d_weight = _summed(d_weight, gradients, rows[chunk])
            if d_bias is not None:
                d_bias += gradients.sum(0, dtype=torch.float32)
        ctx.save_for_backward(d_rows, d_weight, d_bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (rows, weight, bias)]
        kd_sum, ce_sum, share = kd.sum() * work.numbers().factor, ce.sum(), work.ce_weight
        # A weight of 0 or 1 drops the other term instead of multiplying it, since 0 · inf is NaN.
        loss = {0.0: kd_sum, 1.0: ce_sum}.get(share)
        ctx.mark_non_differentiable(kd_sum, ce_sum)
        return (1.0 - share) * kd_sum + share * ce_sum if loss is None else loss.clone(), kd_sum, ce_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(
            None if g is None else scaled(g, grad, dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )


def matrix(height: int, width: int, like: Tensor) -> Tensor:
    """``[height, width]``, not filled, whose rows begin where 16-byte loads can."""
    return like.new_empty(height, math.ceil(width / 64) * 64)[:, :width]


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.T, out=out)
    else:
        torch.addmm(bias.to(rows.dtype), rows, weight.T, out=out)


def _summed(total: Tensor | None, gradients: Tensor, rows: Tensor) -> Tensor:
    """``total + gradientsᵀ · rows`` in fp32, in the place of ``total``; on a CPU one product alone stays in bf16."""
    if rows.is_cuda:
        if total is None:
            return torch.mm(gradients.T, rows, out_dtype=torch.float32)
        return torch.addmm(total, gradients.T, rows, out_dtype=torch.float32, out=total)
    product = torch.mm(gradients.T, rows)
    return product if total is None else total.float().add_(product)
