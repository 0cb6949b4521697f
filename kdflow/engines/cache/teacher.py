"""The teacher whose rows are read from a capture."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kdflow.contracts import (
    EngineContext,
    Head,
    KdflowError,
    Lease,
    ModelBytes,
    Options,
    TeacherEngine,
    TokenBatch,
    Transport,
)
from kdflow.engines.cache.capture import StoredHead, find_capture
from kdflow.engines.cache.shards import Shards, sequence_key


class CacheTeacherOptions(Options):
    """Options of :class:`CacheTeacher`."""

    path: str | None = None
    """The directory that ``kdflow cache`` wrote; null: the one in kdflow's cache for this teacher and dtype."""


class CacheTeacher(TeacherEngine):
    """Rows that were stored beforehand, whatever the student and the loss; nothing of the teacher is computed.

    Of ``teacher.model`` the tokenizer is read, and its config and its weights, where they are, are compared with those
    captured. A capture in another dtype is converted to the context's.

    Raises:
        KdflowError: there is no capture, or it is of another teacher or tokenizer.
    """

    name = "cache"
    stored = True
    Options = CacheTeacherOptions

    def __init__(self, model: str, options: CacheTeacherOptions, context: EngineContext) -> None:
        super().__init__(model, options, context)
        self._path = find_capture(options.path, model, context.dtype)
        self._stored = StoredHead(self._path, context.dtype, context.device)
        self._shards = Shards(self._path)

    @classmethod
    def device_bytes(cls, options: CacheTeacherOptions, model: ModelBytes, asleep: bool = False) -> int:
        """The head alone."""
        return model.head

    @property
    def head(self) -> Head:
        """The head that was captured with the rows."""
        return self._stored.head

    @property
    def transport(self) -> Transport:
        """From pages of the shards to tensors, and from there to a GPU."""
        copies = 1 if self.context.device.type == "cpu" else 2
        return Transport("mapped_files", copies, self.spec.hidden_size * self.context.dtype.itemsize)

    @cached_property
    def _embeddings(self) -> Tensor | None:
        return self._stored.embeddings()

    def embed(self, ids: Tensor) -> Tensor:
        """The captured input embeddings of ``ids [n]``, ``[n, H]``.

        Raises:
            KdflowError: the engine that was captured gave none.
        """
        if self._embeddings is None:
            raise KdflowError(
                f"{self._path} holds no embeddings of the teacher, since the engine that scored gives none; give "
                "another path, and capture with the engine transformers: kdflow cache RUN.YAML --engine transformers"
            )
        return self._embeddings[ids]

    def score(self, batch: TokenBatch) -> Lease:
        """Read the rows; they are new tensors, so there is nothing to give back.

        Raises:
            KdflowError: the capture does not hold all rows of a sequence.
        """
        found = [torch.empty(0, self.spec.hidden_size, dtype=self.context.dtype)]
        for ids, targets in batch.on_host.sequences():
            rows = self._shards.rows(sequence_key(ids), targets)
            if rows is None:
                raise KdflowError(self._missing(ids))
            found.append(rows.to(self.context.dtype))
        return Lease(torch.cat(found).to(self.context.device), batch.digest)

    def _missing(self, ids: np.ndarray) -> str:
        shown = ", ".join(map(str, ids[:8].tolist()))
        return (
            f"{self._path} does not hold all rows of a sample of {len(ids)} tokens of the teacher, [{shown}, …]: other "
            "data were captured, another data.max_length, or for an algorithm that aligns otherwise. Capture what is "
            "missing with this run file, kdflow cache RUN.YAML, and go on with --resume auto. What the student writes "
            "itself (rollout) no capture can hold"
        )

    @classmethod
    def require_updatable(cls, options: CacheTeacherOptions) -> None:
        """Refuse: rows were computed with the weights that were captured."""
        raise KdflowError(
            "'cache' holds rows of a teacher that stays as it is: choose another engine, or leave teacher.follow out"
        )

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Refuse likewise."""
        self.require_updatable(self.options)

    def close(self) -> None:
        """Unmap the shards."""
        del self._shards
