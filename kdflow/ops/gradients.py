"""What the functions with gradients of their own have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., "Tensor | tuple[Tensor | None, ...]"]


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A block in which operations on the tensor's device keep the dtypes that they are given.

    Autocast would round sums to bf16, which stop growing, and keep a copy of a head's weight for each chunk.
    """
    return torch.autocast(tensor.device.type, enabled=False)


def once_differentiable(backward: Backward) -> Backward:
    """A backward pass that refuses to be differentiated itself.

    torch's own decorator lets it pass where the incoming gradient is a constant, as that of a loss is, and the second
    derivative lacks what this function adds to it.

    Raises:
        RuntimeError: the backward pass runs with ``create_graph=True``.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        # The compiler traces this with gradients on, and refuses second derivatives by itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "kdflow's losses can be differentiated once, and create_graph=True asks for more: their gradients have "
                "no graph; for second derivatives write the divergence in plain torch"
            )
        return backward(ctx, *gradients)

    return checked
