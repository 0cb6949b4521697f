"""New weights on their way into an engine: in memory that both processes map, a bucket at a time."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BUCKET = 256 * 2**20  # bytes that SGLang copies at a time
_ALIGNED = 64


@dataclass(frozen=True)
class Weight:
    """Where a weight lies in the memory: plain data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class SharedWeights:
    """The newest weights, kept for an engine that has to be started again."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("kdflow-weights")
        self.weights: list[Weight] = []

    @property
    def path(self) -> str:
        """What another process of this machine opens."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def write(self, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        """Replace them all, held in ``dtype``."""
        found, offset = list[Weight](), 0
        for name, tensor in weights:
            held = tensor.detach().to("cpu", dtype).contiguous()
            data = held.view(-1).view(torch.uint8).numpy().data
            written = 0
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], offset + written)
            found.append(Weight(name, str(dtype).removeprefix("torch."), tuple(held.shape), offset, len(data)))
            offset += -(-len(data) // _ALIGNED) * _ALIGNED
        self.weights = found

    def buckets(self) -> list[list[Weight]]:
        """The weights in their order, in groups of a bounded size, or of one that is larger."""
        buckets: list[list[Weight]] = []
        for weight in self.weights:
            if not buckets or weight.offset + weight.size - buckets[-1][0].offset > _BUCKET:
                buckets.append([])
            buckets[-1].append(weight)
        return buckets

    def close(self) -> None:
        """Free the memory as soon as nothing maps it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read(path: str, bucket: list[Weight]) -> list[tuple[str, Tensor]]:
    """The weights of a bucket, in the engine's process; views of the memory, for as long as nobody writes."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        start = bucket[0].offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(descriptor, bucket[-1].offset + bucket[-1].size - start, offset=start)
    finally:
        os.close(descriptor)
    return [
        (one.name, torch.frombuffer(mapped, dtype=torch.uint8, offset=one.offset - start, count=one.size)
         .view(getattr(torch, one.dtype)).view(one.shape))
        for one in bucket
    ]  # fmt: skip
