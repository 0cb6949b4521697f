"""Packed attention by FlashAttention 3 or 4, where one of them is installed; torch itself brings version 2.

An operator of its own, since the packages' functions cannot be compiled, and torch's way to them knows one version of
each alone.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def has_flash(head_size: int) -> bool:
    """Whether a version is there that is made for this GPU and heads of this size."""
    # The size may be a symbol, where models with heads of other sizes have been compiled before.
    least, most = _sizes()
    return head_size % 8 == 0 and least <= head_size <= most


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _sizes() -> tuple[int, int]:
    """The smallest and the largest head that the version takes."""
    return {3: (8, 256), 4: (64, 128), None: (1, 0)}[_version()]  # which is cached: the compiler looks into caches


@cache
def _version() -> int | None:
    """The fastest that is there."""
    capability = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if capability == 9 and _has_version_3():
        return 3
    return 4 if capability in (9, 10) and _has_version_4() else None


def _has_version_3() -> bool:
    try:
        return find_spec("flash_attn_3._C") is not None  # there is an empty package of its name
    except ModuleNotFoundError:
        return False


def _has_version_4() -> bool:
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return False
    return True


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
    if _version() == 3:
        attended, log_sums, *_ = _version_3().fwd(
            query, key, value, num_splits=1, **_masks(bounds, longest, scale, window)
        )
    else:
        # Newer versions return more.
        attended, log_sums, *_ = _version_4()._flash_attn_fwd(
            query, key, value, return_lse=True, **_masks(bounds, longest, scale, window)
        )
    return attended, log_sums


@torch.library.custom_op("kdflow::flash_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, log_sums: Tensor, bounds: Tensor,
    longest: int, scale: float | None, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    read, masks = (query, key, value, attended), _masks(bounds, longest, scale, window)
    gradients: tuple[Tensor, Tensor, Tensor]
    if _version() == 3:
        gradients = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        _version_3().bwd(grad.contiguous(), *read, log_sums, *gradients, **masks)
    else:
        gradients = _version_4()._flash_attn_bwd(*read, grad.contiguous(), log_sums, **masks)
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


def _masks(bounds: Tensor, longest: int, scale: float | None, window: int | None) -> dict[str, Any]:
    """What forward and backward pass are told alike."""
    shared = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest,
              "softmax_scale": scale}  # fmt: skip
    left = None if window is None else window - 1
    if _version() == 3:
        return {**shared, "is_causal": True, "window_size_left": -1 if left is None else left, "window_size_right": 0}
    return {**shared, "causal": True, "window_size_left": left}


@cache
def _version_3() -> Any:
    import_module("flash_attn_3._C")  # which registers its operators
    return torch.ops.flash_attn_3


@cache
def _version_4() -> Any:
    return import_module("flash_attn.cute.interface")
