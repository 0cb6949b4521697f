"""The distillation head with a kernel: bf16 products, one kernel between them, gradients formed in the forward pass.

Of a chunk of rows the student's logits live once, and their gradient takes their place; the teacher's live half of a
chunk at a time, but on a CPU a whole one: its products of half as many rows take well over half as long. The gradient
of the head's weight is summed over chunks in fp32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdflow.contracts import Divergence, Head
from kdflow.ops.cross_entropy import weighted
from kdflow.ops.distillation import Distillation
from kdflow.ops.forms import Form
from kdflow.ops.gradients import once_differentiable, without_autocast
from kdflow.ops.row_sum import even_rows_per_chunk, scaled
from kdflow.ops.tuning import Blocks, fastest

_TEACHER_ROWS = 2048  # at a time, at most: as many as a product takes well
_CUDA_ELEMENTS = 5 * 2**28  # of the student's logits at a time, 2.5 GiB: each chunk adds to the gradient of the head
_CPU_ELEMENTS = 2**26  # on a CPU, 128 MiB
# On a CPU, of the product that sums over the vocabulary: oneDNN takes twice as long for 450 rows as for these at a time
# (an Intel Xeon with AMX, torch 2.13).
_CPU_SUMMED_ROWS = 256

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


def tuned(work: Distillation, height: int, run: Callable[[Launch], object]) -> Launch:
    """Triton's kernel with the blocks that are the fastest for gradients of ``height`` rows, which ``run`` computes."""
    from kdflow.ops import kernels

    def launch_in(blocks: Blocks) -> Launch:
        return functools.partial(kernels.launch, blocks=blocks)

    student, teacher = work.student, work.teacher
    sizes = {name: list(head.weight.shape) for name, head in (("student", student), ("teacher", teacher))}
    key = {**kernels.constants(work, True), **sizes, "code": kernels.divergence_rows.cache_key}
    return launch_in(fastest(key, height * student.vocab_size, lambda blocks: run(launch_in(blocks))))


def kernel_chunk(count: int, vocab_size: int, device: torch.device) -> tuple[int, int]:
    """How many of ``count`` rows of the student's logits, and of the teacher's, a kernel's head takes at a time."""
    if device.type != "cuda":
        rows = even_rows_per_chunk(count, vocab_size, _CPU_ELEMENTS)
        return rows, rows
    rows = even_rows_per_chunk(count, vocab_size, _CUDA_ELEMENTS)
    return rows, min(math.ceil(rows / 2), _TEACHER_ROWS)


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
    with without_autocast(rows):
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
        size, part = kernel_chunk(count, work.student.vocab_size, rows.device)
        products, others = (
            matrix(height, head.vocab_size, rows)
            for height, head in ((min(size, count), work.student), (min(part, count), work.teacher))
        )
        own, theirs = weight.to(rows.dtype), work.teacher.weight.to(rows.dtype)
        kd, ce = rows.new_empty(count, dtype=torch.float32), rows.new_zeros(count, dtype=torch.float32)
        d_rows = torch.empty_like(rows) if for_rows else None
        d_weight = None
        # Of a CPU's only chunk this gradient waits for its factor, which afterwards would cost a pass over all of it.
        waits = for_weight and not rows.is_cuda and count <= size
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and for_bias else None

        def diverge(launch: Launch, here: slice, s: Tensor) -> None:
            """From some rows to their divergences, and to the gradient of their logits in ``s``."""
            t = others[: here.stop - here.start]
            _product(rows[here], own, bias, s)
            _product(work.teacher_rows[here], theirs, work.teacher.bias, t)
            labels = None if work.labels is None else work.labels[here]
            launch(s, t, labels, kd[here], ce[here], work, gradient)

        launch = kernel_of(rows.device)
        if rows.is_cuda and gradient:
            few = slice(0, min(part, size, count))
            launch = tuned(work, few.stop, lambda tried: diverge(tried, few, products[few]))
        for start in range(0, count, size):
            stop = min(start + size, count)
            for first in range(start, stop, part):
                here = slice(first, min(first + part, stop))
                diverge(launch, here, products[first - start : here.stop - start])
            chunk, gradients = slice(start, stop), products[: stop - start]
            if d_rows is not None:
                _over_vocabulary(gradients, own, d_rows[chunk])
            if for_weight and not waits:
                d_weight = _summed(d_weight, gradients, rows[chunk])
            if d_bias is not None:
                d_bias += gradients.sum(0, dtype=torch.float32)
        if work.labels is not None:  # an id that is no token is not there to be found, and infinitely unlikely
            ce.masked_fill_((work.labels < 0) | (work.labels >= work.columns[1]), math.inf)
        ctx.save_for_backward(d_rows, d_weight, d_bias, *((products, rows) if waits else (None, None)))
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (rows, weight, bias)]
        kd_sum, ce_sum = kd.sum() * work.numbers().factor, ce.sum()
        loss = weighted(kd_sum, ce_sum, work.ce_weight).clone()  # another tensor than both, of which none is learnt
        ctx.mark_non_differentiable(kd_sum, ce_sum)
        return loss, kd_sum, ce_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *sums, gradients, rows = ctx.saved_tensors
        of_rows, of_weight, of_bias = (
            None if g is None else scaled(g, grad, dtype) for g, dtype in zip(sums, ctx.dtypes, strict=True)
        )
        if gradients is not None:
            unread = rows.new_empty(())
            with without_autocast(rows):
                of_weight = torch.addmm(unread, gradients.T, rows, beta=0, alpha=float(grad)).to(ctx.dtypes[1])
        return None, of_rows, of_weight, of_bias


def matrix(height: int, width: int, like: Tensor) -> Tensor:
    """``[height, width]``, not filled, whose rows begin where 16-byte loads can."""
    whole = like.new_empty(height, math.ceil(width / 64) * 64)
    if whole.device.type == "cpu":
        # On CPUs with AMX, products with it read a little beyond its rows (oneDNN 3.12): that is multiplied by 0, which
        # what is no number survives.
        whole[:, width:] = 0
    return whole[:, :width]


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.T, out=out)
    else:
        torch.addmm(bias.to(rows.dtype), rows, weight.T, out=out)


def _over_vocabulary(gradients: Tensor, weight: Tensor, out: Tensor) -> None:
    """The rows' gradients."""
    parts = 1 if gradients.is_cuda else math.ceil(len(gradients) / _CPU_SUMMED_ROWS)
    for some, into in zip(gradients.tensor_split(parts), out.tensor_split(parts), strict=True):
        torch.mm(some, weight, out=into)


def _summed(total: Tensor | None, gradients: Tensor, rows: Tensor) -> Tensor:
    """``total + gradientsᵀ · rows`` in fp32, in the place of ``total``."""
    if rows.is_cuda:
        if total is None:
            return torch.mm(gradients.T, rows, out_dtype=torch.float32)
        return torch.addmm(total, gradients.T, rows, out_dtype=torch.float32, out=total)
    product = torch.mm(gradients.T, rows)
    return product.float() if total is None else total.add_(product)
