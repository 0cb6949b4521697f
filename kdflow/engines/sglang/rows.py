"""The teacher's rows on the student's side: which are asked for, whether they came, and of which tokens they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdflow.contracts import KdflowError, Transport
from kdflow.engines.sglang.slots import CUDA, FAILED, UNUSED, Layout, Request, Slots, digest, weights

# After whose pass the hook is called: it is given the final hidden states.
MODULE = "logits_processor"


@dataclass(frozen=True)
class AskedSequence:
    """Ids ``[t]`` and the wanted positions among them, ascending, ``[n]``; both on the host."""

    ids: Tensor
    targets: Tensor


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
        self._weights = weights(layout.tokens)

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

    def expect(self, slot: int, sequences: Sequence[AskedSequence]) -> list[Request]:
        """Write into a slot which rows are wanted; the requests that bring them, in the order of the sequences."""
        memory, requests, first = self.slots.host, [], 0
        memory.digests[slot, : len(sequences)] = 0
        for number, sequence in enumerate(sequences):
            count = len(sequence.targets)
            requests.append(Request(slot, number, first, count, self._owner))
            first += count
        if sequences:
            memory.positions[slot, :first] = np.concatenate([sequence.targets.numpy() for sequence in sequences])
        return requests

    def take(self, slot: int, sequences: Sequence[AskedSequence], version: str) -> Tensor:
        """The rows of a slot, on the student's device, which are of these sequences.

        Raises:
            KdflowError: the hook has not run since the engine was started, has failed, or the engine has read other
                tokens than it was sent.
        """
        if sequences:
            self._require_export(version)
            self._require_digests(slot, sequences, version)
        count = sum(len(sequence.targets) for sequence in sequences)
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

    def _require_digests(self, slot: int, sequences: Sequence[AskedSequence], version: str) -> None:
        expected = [digest(sequence.ids.numpy(), self._weights) for sequence in sequences]
        if not np.array_equal(self.slots.host.digests[slot, : len(sequences)].numpy(), expected):
            raise KdflowError(
                f"sglang {version} read other tokens than it was sent: the digests of their ids differ. "
                "Report it, and use teacher.engine.name=transformers"
            )
