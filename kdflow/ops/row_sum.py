"""Sums over rows of a function of logits, a chunk of rows at a time: memory grows with the chunk, not with N · V."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kdflow.contracts import Head
from kdflow.ops.gradients import once_differentiable, without_autocast

_log = logging.getLogger("kdflow")

Operand = tuple[Tensor, Head, "Tensor | slice | None"]
RowFunction = Callable[..., "Tensor | tuple[Tensor, ...]"]

# Without an explicit chunk: this many logits of the widest operand at a time (256 MiB in fp32); where chunks are even,
# on a GPU, more (1.25 GiB in bf16), since each chunk adds to the gradient of the head.
_DEFAULT_ELEMENTS, _EVEN_ELEMENTS = 2**26, 5 * 2**27
_EVEN_MULTIPLE = 256  # of rows, which a product takes well
# What the compiler failed on in this process, which does not try it again.
_failures: list[str] = []
_chunk_rows: ContextVar[int | None] = ContextVar("chunk_rows", default=None)


@contextlib.contextmanager
def chunk_rows(rows: int | None) -> Iterator[None]:
    """Set how many rows the sums inside the block take at a time; None chooses by the size of the vocabulary."""
    if rows is not None and rows < 1:
        raise ValueError(f"a chunk holds at least 1 row, not {rows}")
    token = _chunk_rows.set(rows)
    try:
        yield
    finally:
        _chunk_rows.reset(token)


def rows_per_chunk(widest: int) -> int:
    """How many rows are taken at a time where the widest operand has ``widest`` columns."""
    return _chunk_rows.get() or max(1, _DEFAULT_ELEMENTS // widest)


def even_rows_per_chunk(count: int, widest: int, elements: int = _EVEN_ELEMENTS) -> int:
    """How many of ``count`` rows are taken at a time, in chunks of about the same size, at most ``elements`` logits."""
    most, count = _chunk_rows.get() or max(1, elements // widest), max(1, count)
    even = math.ceil(count / math.ceil(count / most))
    return min(most, math.ceil(even / _EVEN_MULTIPLE) * _EVEN_MULTIPLE)


def row_sum(
    fn: RowFunction,
    operands: Sequence[Operand],
    row_args: Sequence[Tensor] = (),
    groups: Tensor | None = None,
    *,
    compiled: bool = False,
) -> Any:
    """Sum ``fn(*logits, *row_args)`` over rows, with gradients for rows, trainable heads and row arguments.

    Args:
        fn: takes the logits of a chunk, ``[n, V]`` for each operand, and the chunk of each row argument; returns
            ``[n]`` values, or a tuple of such whose first is differentiated and whose others are only summed. Tensors
            that it closes over get no gradient.
        operands: ``(rows [N, H], head, columns)``, all with the same N; ``columns`` selects vocabulary columns
            before the product, None means all.
        row_args: tensors ``[N, ...]``.
        groups: ``[N]``, ascending; rows of one group never straddle a chunk.
        compiled: whether a chunk, its products and ``fn`` go through ``torch.compile``. ``fn`` should be an object
            whose attributes say all: a function made anew is compiled anew.

    Returns:
        The sum as a scalar, in fp32 or fp64, or a tuple of sums where ``fn`` returns a tuple. With N = 0 every
        gradient is zero, not absent, so that ranks of a sharded model stay in step.
    """
    count = same_count([rows for rows, _, _ in operands], row_args)
    if groups is not None and groups.shape != (count,):
        raise ValueError(f"groups must name the group of each of {count} rows, not have the shape {list(groups.shape)}")
    heads, columns = tuple(head for _, head, _ in operands), tuple(columns for _, _, columns in operands)
    plan = _Plan(fn, heads, columns, len(row_args), torch.is_grad_enabled(), compiled and not _failures)
    tensors = [tensor for rows, head, _ in operands for tensor in (rows, *head.parameters())] + list(row_args)
    try:
        with without_autocast(tensors[0]):
            sums = _RowSum.apply(plan, _chunk_bounds(count, plan, groups), *tensors)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if not plan.compiled or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        _failures.append(str(error).strip().splitlines()[0])
        _log.warning(f"goes on without torch.compile, slower and with more memory: it fails on {fn}: {_failures[-1]}")
    else:
        return sums if plan.returns_tuple else sums[0]
    return row_sum(fn, operands, row_args, groups)  # in the chunks that it takes plainly


def same_count(rows: Sequence[Tensor], row_args: Sequence[Tensor]) -> int:
    """How many rows there are; ValueError where not every tensor has as many."""
    lengths, others = ([len(tensor) for tensor in tensors] for tensors in (rows, row_args))
    if len({*lengths, *others}) > 1:
        raise ValueError(f"operands and row arguments need the same number of rows, not {lengths} and {others}")
    return lengths[0]


@dataclass
class _Plan:
    """How the flat list of tensors is put together again for one chunk."""

    fn: RowFunction
    heads: tuple[Head, ...]
    columns: tuple[Tensor | slice | None, ...]
    row_args: int
    differentiate: bool
    compiled: bool
    returns_tuple: bool = False

    def is_row_aligned(self) -> list[bool]:
        """Which of the flat tensors are cut by rows; the others are parameters of a head."""
        aligned: list[bool] = []
        for head in self.heads:
            aligned += [True] + [False] * len(head.parameters())
        return aligned + [True] * self.row_args

    def call(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        compute = _values
        if self.compiled:
            compute = _compiled_values()
            for tensor, rows in zip(tensors, self.is_row_aligned(), strict=True):
                if rows:  # chunks of other lengths need no other code
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        values = compute(self.fn, self.heads, self.columns, tensors)
        self.returns_tuple = isinstance(values, tuple)
        return tuple(value.sum() for value in (values if isinstance(values, tuple) else (values,)))


def _values(
    fn: RowFunction, heads: Sequence[Head], columns: Sequence[Tensor | slice | None], tensors: Sequence[Tensor]
) -> Tensor | tuple[Tensor, ...]:
    """``fn`` of a chunk: of its logits, and of what follows the operands among the flat tensors."""
    logits, at = [], 0
    for head, selected in zip(heads, columns, strict=True):
        width = len(head.parameters())
        rows, parameters = tensors[at], tensors[at + 1 : at + 1 + width]
        logits.append(head.with_parameters(parameters).logits(rows, selected))
        at += 1 + width
    return fn(*logits, *tensors[at:])


@cache
def _compiled_values() -> Callable[..., Any]:
    return torch.compile(_values)


def _chunk_bounds(count: int, plan: _Plan, groups: Tensor | None) -> list[tuple[int, int]]:
    if count == 0:
        return [(0, 0)]  # one empty chunk, so that zero gradients have their shapes
    widest = max(head.vocab_size for head in plan.heads)
    size = even_rows_per_chunk(count, widest) if plan.compiled else rows_per_chunk(widest)
    if groups is None:
        return [(start, min(start + size, count)) for start in range(0, count, size)]
    # Where a group begins; a chunk is the longest run of whole groups that fits, or one group that does not.
    starts = [0, *((groups[1:] != groups[:-1]).nonzero().flatten() + 1).tolist(), count]
    bounds, first = [], 0
    for here, following in pairwise(starts[1:]):
        if following - first > size:
            bounds.append((first, here))
            first = here
    return [*bounds, (first, count)]


class _RowSum(torch.autograd.Function):
    """Computes gradients in the forward pass, chunk by chunk, so that no logits outlive their chunk."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, bounds: list[tuple[int, int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        aligned = plan.is_row_aligned()
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad[2:]) if needs and plan.differentiate]
        # Rows are written once; what every chunk adds to is summed in fp32 at least.
        gradients = {i: torch.zeros_like(tensors[i]) if aligned[i] else None for i in wanted}
        totals: list[Tensor] = []
        for start, stop in bounds:
            with torch.set_grad_enabled(bool(wanted)):
                chunk = [
                    (tensor[start:stop] if rows else tensor).detach().requires_grad_(i in gradients)
                    for i, (tensor, rows) in enumerate(zip(tensors, aligned, strict=True))
                ]
                sums = plan.call(chunk)
            if wanted and sums[0].requires_grad:
                leaves = [chunk[i] for i in wanted]
                found: tuple[Tensor | None, ...] = torch.autograd.grad(sums[0], leaves, allow_unused=True)
                for i, gradient in zip(wanted, found, strict=True):
                    if gradient is None:
                        continue
                    if (total := gradients[i]) is None:
                        gradients[i] = gradient if len(bounds) == 1 else _at_least_fp32(gradient)
                    elif aligned[i]:
                        total[start:stop] = gradient
                    else:
                        total += gradient
            detached = [value.detach() for value in sums]
            totals = [total + value for total, value in zip(totals, detached, strict=True)] if totals else detached
        complete = (torch.zeros_like(tensors[i]) if (g := gradients[i]) is None else g for i in wanted)
        ctx.save_for_backward(*(gradient.to(tensors[i].dtype) for i, gradient in zip(wanted, complete, strict=True)))
        ctx.wanted, ctx.count = wanted, len(tensors)
        ctx.mark_non_differentiable(*totals[1:])
        return tuple(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * ctx.count
        for i, gradient in zip(ctx.wanted, ctx.saved_tensors, strict=True):
            result[i] = scaled(gradient, grad, gradient.dtype)
        return (None, None, *result)


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` times a factor without dimensions, in ``dtype``."""
    if not tensor.is_cuda:
        return (tensor * factor).to(dtype)
    # A GPU would round such a factor to bf16, which would bias all gradients alike; and this is one pass.
    return torch.mul(tensor, factor.reshape(1), out=torch.empty_like(tensor, dtype=dtype))


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor
