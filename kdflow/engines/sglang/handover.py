"""New weights on their way from the ranks of a team to the engine that they share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from kdflow.contracts import KdflowError
from kdflow.engines.sglang.process import EngineDied, EngineProcess
from kdflow.engines.sglang.team import Team
from kdflow.engines.sglang.weights import Bucket, SharedWeights, opened

_log = logging.getLogger("kdflow")


class Handover:
    """The newest weights of an engine: the team's leader holds them, and every rank of the team can read them."""

    def __init__(self, team: Team, engine: EngineProcess, device: torch.device) -> None:
        self._team, self._engine, self._shared = team, engine, SharedWeights(device)
        self._buckets, self._taken = list[Bucket](), False

    def write(self, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        """Replace them all, held in ``dtype``; all ranks of the team call it."""
        if self._team.leads:
            self._taken = self._shared.write(weights, dtype, self._take)
        else:
            for _ in weights:  # every rank takes part in making each whole
                pass
        self._buckets = self._team.ask(self._shared.buckets(), lambda of_all: [of_all[0]] * len(of_all))

    def _take(self, bucket: Bucket, first: bool, last: bool) -> bool:
        """Let the engine take a bucket from CUDA memory; if it dies of it, the host memory is used from now on."""
        try:
            self._engine.ask("update_weights", [bucket], first, last)
        except (EngineDied, KdflowError) as error:
            _log.warning(f"the student's weights go through the host from now on, since by CUDA memory {error}")
            self._shared.through_cuda = False
        return self._shared.through_cuda

    def finish(self) -> None:
        """Give the engine what was written, unless it has taken it already."""
        if not self._taken:
            self.restore()

    def restore(self) -> None:
        """Give an engine that was started again the weights that it had, if it had any but those of its files."""
        if self._buckets:
            self._engine.ask("update_weights", self._buckets, True, True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights themselves, on any rank; views of the host memory, for as long as nobody writes."""
        for bucket in self._buckets:
            with opened(bucket) as memory:
                yield from bucket.views(memory)

    def close(self) -> None:
        """Free the memory as soon as nothing maps it."""
        self._shared.close()
