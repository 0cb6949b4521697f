"""Sharded tensors made whole, many in one collective: one by one, each would wait for its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

BUCKET = 1 << 28  # bytes of whole tensors that are gathered at a time
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13


def whole(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each as a whole, in their order; every rank goes through all of them. What is no DTensor is whole already.

    DTensors are sharded along their first dimension, as FSDP does it; ranks of a replica gather among themselves.
    """
    bucket: list[DTensor] = []
    for tensor in tensors:
        if bucket and not (isinstance(tensor, DTensor) and _fits(bucket, tensor)):
            yield from _gathered(bucket)
            bucket = []
        if isinstance(tensor, DTensor):
            bucket.append(tensor)
        else:
            yield tensor
    if bucket:
        yield from _gathered(bucket)


def _fits(bucket: Sequence[Tensor], tensor: Tensor) -> bool:
    size = sum(one.numel() for one in (*bucket, tensor)) * tensor.element_size()
    return bucket[0].dtype == tensor.dtype and size <= BUCKET


def _gathered(bucket: Sequence[DTensor]) -> list[Tensor]:
    mesh = bucket[0].device_mesh
    dimension = next(number for number, placed in enumerate(bucket[0].placements) if placed.is_shard())
    ranks = mesh.size(dimension)
    mine = [one.to_local().detach() for one in bucket]
    if ranks == 1:
        return mine
    rows = [math.ceil(len(one) / ranks) for one in bucket]  # of each rank, the last ones of which have fewer
    sizes = [count * math.prod(one.shape[1:]) for count, one in zip(rows, bucket, strict=True)]
    parts = [part for one, size in zip(mine, sizes, strict=True)
             for part in (one.reshape(-1), one.new_zeros(size - one.numel()))]  # fmt: skip
    flat = torch.cat(parts)
    everyones = flat.new_empty(ranks * len(flat))
    _gather(everyones, flat, group=mesh.get_group(dimension))
    pieces = torch.split(everyones.view(ranks, -1), sizes, dim=1)
    return [
        piece.reshape(ranks * count, *one.shape[1:])[: len(one)]
        for piece, count, one in zip(pieces, rows, bucket, strict=True)
    ]
