"""Packed attention by FlashAttention 4, where the package flash-attn-4 is installed; torch itself brings version 2.

An operator of its own, since the package's functions cannot be compiled, and torch's way to them knows one version of
the package alone.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor


def has_flash(head_size: int) -> bool:
    """Whether the package is there, and made for this GPU and heads of this size."""
    # The size may be a symbol, where models with heads of other sizes have been compiled before.
    return head_size % 8 == 0 and 64 <= head_size <= 128 and _is_there()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_there() -> bool:
    return _found()  # a function of its own, since the compiler looks into caches


@cache
def _found() -> bool:
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


@torch.library.custom_op("kdflow::flash_attention", mutates_args=())
def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each sample.

    Args:
        query: ``[T, heads, D]``, bf16 or fp16.
        key: ``[T, heads_kv, D]``.
        value: ``[T, heads_kv, D]``.
        bounds: ``[B + 1]``, int32, where samples begin and end.
        longest: tokens of the longest sample.
        scale: of the scores.
        window: how far back a token sees, itself included.

    Returns:
        ``[T, heads, D]``, and the log of the sum of each query's exponentials, ``[heads, T]``.
    """
    # Newer versions return more.
    attended, log_sums, *_ = _package()._flash_attn_fwd(
        query, key, value, max_seqlen_q=longest, max_seqlen_k=longest, return_lse=True, **_masks(bounds, scale, window)
    )
    return attended, log_sums


@torch.library.custom_op("kdflow::flash_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, log_sums: Tensor, bounds: Tensor,
    longest: int, scale: float | None, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients: tuple[Tensor, Tensor, Tensor] = _package()._flash_attn_bwd(
        query, key, value, attended, grad.contiguous(), log_sums, max_seqlen_q=longest, max_seqlen_k=longest,
        **_masks(bounds, scale, window),
    )  # fmt: skip
    return gradients


@flash_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, *output, bounds)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


flash_attention.register_autograd(_differentiate, setup_context=_save)


def _masks(bounds: Tensor, scale: float | None, window: int | None) -> dict[str, Any]:
    """What forward and backward pass are told alike."""
    return {
        "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "softmax_scale": scale, "causal": True,
        "window_size_left": None if window is None else window - 1,
    }  # fmt: skip


@cache
def _package() -> Any:
    return import_module("flash_attn.cute.interface")
