"""New weights on their way into an engine, a bucket at a time, through memory of the student's process.

::

    student ──► a bucket in CUDA memory ──► the engine's schedulers, which open it themselves
                         └──► page-locked host memory: all weights, for an engine that has to be started again

A GPU's first weights, and all of a CPU's, are written to the host memory alone, and the schedulers read it there.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdflow.engines.sglang import cuda_runtime

# What SGLang's argument ``custom_weight_loader`` and the updates' ``load_format`` name.
LOADER = "kdflow.engines.sglang.weights.load"
BUCKET = 256 * 2**20  # bytes that an engine copies at a time, or those of a larger weight
_ALIGNED = 64


@dataclass(frozen=True)
class Weight:
    """Where a weight lies in the memory of all of them: plain data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Bucket:
    """Weights that an engine copies at a time, one behind the other, and where: plain data.

    Attributes:
        weights: in their order.
        path: the host memory that holds all weights.
        device: of the CUDA memory that holds these alone; None where there is none, and the host memory is read.
        handle: of that memory, in base 64.
    """

    weights: tuple[Weight, ...]
    path: str
    device: int | None = None
    handle: str = ""

    @property
    def start(self) -> int:
        """Offset of the first byte."""
        return self.weights[0].offset

    @property
    def size(self) -> int:
        """Bytes."""
        return self.weights[-1].offset + self.weights[-1].size - self.start

    def views(self, memory: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names and weights in the bytes of the bucket; no copies."""
        for one in self.weights:
            data = memory[one.offset - self.start :][: one.size]
            yield one.name, data.view(getattr(torch, one.dtype)).view(one.shape)

    def told(self) -> Tensor:
        """The bucket as bytes, which is all that an engine is sent."""
        return torch.frombuffer(bytearray(json.dumps(asdict(self)).encode()), dtype=torch.uint8)

    @classmethod
    def read(cls, told: Tensor) -> Bucket:
        """The bucket that :meth:`told` makes bytes of."""
        values = json.loads(told.cpu().numpy().tobytes())
        return cls(**{**values, "weights": tuple(Weight(**one) for one in values["weights"])})


# Is given a bucket, and whether it is the first and the last of all; whether the engine has taken it.
Take = Callable[[Bucket, bool, bool], bool]


class SharedWeights:
    """The newest weights, kept for an engine that has to be started again.

    Attributes:
        weights: which there are, as they have been written first.
        through_cuda: whether CUDA memory is to be used; whoever finds that the engine cannot open it says so.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._descriptor = device, os.memfd_create("kdflow-weights")
        self._cuda: tuple[cuda_runtime.Allocation, Tensor] | None = None
        self.weights: list[Weight] = []
        self.through_cuda = device.type == "cuda"

    @property
    def path(self) -> str:
        """What another process of this machine opens."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def write(self, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype, take: Take) -> bool:
        """Replace them all, held in ``dtype``; where each bucket has its turn in CUDA memory, ``take`` is given it.

        All weights are gone through, whatever becomes of the engine: other ranks take part in making them.

        Returns:
            Whether the engine has taken them all; if not, they are to be read from the host memory.
        """
        if not self.weights or not self.through_cuda:
            self._write_to_host(weights, dtype)
            return False
        allocation, host = self._cuda = self._cuda or self._allocate()
        memory, buckets, taken = allocation.tensor(torch.uint8), self.buckets(), True
        for number, bucket in enumerate(buckets):
            # The copies to the host of the bucket before are queued on the same stream: they are not overtaken.
            for (name, view), (given, tensor) in zip(bucket.views(memory), weights, strict=False):
                assert (name, view.shape) == (given, tensor.shape)
                view.copy_(tensor.detach())
            torch.cuda.current_stream(self._device).synchronize()
            host[bucket.start : bucket.start + bucket.size].copy_(memory[: bucket.size], non_blocking=True)
            handle = base64.b64encode(allocation.handle).decode()
            told = replace(bucket, device=self._device.index or 0, handle=handle)
            taken = taken and take(told, number == 0, number == len(buckets) - 1)
        torch.cuda.current_stream(self._device).synchronize()
        return taken

    def _write_to_host(self, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
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

    def _allocate(self) -> tuple[cuda_runtime.Allocation, Tensor]:
        """CUDA memory for the largest bucket, and the host memory, page-locked for as long as this process lives."""
        size = self.weights[-1].offset + self.weights[-1].size
        host = torch.frombuffer(mmap.mmap(self._descriptor, size), dtype=torch.uint8)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(int(runtime.cudaHostRegister(host.data_ptr(), size, 0)))
        return cuda_runtime.allocate(max(bucket.size for bucket in self.buckets()), self._device), host

    def buckets(self) -> list[Bucket]:
        """The weights in their order in the host memory, in groups of a bounded size, or of one that is larger."""
        groups: list[list[Weight]] = []
        for weight in self.weights:
            if not groups or weight.offset + weight.size - groups[-1][0].offset > BUCKET:
                groups.append([])
            groups[-1].append(weight)
        return [Bucket(tuple(group), self.path) for group in groups]

    def close(self) -> None:
        """Free the memory as soon as nothing maps it."""
        if self._cuda is not None:
            allocation, host = self._cuda
            self._cuda = None
            torch.cuda.cudart().cudaHostUnregister(host.data_ptr())  # type: ignore[no-untyped-call]
            allocation.free()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def load(model: Any, told: list[tuple[str, Tensor]]) -> None:
    """Copy the weights of a bucket into a model of SGLang, in a scheduler's process."""
    ((_, message),) = told
    bucket = Bucket.read(message)
    with opened(bucket) as memory:
        model.load_weights(bucket.views(memory))


@contextmanager
def opened(bucket: Bucket) -> Iterator[Tensor]:
    """The bytes of a bucket, for as long as the block lasts."""
    if bucket.device is None:
        descriptor = os.open(bucket.path, os.O_RDWR)
        try:
            before = bucket.start % mmap.ALLOCATIONGRANULARITY
            mapped = mmap.mmap(descriptor, before + bucket.size, offset=bucket.start - before)
        finally:
            os.close(descriptor)
        yield torch.frombuffer(mapped, dtype=torch.uint8)[before:]
        return
    there = cuda_runtime.opened(base64.b64decode(bucket.handle), bucket.size, torch.device("cuda", bucket.device))
    try:
        yield there.tensor(torch.uint8)
        torch.cuda.synchronize()
    finally:
        there.close()
