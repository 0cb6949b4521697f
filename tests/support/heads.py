"""Heads of every kind, and their logits written out plainly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from kdflow import Divergence, Head
from kdflow.ops import divergence_sum

Operand = tuple[Tensor, Head, "Tensor | slice | None"]


def plain_logits(rows: Tensor, head: Head, columns: Tensor | slice | None = None) -> Tensor:
    """``softcap · tanh((h Wᵀ + bias) · scale / softcap)``, padding at -inf, columns chosen last."""
    logits = rows @ head.weight.T
    logits = (logits if head.bias is None else logits + head.bias) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if head.valid_vocab is not None:
        logits = logits.masked_fill(torch.arange(len(head.weight)) >= head.valid_vocab, -torch.inf)
    return logits if columns is None else logits[:, columns]


def plain_sum(fn: Callable[..., Tensor], operands: Sequence[Operand], row_args: Sequence[Tensor] = ()) -> Tensor:
    """What ``row_sum`` computes, all rows at once."""
    return fn(*(plain_logits(*operand) for operand in operands), *row_args).sum()


def relative_errors(
    tensors: Sequence[Tensor], divergence: Divergence, ce_weight: float, head: Mapping[str, Any]
) -> tuple[list[float], list[float]]:
    """Errors against fp64 of loss, rows' and weight's gradient in bf16: of ``divergence_sum``, and of plain torch.

    Args:
        tensors: student's rows and weight, teacher's rows and weight; bf16, vocabularies of one size.
        divergence: at its own temperature.
        ce_weight: share of the cross-entropy with tokens 0, 7, 14 …
        head: what both heads have.
    """

    def results(dtype: torch.dtype, plain: bool) -> list[Tensor]:
        rows, weight, others, other_weight = (x.detach().to(dtype) for x in tensors)
        leaves = [x.requires_grad_() for x in (rows, weight)]
        student, teacher = Head(weight, **head), Head(other_weight, **head)
        labels = torch.arange(len(rows), device=rows.device) * 7
        if not plain:
            loss = divergence_sum(rows, student, others, teacher, divergence, targets=labels, ce_weight=ce_weight)
        else:
            logits, expected = (one.logits(x)[:, : one.valid_vocab] for one, x in ((student, rows), (teacher, others)))
            loss = (1 - ce_weight) * divergence(logits, expected).sum()
            if ce_weight:
                logits = logits if dtype == torch.float64 else logits.float()
                loss = loss + ce_weight * cross_entropy(logits, labels, reduction="sum")
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    exact = results(torch.float64, plain=True)
    ours, theirs = (
        [float((x.double() - y).norm() / y.norm()) for x, y in zip(results(torch.bfloat16, plain), exact, strict=True)]
        for plain in (False, True)
    )
    return ours, theirs


def trainable(*tensors: Tensor) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point()]


def parameters(operands: Sequence[Operand]) -> list[Tensor]:
    """Everything in ``operands`` that a gradient can reach."""
    return [tensor for rows, head, _ in operands for tensor in (rows, *head.parameters())]


@st.composite
def heads(draw: st.DrawFn, vocab: int, hidden: int, generator: torch.Generator) -> Head:
    """A head in fp64 with any of bias, scale, soft-cap and padding."""
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    return Head(
        weight,
        bias,
        scale=draw(st.sampled_from((1.0, 0.25))),
        softcap=draw(st.sampled_from((None, 3.0))),
        valid_vocab=draw(st.sampled_from((None, vocab, vocab - 2))),
    )


class Sizes(TorchDispatchMode):
    """Records the shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.shapes.add(tensor.shape)
        return result
