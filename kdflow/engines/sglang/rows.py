"""The teacher's rows on the student's side: which are asked for, whether they came, and of which tokens they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdflow.contracts import KdflowError, Transport
from kdflow.engines.sglang.slots import CUDA, FAILED, UNUSED, Layout, Request, Slots, TokenIds, digest, place_factors

# After whose pass the hook is called: it is given the final hidden states.
MODULE = "logits_processor"


class Asked(NamedTuple):
    """What an engine is sent of a sequence: plain data, of which each rank of a team can send its own."""

    ids: TokenIds
    request: Request


class Rows:
    """The slots of a rank, what is asked of the hook by them, and what it has written.

    Args:
        layout: of the slots.
        device: the student's.
        owner: number of the rank among those that share the engine.
    """

    def __init__(self, layout: Layout, device: torch.device, owner: int) -> None:
        self.slots = Slots(layout, device)
        self._device, self._owner = device, owner
        self._by_place = place_factors(layout.tokens)
        self._expected: dict[int, tuple[int, list[np.int64]]] = {}  # of a slot: how many rows, and the digests

    @property
    def transport(self) -> Transport:
        """How rows arrive, as the engine's first pass has found out.

        Counted are the copies of target tokens in one run; through page-locked memory, scattered ones take one more.
        """
        through_cuda = self.slots.host.state == CUDA
        direct = through_cuda or self._device.type == "cpu"
        name = "cuda_ipc" if through_cuda else "shared_memory"
        return Transport(name, 1 if direct else 2, self.slots.layout.row_bytes)

    def forget_hook(self) -> None:
        """Expect the word of another hook: the engine is started."""
        self.slots.host.state, self.slots.host.message = UNUSED, ""

    def expect(self, slot: int, sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Asked]:
        """Write into a slot of which tokens rows are wanted.

        Args:
            slot: a free one.
            sequences: ids ``[t]`` of each, and the wanted positions among them, ascending, ``[n]``.

        Returns:
            What brings the rows, in the order of the sequences.
        """
        memory, asked, start, first = self.slots.host, list[Asked](), 0, 0
        memory.digests[slot, : len(sequences)] = 0
        for number, (ids, targets) in enumerate(sequences):
            length, count = len(ids), len(targets)
            memory.ids[slot, start : start + length] = ids
            memory.positions[slot, first : first + count] = targets
            request = Request(slot, number, first, count, self._owner)
            asked.append(Asked(self.slots.ids(slot, start, length), request))
            start, first = start + length, first + count
        self._expected[slot] = first, [digest(ids, self._by_place) for ids, _ in sequences]
        return asked

    def take(self, slot: int, version: str) -> Tensor:
        """The rows that a slot was to bring, on the student's device.

        Raises:
            KdflowError: the hook has not run since the engine was started, has failed, or the engine has read other
                tokens than it was sent.
        """
        count, digests = self._expected[slot]
        if digests:
            self._require_export(version)
            self._require_digests(slot, digests, version)
        return self.slots.rows[slot, :count].to(self._device, non_blocking=True)

    def _require_export(self, version: str) -> None:
        memory = self.slots.host
        if memory.state == FAILED:
            raise KdflowError(f"the hook in sglang {version} that exports hidden states failed: {memory.message}")
        if memory.state == UNUSED or memory.passes == 0:
            raise KdflowError(
                f"no hidden states came out of sglang {version}: its model has no module '{MODULE}', or it calls no "
                "forward hooks. kdflow is tested with sglang 0.5.17 and 0.5.21; use one of these, or "
                "teacher.engine.name=transformers"
            )
        self.slots.settle()

    def _require_digests(self, slot: int, expected: list[np.int64], version: str) -> None:
        if self.slots.host.digests[slot, : len(expected)].tolist() != expected:
            raise KdflowError(
                f"sglang {version} read other tokens than it was sent: the digests of their ids differ. "
                "Report it, and use teacher.engine.name=transformers"
            )
