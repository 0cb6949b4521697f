"""Heads of every kind, and their logits written out plainly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdflow import Head

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
