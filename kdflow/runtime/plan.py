"""What a run takes of a device's memory, and which engines sleep so that it is enough."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch

from kdflow.config import Choice, RunConfig
from kdflow.contracts import Algorithm, KdflowError
from kdflow.ops import form_of
from kdflow.ops.kd import DivergenceAlgorithm
from kdflow.plugins import Plugins
from kdflow.runtime import memory
from kdflow.runtime.prepare import engines, make_algorithm
from kdflow.runtime.processes import Processes

_log = logging.getLogger("kdflow")

_USABLE = 0.95  # of a GPU: CUDA's own state, and what lies between tensors, are in no plan


@dataclass(frozen=True)
class EngineBytes:
    """What an engine holds of a device, awake and asleep; its section of the run file, and its name in the plan."""

    section: str
    name: str
    sleeps: bool | None
    awake: int
    asleep: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a device holds in a step.

    Attributes:
        config, plugins, algorithm: the run's.
        student, teacher: shapes of the models.
        devices: how many train.
        capacity: bytes of one.
        targets: learnt tokens of a full micro-batch.
        micro_batches: of a step and device.
    """

    config: RunConfig
    plugins: Plugins
    algorithm: Algorithm
    student: memory.Shape
    teacher: memory.Shape | None
    devices: int
    capacity: int
    targets: int
    micro_batches: int

    @cached_property
    def engines(self) -> list[EngineBytes]:
        """What the run's engines hold."""
        config, found = self.config, list[EngineBytes]()
        itemsize, tokens = getattr(torch, config.training.dtype).itemsize, config.data.max_tokens

        def add(section: str, name: str, choice: Choice, shape: memory.Shape, sleeps: bool | None) -> None:
            cls, options = self.plugins.configured(f"{section} engine", choice.name, choice.options())
            size = shape.bytes(itemsize, tokens, self.capacity)
            awake, asleep = (cls.device_bytes(options, size, asleep) for asleep in (False, True))
            found.append(EngineBytes(section, name, sleeps, awake, asleep))

        if (teacher := config.teacher) is not None and self.teacher is not None:
            add("teacher", "teacher", teacher.engine, self.teacher, teacher.sleep)
        if (rollout := config.rollout) is not None and config.rollout_fraction > 0:
            add("rollout", "rollout_engine", rollout.engine, self.student, rollout.sleep)
        return found

    def needed(self, asleep: Sequence[EngineBytes]) -> tuple[str, dict[str, int | None]]:
        """When the device is fullest, and the bytes on it then, where these engines sleep."""
        load = memory.Load(
            self.devices, self.targets, self.micro_batches, self._head,
            {one.name: one.asleep if one in asleep else one.awake for one in self.engines},
            {one.name: one.awake for one in asleep},
        )  # fmt: skip
        return memory.estimate(self.config, self.student, self.teacher, load)

    def total(self, asleep: Sequence[EngineBytes]) -> int:
        """All these bytes."""
        return self.needed(asleep)[1]["total"] or 0

    def asleep(self) -> list[EngineBytes]:
        """Engines that sleep while the student learns.

        Those that the run file puts to sleep and, of those that it says nothing of, as few as let the rest fit: one
        that writes before a teacher, whose weights would have to come back to the device. All, if nothing fits.
        """
        asked = [one for one in self.engines if one.sleeps]
        free = [one for one in reversed(self.engines) if one.sleeps is None and one.asleep < one.awake]
        choices = [[*asked, *more] for count in range(len(free) + 1) for more in combinations(free, count)]
        return next((one for one in choices if self.total(one) <= _USABLE * self.capacity), choices[-1])

    @property
    def _head(self) -> memory.HeadKind:
        """What computes the loss on a GPU."""
        if not isinstance(self.algorithm, DivergenceAlgorithm):
            return "eager"
        kernel = form_of(self.algorithm.divergence) is not None and self.config.training.dtype == "bfloat16"
        return "kernel" if kernel else "compiled"


def asleep_on_a_gpu(config: RunConfig, plugins: Plugins, devices: int, capacity: int) -> dict[str, bool]:
    """Whether the engines sleep that a run file says nothing of, by their sections; nothing where it says all.

    None does where the teacher's size is not known.

    Raises:
        KdflowError: there is no such student.
    """
    undecided = [name for name in engines(config, plugins) if getattr(config, name).sleep is None]
    if not undecided:
        return {}
    try:
        teacher = memory.teacher_shape(config)
    except KdflowError:  # its engine may run what transformers does not know
        return dict.fromkeys(undecided, False)

    def asleep(compiled: bool) -> set[str]:
        training = config.training.model_copy(update={"compile": compiled})
        student = memory.student_shape(config.model_copy(update={"training": training}))
        plan = MemoryPlan(config, plugins, make_algorithm(config, plugins), student, teacher, devices, capacity,
                          targets=config.data.max_tokens, micro_batches=2)  # fmt: skip
        return {one.section for one in plan.asleep()}

    # Compiled blocks keep less, but it takes seconds to see how much.
    found = asleep(compiled=False)
    if found.intersection(undecided) and config.training.compile:
        found = asleep(compiled=True)
    return {name: name in found for name in undecided}


def with_sleep_decided(config: RunConfig, plugins: Plugins, processes: Processes) -> RunConfig:
    """The same run, which says of every engine whether it sleeps; the first rank's device decides."""
    decided = processes.broadcast(asleep_on_a_gpu(config, plugins, processes.size, memory.capacity()))
    if processes.is_first and any(decided.values()):
        names = " and ".join(f"{section}.sleep" for section, sleeps in decided.items() if sleeps)
        _log.warning(f"{names}: the GPU has no room for all models at once; give false to keep them there")
    sections = {name: getattr(config, name).model_copy(update={"sleep": sleeps}) for name, sleeps in decided.items()}
    return config.model_copy(update=sections)
