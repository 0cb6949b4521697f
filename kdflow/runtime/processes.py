"""Process groups and the device of this process: one object owns them."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kdflow.contracts import KdflowError
from kdflow.runtime.run_directory import differences

# Names the file in which the ranks meet that kdflow itself has launched.
STORE = "KDFLOW_STORE"
# How long a rank waits for others: one of them may wait for an engine that hangs and is started again. NCCL's own ten
# minutes are as long as an engine may take to answer. Groups of replicas keep them: torch takes no other there.
_PATIENCE = timedelta(hours=2)


class Processes:
    """The ranks of a run, as torchrun announces them, or this process alone.

    Args:
        replicas: groups of consecutive ranks that hold a whole student each, sharded over the ranks of the group.

    Attributes:
        rank: of this process.
        size: how many ranks there are.
        device: of this process.
        mesh: all ranks, over which the student is sharded; of several replicas, (replica, shard).
        whole: whether each rank holds a whole student: there is one, or as many replicas.
        host_mesh: the same ranks, for copies in host memory.
        control: a gloo group, for objects.
        background: another, for the collectives of the checkpoint's thread: of two threads on one group, ranks would
            see different orders.
    """

    def __init__(self, replicas: int = 1) -> None:
        self._owner = not dist.is_initialized()
        cuda = torch.cuda.is_available()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if cuda and local_rank >= torch.cuda.device_count():
            raise KdflowError(
                f"rank {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. Start fewer "
                "processes, or train on the CPU with CUDA_VISIBLE_DEVICES= (empty)"
            )
        self.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
            _forget_old_products()
        if self._owner:
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            if (file := os.environ.get(STORE)) is not None:
                rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
                store = FileStore(file, size)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
            elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
                dist.init_process_group(backend, timeout=_PATIENCE)
            else:
                dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        try:
            require_groups(replicas, self.size)
        except KdflowError:
            self.__exit__(None, None, None)
            raise
        shape = (self.size,) if replicas == 1 else (replicas, self.size // replicas)
        names = ("shard",) if replicas == 1 else ("replica", "shard")
        self.whole = shape[-1] == 1
        self.mesh: DeviceMesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        self.host_mesh = self.mesh if not cuda else init_device_mesh("cpu", shape, mesh_dim_names=names)
        self.control, self.background = (dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[Tensor | float]) -> list[float]:
        """Sum each value over all ranks; one copy from the device to the host."""
        return self.begin_sum(values)()

    def begin_sum(self, values: Sequence[Tensor | float]) -> Callable[[], list[float]]:
        """:meth:`sum`, which the device is told at once; what is returned waits for it, and for nothing told since."""
        stacked = torch.stack([torch.as_tensor(value, device=self.device).detach().double() for value in values])
        dist.all_reduce(stacked)
        on_host = stacked.to("cpu", non_blocking=True)  # into page-locked memory
        done = torch.cuda.Event() if stacked.is_cuda else None  # type: ignore[no-untyped-call]
        if done is not None:
            done.record()

        def read() -> list[float]:
            if done is not None:
                done.synchronize()
            return [float(value) for value in on_host.tolist()]

        return read

    def require_one(self, command: str, instead: str) -> None:
        """Check that a command, which runs in one process, was started as one.

        Raises:
            KdflowError: there are several ranks; says what to do ``instead``.
        """
        if self.size > 1:
            raise KdflowError(f"kdflow {command} runs in one process; {instead}")

    def agree(self, what: str, value: Mapping[str, Any], remedy: str) -> None:
        """Check that every rank has what rank 0 has.

        Raises:
            KdflowError: some rank has something else; names the first key, both values, and the ``remedy``.
        """
        first, *others = self.gather(value)
        for rank, other in enumerate(others, start=1):
            for key, ours, theirs in differences(first, other):
                raise KdflowError(
                    f"ranks disagree on {what}: {key} is {ours!r} to rank 0 and {theirs!r} to rank {rank}; {remedy}"
                )

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def first(self, work: Callable[[], None]) -> None:
        """Let rank 0 do something that the others wait for.

        Raises:
            KdflowError: rank 0 could not do it; every rank is told, so that none waits for ever.
        """
        problem = None
        if self.is_first:
            try:
                work()
            except KdflowError as error:
                problem = str(error)
        problem = self.broadcast(problem)
        if problem is not None:
            raise KdflowError(problem)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owner:
            dist.destroy_process_group()


def lost_a_peer(error: BaseException) -> bool:
    """Whether ranks could not meet since another one has ended: what went wrong, went wrong there."""
    return isinstance(error, dist.DistError) or "by peer" in str(error)


def keep_freed_memory() -> None:
    """Let the C library reuse the memory of large tensors.

    glibc gives each large block back to the kernel when it is freed; on a CPU the page faults of the next one took a
    fifth of a training step. Elsewhere than on glibc nothing is changed.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 2**31 - 1)


def _forget_old_products() -> None:
    """Let oneDNN keep the code of 128 matrix products instead of 1,024, unless the user says how many.

    Micro-batches differ in length, so that each step has products of new sizes. What is kept of them lies between large
    tensors: on a CPU with AMX the quickstart took 6.3 GiB after 40 steps, and 9.0 after 150; with this 4.4 after 40.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def require_groups(replicas: int, ranks: int) -> None:
    """Refuse replicas that ranks do not come out even with.

    Raises:
        KdflowError: they do not.
    """
    if ranks % replicas:
        raise KdflowError(
            f"training.replicas: {replicas} groups cannot divide {ranks} ranks evenly; give a divisor of {ranks}"
        )
