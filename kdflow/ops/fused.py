"""The distillation head on a GPU: bf16 products, one kernel between them, gradients formed in the forward pass.

Of a chunk of rows the student's logits live once, and their gradient takes their place; the teacher's live half of a
chunk at a time. The gradient of the head's weight is summed over chunks in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdflow.contracts import Divergence, Head
from kdflow.ops.divergence_sum import kernel_chunk
from kdflow.ops.forms import AbsoluteDifference, Form, MixtureKL
from kdflow.ops.kernels import ABSOLUTE, FORWARD, MIXTURE, REVERSE, SPLIT, divergence_rows

# From an H100, whole heads in two visits. Larger blocks are up to a fifth faster alone, since what a row read last is
# then still in the cache; with products around them, whose heat lowers the clocks, the plain forms were as fast in
# either, and those with caps or a search slower in larger ones (benchmarks/results/head-h100*.json).
_LANES, _WARPS = 256, 8
_LN2 = math.log(2.0)


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

    def kernel_arguments(self) -> tuple[Any, float, float, float, float]:
        """The kernel's kind, its three numbers, and a factor on the divergence."""
        scaled = self.divergence.temperature**2 if self.divergence.scale_by_temperature_squared else 1.0
        form = self.form
        if isinstance(form, AbsoluteDifference):
            return ABSOLUTE, 0.0, 0.0, 0.0, scaled
        if not isinstance(form, MixtureKL):
            return SPLIT, form.mass, 0.0, 0.0, scaled
        if form.share == 0.0:  # M is S, and the student's term 0
            return FORWARD, 0.0, 0.0, 0.0, scaled * form.teacher
        if form.share == 1.0:
            return REVERSE, 0.0, 0.0, 0.0, scaled * form.student
        return MIXTURE, form.teacher, form.student, form.share, scaled


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
        count = len(rows)
        size, part = kernel_chunk(count, work.student.vocab_size)
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
        kd_sum, ce_sum, share = kd.sum() * work.kernel_arguments()[-1], ce.sum(), work.ce_weight
        # A weight of 0 or 1 drops the other term instead of multiplying it, since 0 · inf is NaN.
        loss = {0.0: kd_sum, 1.0: ce_sum}.get(share)
        ctx.mark_non_differentiable(kd_sum, ce_sum)
        return (1.0 - share) * kd_sum + share * ce_sum if loss is None else loss.clone(), kd_sum, ce_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In one pass: from fp32 to the tensor's own dtype. A factor without dimensions would be rounded to bf16 first.
        factor = grad.reshape(1)
        return None, *(
            None if g is None else torch.mul(g, factor, out=torch.empty_like(g, dtype=dtype))
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )


def launch(
    s: Tensor, t: Tensor, labels: Tensor | None, kd: Tensor, ce: Tensor, work: Distillation, gradient: bool
) -> None:
    """Run the kernel on products ``s [n, V_s]`` and ``t [n, V_t]``; see :func:`~kdflow.ops.kernels.divergence_rows`."""
    student, teacher = work.student, work.teacher
    valid, others = (head.valid_vocab or head.vocab_size for head in (student, teacher))
    kind, a, b, c, factor = work.kernel_arguments()
    inv_t = 1.0 / work.divergence.temperature
    divergence_rows[(len(s),)](
        s, t, labels, kd, ce, student.vocab_size, s.stride(0), t.stride(0), min(valid, others), valid,
        student.scale / _LN2, teacher.scale / _LN2, (student.softcap or 0.0) / _LN2, (teacher.softcap or 0.0) / _LN2,
        inv_t, a, b, c, (1.0 - work.ce_weight) * factor * inv_t * student.scale, work.ce_weight * student.scale,
        KIND=kind.value, JENSEN=a == c and b == 1.0 - c, HAS_A=a != 0.0, HAS_B=b != 0.0,
        CAP_S=student.softcap is not None, CAP_T=teacher.softcap is not None, TEMPERED=inv_t != 1.0,
        HOLES=student.bias is not None or teacher.bias is not None, HAS_CE=labels is not None, GRADIENT=gradient,
        R=_LANES, num_warps=_WARPS,
    )  # fmt: skip


def matrix(height: int, width: int, like: Tensor) -> Tensor:
    """``[height, width]``, not filled, whose rows begin where 16-byte loads can."""
    return like.new_empty(height, math.ceil(width / 64) * 64)[:, :width]


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.T, out=out)
    else:
        torch.addmm(bias.to(rows.dtype), rows, weight.T, out=out)


def _summed(total: Tensor | None, gradients: Tensor, rows: Tensor) -> Tensor:
    """``total + gradientsᵀ · rows`` in fp32, in the place of ``total``."""
    if total is None:
        return torch.mm(gradients.T, rows, out_dtype=torch.float32)
    return torch.addmm(total, gradients.T, rows, out_dtype=torch.float32, out=total)
