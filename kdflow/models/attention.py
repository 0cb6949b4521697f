"""Attention over packed samples, through transformers' own interface: it never crosses from one sample to another."""

from __future__ import annotations

import inspect
import logging
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kdflow.models.flash import flash_attention, has_flash

PACKED = "kdflow_packed"
# Which arguments this torch's varlen_attn takes: they changed between 2.11 and 2.13.
_VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
_log = logging.getLogger("kdflow")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sample.

    Args:
        module: the attention layer.
        query: ``[1, heads, T, D]``; key and value may have fewer heads.
        key: ``[1, heads_kv, T, D]``.
        value: ``[1, heads_kv, T, D]``.
        attention_mask: None: the samples are told by ``cu_seqlens``.
        scaling: of the scores.
        sliding_window: how far back a token sees, itself included.
        softcap: bound on the scores (Gemma 2).
        s_aux: attention sinks (gpt-oss), ``[heads]``.
        cu_seqlens: ``[B + 1]``, where samples begin and end; without it the sequence is one sample, or one new token
            against a cache.
        longest: tokens of the longest sample.

    Returns:
        ``[1, T, heads, D]``, and no weights.
    """
    if query.shape[0] != 1:
        raise ValueError(f"packed attention takes one row of samples, not {query.shape[0]}: it is not told of padding")
    if cu_seqlens is not None and query.is_cuda and query.element_size() < 4:
        if softcap is None and s_aux is None:
            return _varlen(query, key, value, scaling, sliding_window, cu_seqlens, longest or query.shape[2]), None
        _say_once(f"{type(module).__name__} uses soft-capped scores or attention sinks: samples run one at a time")
    attended = _sample_by_sample(query, key, value, scaling, sliding_window, softcap, s_aux, cu_seqlens)
    return attended.transpose(1, 2).contiguous(), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # bounds differ in every batch: each would be compiled anew
def _sample_by_sample(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None,
                      softcap: float | None, sinks: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:  # fmt: skip
    if cu_seqlens is None:  # one sample; with a cache its keys reach further back than its queries
        return _one(query, key, value, scaling, window, softcap, sinks)
    bounds = cu_seqlens.tolist()
    spans = [slice(start, stop) for start, stop in pairwise(bounds)]
    pieces = [_one(query[:, :, at], key[:, :, at], value[:, :, at], scaling, window, softcap, sinks) for at in spans]
    return torch.cat(pieces, dim=2)


def _one(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, softcap: float | None,
         sinks: Tensor | None) -> Tensor:  # fmt: skip
    """Attention of one sample, ``[1, heads, t, D]``."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    new, seen = query.shape[2], key.shape[2]
    if softcap is None and sinks is None:
        # With is_causal, torch counts both from the beginning: right only where queries and keys are the same tokens.
        if new in (1, seen) and (window is None or seen <= window):
            return scaled_dot_product_attention(query, key, value, is_causal=new > 1, scale=scaling)
        mask = _visible(new, seen, window, query.device)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~_visible(new, seen, window, query.device), float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., :seen].to(value.dtype)
    return weights @ value


def _visible(new: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query sees, ``[new, seen]``."""
    position = torch.arange(seen - new, seen, device=device)[:, None]
    keys = torch.arange(seen, device=device)[None]
    visible = keys <= position
    return visible if window is None else visible & (keys > position - window)


def _varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, cu_seqlens: Tensor,
            longest: int) -> Tensor:  # fmt: skip
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    if has_flash(query.shape[-1]):
        return cast(Tensor, flash_attention(query, key, value, cu_seqlens, longest, scaling, window)[0][None])
    options: dict[str, Any] = {"scale": scaling} if "scale" in _VARLEN_OPTIONS else {}
    if "window_size" in _VARLEN_OPTIONS:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    if "enable_gqa" in _VARLEN_OPTIONS:  # without it, fewer heads of keys are taken unasked
        options["enable_gqa"] = True
    attended: Any = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)
    return cast(Tensor, attended[None])


@cache
def _say_once(message: str) -> None:
    _log.warning(message)


AttentionInterface.register(PACKED, packed_attention)
