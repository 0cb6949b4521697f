"""Packed attention by cuDNN, where the package nvidia-cudnn-frontend is installed; torch brings FlashAttention 2.

Torch's own way to cuDNN plans anew at every call for samples of different lengths. Here a plan is kept for each number
of samples, longest sample and number of tokens, all rounded up to a power of two, so that few are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}


def has_cudnn(head_size: int) -> bool:
    """Whether the package is there, and takes heads of this size on this GPU."""
    return head_size % 8 == 0 and head_size <= 128 and _is_there()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_there() -> bool:
    return _found()


@cache
def _found() -> bool:
    try:
        version("nvidia-cudnn-frontend")
    except PackageNotFoundError:
        return False
    # Packed samples are for Hopper and later.
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


@torch.library.custom_op("kdflow::cudnn_attention", mutates_args=())
def cudnn_attention(
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
        ``[T, heads, D]``, and the log of the sum of each query's exponentials, ``[T, heads]``.
    """
    query, key, value = (x.contiguous() for x in (query, key, value))
    attended = torch.empty_like(query)
    log_sums = query.new_empty(query.shape[:2], dtype=torch.float32)
    plan = _forward_plan(_Shape.of(query, key, bounds, longest, scale, window))
    plan.run((query, key, value, attended, log_sums), bounds)
    return attended, log_sums


@torch.library.custom_op("kdflow::cudnn_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, log_sums: Tensor, bounds: Tensor,
    longest: int, scale: float | None, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, value, grad = (x.contiguous() for x in (query, key, value, grad))
    gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    plan = _backward_plan(_Shape.of(query, key, bounds, longest, scale, window))
    plan.run((query, key, value, attended, log_sums, grad, *gradients), bounds)
    return gradients


@cudnn_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, *output, bounds)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


cudnn_attention.register_autograd(_differentiate, setup_context=_save)


@dataclass(frozen=True)
class _Shape:
    """What a plan is made for."""

    samples: int
    longest: int
    tokens: int
    heads: int
    heads_kv: int
    size: int
    dtype: torch.dtype
    device: int
    scale: float
    window: int | None

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
    ) -> _Shape:
        tokens, heads, size = query.shape
        return cls(
            _up(len(bounds) - 1, 1), _up(longest, 64), _up(tokens, 64), heads, key.shape[1], size, query.dtype,
            query.device.index, size**-0.5 if scale is None else scale, window,
        )  # fmt: skip

    @property
    def heads_of(self) -> tuple[int, ...]:
        """Of queries, keys, values and what is attended: what offsets are multiples of, in tokens and numbers."""
        return self.heads, self.heads_kv, self.heads_kv, self.heads


def _up(count: int, least: int) -> int:
    """The next power of two, ``least`` at least."""
    return max(least, 1 << (count - 1).bit_length())


class _Plan:
    """A compiled graph, and the numbers of its inputs and outputs in the order in which they are given."""

    def __init__(self, shape: _Shape, backward: bool) -> None:
        cudnn, self._shape = _package(), shape
        self._handle = _handle(shape.device)
        self._graph = graph = cudnn.pygraph(
            io_data_type=getattr(cudnn.data_type, _DTYPES[shape.dtype]), compute_data_type=cudnn.data_type.FLOAT,
            intermediate_data_type=cudnn.data_type.FLOAT, handle=self._handle,
        )  # fmt: skip
        samples = shape.samples

        def per_sample(name: str, count: int, dtype: Any) -> Any:
            return graph.tensor(name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=dtype)

        self._lengths = per_sample("lengths", samples, cudnn.data_type.INT32)
        self._offsets = [
            per_sample(name, samples + 1, cudnn.data_type.INT64) for name in ("of q", "of k", "of v", "of o", "of sums")
        ]

        def packed(name: str, place: int) -> Any:
            heads, size = shape.heads_of[place], shape.size
            dim, stride = [samples, heads, shape.longest, size], [shape.longest * heads * size, size, heads * size, 1]
            tensor = graph.tensor(name=name, dim=dim, stride=stride)
            tensor.set_ragged_offset(self._offsets[place])
            return tensor

        def give(tensor: Any, place: int) -> Any:
            heads, size = shape.heads_of[place], shape.size
            tensor.set_output(True).set_dim([samples, heads, shape.longest, size])
            tensor.set_stride([shape.longest * heads * size, size, heads * size, 1])
            tensor.set_ragged_offset(self._offsets[place])
            return tensor

        sums_dim, sums_stride = (
            [samples, shape.heads, shape.longest, 1],
            [shape.longest * shape.heads, 1, shape.heads, 1],
        )
        query, key, value = (packed(name, place) for place, name in enumerate("qkv"))
        options = {
            "attn_scale": shape.scale, "use_padding_mask": True, "seq_len_q": self._lengths,
            "seq_len_kv": self._lengths, "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0, "diagonal_band_left_bound": shape.window,
        }  # fmt: skip
        if backward:
            attended, grad = packed("o", 3), packed("do", 3)
            sums = graph.tensor(name="sums", dim=sums_dim, stride=sums_stride, data_type=cudnn.data_type.FLOAT)
            sums.set_ragged_offset(self._offsets[4])
            found = graph.sdpa_backward(
                q=query, k=key, v=value, o=attended, dO=grad, stats=sums, max_total_seq_len_q=shape.tokens,
                max_total_seq_len_kv=shape.tokens, **options,
            )  # fmt: skip
            gradients = [give(tensor, place) for place, tensor in enumerate(found)]
            self._tensors = [query, key, value, attended, sums, grad, *gradients]
        else:
            attended, sums = graph.sdpa(q=query, k=key, v=value, generate_stats=True, **options)
            give(attended, 3)
            sums.set_output(True).set_data_type(cudnn.data_type.FLOAT).set_dim(sums_dim).set_stride(sums_stride)
            sums.set_ragged_offset(self._offsets[4])
            self._tensors = [query, key, value, attended, sums]
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self._workspace = graph.get_workspace_size()

    def run(self, tensors: tuple[Tensor, ...], bounds: Tensor) -> None:
        """Queue it on the current stream."""
        shape, device = self._shape, bounds.device
        lengths, offsets = _offsets(bounds, shape)
        workspace = torch.empty(self._workspace, device=device, dtype=torch.uint8)
        given = {
            **dict(zip(self._tensors, tensors, strict=True)), self._lengths: lengths,
            **dict(zip(self._offsets, offsets, strict=True)),
        }  # fmt: skip
        _package().set_stream(handle=self._handle, stream=torch.cuda.current_stream(device).cuda_stream)
        self._graph.execute(given, workspace, handle=self._handle)


def _offsets(bounds: Tensor, shape: _Shape) -> tuple[Tensor, Tensor]:
    """Lengths of all samples, with those that fill up, ``[B]``; and where each begins, in numbers, ``[5, B + 1]``."""
    padding = bounds[-1:].expand(shape.samples + 1 - len(bounds))
    whole = torch.cat([bounds, padding])
    per_token = [*(heads * shape.size for heads in shape.heads_of), shape.heads]
    return whole.diff(), whole * _column(tuple(per_token), bounds.device)


@cache
def _column(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None]


@cache
def _forward_plan(shape: _Shape) -> _Plan:
    return _Plan(shape, backward=False)


@cache
def _backward_plan(shape: _Shape) -> _Plan:
    return _Plan(shape, backward=True)


@cache
def _handle(device: int) -> Any:
    with torch.cuda.device(device):
        return _package().create_handle()


@cache
def _package() -> Any:
    return import_module("cudnn")
