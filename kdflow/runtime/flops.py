"""Floating-point operations of a step: how many there are, and how many the device could do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdflow.config import RunConfig
from kdflow.contracts import KdflowError, TeacherEngine
from kdflow.data.steps import Step
from kdflow.runtime.memory import Shape, model_shape
from kdflow.runtime.processes import Processes

# Dense products in bf16 a second, as NVIDIA's data sheets say of the SXM modules; by a part of the device's name.
_PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


@dataclass(frozen=True)
class StepFlops:
    """What models of these shapes take, but for what an engine writes.

    Two operations a parameter and token forward, four backward, two of a frozen one; heads at targets only. Attention's
    own products are counted for the tokens that a token sees: four a pair and number of a head forward, eight backward.

    Attributes:
        student: that learns.
        teacher: that it learns from, if any.
        stored: whether the teacher's rows are on disk, so that its head alone is used.
        frozen: whether adapters alone are trained.
    """

    student: Shape
    teacher: Shape | None
    stored: bool
    frozen: bool

    @classmethod
    def of(cls, config: RunConfig, teacher: TeacherEngine | None) -> StepFlops | None:
        """Of a run that learns from this teacher; None where its engine runs what transformers does not know."""
        dtype = getattr(torch, config.training.dtype)
        student = model_shape(config.student.model, dtype, config.student.keep_layers)
        try:
            shape = None if teacher is None else model_shape(teacher.model, dtype)
        except KdflowError:
            return None
        return cls(student, shape, teacher is not None and teacher.stored, config.student.lora is not None)

    def count(
        self, lengths: Sequence[int], targets: float, teacher_lengths: Sequence[int] = (), teacher_targets: float = 0.0,
        *, recompute: bool = False,
    ) -> float:  # fmt: skip
        """Of a step of samples of these lengths; with ``recompute`` the student's blocks run forward twice.

        The teacher has lengths of its own: it may see another prompt, and its tokenizer may cut the text otherwise.
        """
        student, teacher, tokens = self.student, self.teacher, sum(lengths)
        trained = 4 if self.frozen else 6
        total = (trained + 2 * recompute) * student.body * tokens + trained * student.head * targets
        total += (12 + 4 * recompute) * _attended(student, lengths)
        if teacher is not None:
            total += 2 * teacher.head * teacher_targets
            if not self.stored:
                total += 2 * teacher.body * sum(teacher_lengths) + 4 * _attended(teacher, teacher_lengths)
        return total

    def figures(self, drawn: Step, seconds: float, processes: Processes) -> dict[str, float]:
        """Operations a second of each device in a step, and their share of what it could do, where that is known.

        What is computed again in the backward pass counts once: these are the model's operations.
        """
        sides = [pair.teacher for pair in drawn.pairs if pair.teacher is not None]
        count = self.count(
            [len(pair.student) for pair in drawn.pairs], drawn.target_tokens,
            [len(side) for side in sides], sum(len(side.targets) for side in sides),
        )  # fmt: skip
        speed = count / seconds / processes.size
        most = peak(processes.device)
        return {"flops_per_second": speed, **({} if most is None else {"flops_utilisation": speed / most})}


def _attended(model: Shape, lengths: Sequence[int]) -> float:
    """Pairs of a token and one that it sees, itself included, times the heads' width, over all blocks."""
    total = 0
    for window, width in model.attention.items():
        for length in lengths:
            near = min(length, window or length)  # tokens that see all before them
            total += (near * (near + 1) // 2 + (length - near) * near) * width
    return total


def peak(device: torch.device) -> float | None:
    """What a device can do a second in bf16 at most; None of one that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # An RTX A1000 is no A100.
    return next((peak for part, peak in _PEAKS.items() if re.search(rf"{part}(?!\d)", name)), None)
