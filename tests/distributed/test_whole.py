"""Sharded tensors made whole: the same as one by one, in fewer collectives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from kdflow.runtime import whole as module
from kdflow.runtime.whole import whole

SHAPES = [(5, 3), (1, 4), (7,), (8, 2, 2), (2, 3), (100,)]


def of_rank(rank: int, mesh_shape: tuple[int, ...], store: str) -> None:
    """What one rank sees; what it finds wrong ends the test."""
    ranks = torch.Size(mesh_shape).numel()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", mesh_shape)
    placed = [*[Replicate()] * (len(mesh_shape) - 1), Shard(0)]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    tensors[3] = tensors[3].bfloat16()
    sharded = [distribute_tensor(tensor, mesh, placed) for tensor in tensors]
    mixed = [*sharded[:2], tensors[2], *sharded[3:]]
    gather, calls = module._gather, 0

    def counted(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return gather(*arguments, **options)

    module._gather = counted
    for most, collectives in ((module.BUCKET, 3), (4 * 100, 4), (1, 5)):
        module.BUCKET, calls = most, 0
        found = list(whole(iter(mixed)))
        assert calls == (collectives if mesh_shape[-1] > 1 else 0), (most, calls)
        for one, expected in zip(found, tensors, strict=True):
            assert one.dtype == expected.dtype
            assert torch.equal(one, expected)
    dist.barrier()  # else one leaves while another still speaks to it
    dist.destroy_process_group()
    # A thread of gloo that still lets go of the last tensor may not do so while the interpreter ends: it aborts, seen
    # once on a busy machine (pytorch/pytorch#179291).
    os._exit(0)


@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2), (2, 1)], ids=str)
def test_tensors_of_uneven_shards_come_whole_and_together(mesh_shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.multiprocessing.spawn(of_rank, (mesh_shape, str(tmp_path / "store")), torch.Size(mesh_shape).numel())
