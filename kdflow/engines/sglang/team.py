"""Ranks that share one engine: who they are, which GPUs are its own, and how they ask together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kdflow.contracts import KdflowError

T = TypeVar("T")


class Team:
    """Consecutive ranks of one machine; the first, their leader, has the engine, and speaks to it for all.

    Everything that asks is called by all of them, in the same order.

    Args:
        patience: seconds that a rank waits for the leader's answer.

    Attributes:
        number: of this rank in the team.
        size: how many ranks it has.
        first_gpu: of the engine.
    """

    def __init__(self, size: int = 1, first_gpu: int = 0, patience: float = 1800.0) -> None:
        self.size, self.first_gpu = size, first_gpu
        rank = dist.get_rank() if size > 1 else 0
        self.number, self._leader = rank % size, rank - rank % size
        self._group: Any = None
        if size > 1:
            # Every rank takes part in making every group.
            starts = range(0, dist.get_world_size(), size)
            groups = [
                dist.new_group(list(range(start, start + size)), backend="gloo", timeout=timedelta(seconds=patience))
                for start in starts
            ]
            self._group = groups[rank // size]

    @property
    def leads(self) -> bool:
        """Whether this rank has the engine."""
        return self.number == 0

    def ask(self, mine: Any, work: Callable[[list[Any]], Sequence[T]]) -> T:
        """Let the leader do ``work`` on what each rank brings, and take this rank's part of the answer.

        Args:
            mine: what this rank brings; plain data.
            work: from what all bring to an answer for each.

        Raises:
            KdflowError: of the leader's work; every rank is told, so that none waits for ever.
        """
        if self._group is None:
            return work([mine])[0]
        brought: list[Any] = [None] * self.size
        dist.gather_object(mine, brought if self.leads else None, dst=self._leader, group=self._group)
        told: list[Any] = [None] * self.size
        if self.leads:
            try:
                told = [(None, answer) for answer in work(brought)]
            except KdflowError as error:
                told = [(str(error), None)] * self.size
        found: list[Any] = [None]
        dist.scatter_object_list(found, told if self.leads else None, src=self._leader, group=self._group)
        problem, answer = found[0]
        if problem is not None:
            raise KdflowError(problem)
        taken: T = answer
        return taken

    def lead(self, work: Callable[[], T]) -> T:
        """Let the leader do ``work``; its answer, on every rank.

        Raises:
            KdflowError: of the leader's work.
        """
        return self.ask(None, lambda brought: [work()] * len(brought))


def form_team(gpus: int, device: torch.device, owner: str, patience: float, dedicated: bool = False) -> Team:
    """The team of this rank, for an engine of ``gpus`` GPUs: on those of its ranks, or ``dedicated``, on further ones.

    Its ranks wait ``patience`` seconds for an answer.

    Raises:
        KdflowError: ranks and GPUs do not come out even.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    ranks, here = int(os.environ.get("LOCAL_WORLD_SIZE", world)), int(os.environ.get("LOCAL_RANK", 0))
    if dedicated and device.type == "cuda":
        size = ranks // count_engines(gpus, ranks, torch.cuda.device_count(), owner)
        return Team(size, ranks + here // size * gpus, patience)
    # An engine of more GPUs than there are ranks goes on to those behind them.
    size = min(gpus, ranks)
    if ranks % size:
        raise KdflowError(
            f"{owner}: the {ranks} ranks of this machine cannot share engines of {gpus} GPUs evenly; start a multiple "
            f"of {gpus} ranks, or choose tensor_parallel, pipeline_parallel and data_parallel so that their product "
            f"divides {ranks}"
        )
    return Team(size, here // size * size, patience)


def count_engines(gpus: int, ranks: int, devices: int, owner: str) -> int:
    """How many engines of ``gpus`` GPUs fit beside the ``ranks`` of a machine, each for as many of these.

    Raises:
        KdflowError: not one.
    """
    fitting = (devices - ranks) // gpus
    if fitting < 1:
        raise KdflowError(
            f"{owner}: placement dedicated needs GPUs beside those of the {ranks} ranks of this machine, {gpus} an "
            f"engine, and it has {devices}; start fewer ranks, or use placement colocated"
        )
    return max(count for count in range(1, fitting + 1) if ranks % count == 0)
