"""The teacher that is a Hugging Face model in the student's process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdflow.contracts import EngineContext, Head, Lease, ModelBytes, Options, TeacherEngine, TokenBatch


class TransformersTeacher(TeacherEngine):
    """Exact, on CPU or GPU; every rank holds a whole teacher.

    It imports transformers when it is made, not when it is listed: that takes seconds.
    """

    name = "transformers"

    def __init__(self, model: str, options: Options, context: EngineContext) -> None:
        from kdflow.models.head import probe_head
        from kdflow.models.loading import blocks, load_model

        super().__init__(model, options, context)
        self._model = load_model(model, context.dtype, context.device)
        self._model.train(False).requires_grad_(False)
        probe_head(self._model, "teacher")
        if context.compile:
            for block in blocks(self._model):
                block.compile()

    @property
    def head(self) -> Head:
        """The model's own head."""
        from kdflow.models.head import read_head

        return read_head(self._model)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """The model's input embeddings of ``ids [n]``, ``[n, H]``."""
        embedded: Tensor = self._model.get_input_embeddings()(ids)
        return embedded

    @torch.no_grad()
    def score(self, batch: TokenBatch) -> Lease:
        """One packed forward pass; the rows are new tensors, so there is nothing to give back."""
        from kdflow.models.packed import packed_hidden_states

        return Lease(packed_hidden_states(self._model, batch)[batch.targets], batch.digest)

    @classmethod
    def device_bytes(cls, options: Options, model: ModelBytes, asleep: bool = False) -> int:
        """The whole model; asleep, what is outside of its blocks."""
        return model.root if asleep else model.weights

    def sleep(self) -> None:
        """Move the blocks to host memory; head and embeddings stay, which the student's loss is computed with."""
        self._move_blocks(torch.device("cpu"))

    def wake(self) -> None:
        """Move them back."""
        self._move_blocks(self.context.device)

    def _move_blocks(self, device: torch.device) -> None:
        from kdflow.models.loading import blocks

        for block in blocks(self._model):
            block.to(device)

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copy new weights in place."""
        from kdflow.models.loading import copy_weights

        copy_weights(self._model, weights)

    def close(self) -> None:
        """Drop the model."""
        del self._model
