"""A teacher that is the student itself, as it was or on average (self-distillation)."""

from __future__ import annotations

import torch
from torch import Tensor

from kdflow.config import FollowConfig
from kdflow.contracts import TeacherEngine
from kdflow.runtime.student import Student
from kdflow.runtime.turns import awake


class Follow:
    """Keeps the teacher's weights beside the student's, sharded like them, and hands them to the engine.

    ``every: n`` copies the student after every n-th step; ``ema: d`` moves them after each step to
    d · teacher + (1 - d) · student (Tarvainen and Valpola 2017, mean teacher, arXiv 1703.01780). With LoRA the two
    factors of each adapter are averaged, which is not the average of their product.
    """

    def __init__(self, config: FollowConfig, student: Student, engine: TeacherEngine) -> None:
        self._config, self._student, self._engine = config, student, engine
        # An average moves by less than bf16 can tell.
        dtype = None if config.ema is None else torch.float32
        self._weights = {name: parameter.detach().to(dtype, copy=True) for name, parameter in student.trained()}
        self.hand_over()  # an engine that takes no weights says so now, not when the first step comes

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the student's step."""
        kept = self._config.ema
        if kept is None:
            assert self._config.every is not None
            if step % self._config.every != 0:
                return
            kept = 0.0
        for name, parameter in self._student.trained():
            self._weights[name].lerp_(parameter.detach().to(self._weights[name].dtype), 1.0 - kept)
        self.hand_over()

    def hand_over(self) -> None:
        """Give the engine the weights as they are."""
        with awake(self._engine):
            self._engine.update_weights(self._student.weights(self._weights))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the teacher; loading writes into these tensors."""
        return {f"teacher.{name}": weight for name, weight in self._weights.items()}
