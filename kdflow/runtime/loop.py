"""The training loop, on one page: draw, roll out, prepare, pack, score, step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch

from kdflow.config import RunConfig
from kdflow.contracts import Batch, KdflowError, TrainingStopped
from kdflow.contracts.returned import require_prepared
from kdflow.data.packing import collate, pack, share
from kdflow.data.steps import Step, Steps
from kdflow.runtime.checkpoint import Checkpoints
from kdflow.runtime.events import Events, peak_memory
from kdflow.runtime.flops import StepFlops
from kdflow.runtime.follow import Follow
from kdflow.runtime.held_out import HeldOut
from kdflow.runtime.optimizer import schedule
from kdflow.runtime.phases import Phases
from kdflow.runtime.processes import Processes
from kdflow.runtime.random_numbers import random_numbers
from kdflow.runtime.rollouts import Rollouts
from kdflow.runtime.student import Micro, Student
from kdflow.runtime.teacher import Scored, Taught, Teacher

# Of a step.
PHASES = ("data", "rollout", "teacher", "student", "sync")


class Work(NamedTuple):
    """A step that is ready for the student: figures about what it wrote, its micro-batches, and the teacher's sides."""

    drawn: Step
    written: dict[str, float]
    batches: list[Batch]
    scored: Iterator[Scored | tuple[None, None]]

    def begun(self) -> Work:
        """The same, after the first micro-batch has been scored."""
        return self._replace(scored=chain([next(self.scored)], self.scored))


@dataclasses.dataclass
class Loop:
    """What a run is made of, and the loop over it; ``config`` tells how many steps there are, whatever was asked for.

    ``teacher`` is who the algorithm learns from; ``reference`` is whom evaluation compares with, the same teacher where
    there is one, also for an algorithm that needs none.
    """

    config: RunConfig
    processes: Processes
    steps: Steps
    student: Student
    teacher: Teacher | None
    reference: Teacher | None
    rollouts: Rollouts | None
    follow: Follow | None
    held_out: HeldOut
    flops: StepFlops | None
    checkpoints: Checkpoints
    events: Events
    state: dict[str, Any]
    started: float  # when this process began, by time.perf_counter
    restarts: int = 0  # of this rank's engines, as far as they are counted
    # While the student is as a step left it, and no checkpoint holds it: what was drawn, and the random numbers' state.
    unsaved: tuple[Step, dict[str, torch.Tensor]] | None = None

    def run(self) -> None:
        """Train from ``state["step"]`` to the last step; an error leaves a checkpoint of the last whole one."""
        try:
            self.train()
        except KdflowError as error:
            error.args = (f"{error}\n{self.rescue(error)}",)
            raise

    def train(self) -> None:
        """The loop."""
        training = self.config.training
        if self.owes_evaluation():
            self.evaluate(self.state["step"])
        work: Work | None = None
        for step in range(self.state["step"] + 1, training.last_step + 1):
            started, phases = time.perf_counter(), Phases(PHASES)
            drawn, written, batches, scored = work or self.prepare(step, phases)
            # What does not wait for this step's end is done beside its last micro-batch, on which device and teacher
            # are still at work. An evaluation finds no room where the next rows take all of it.
            evaluates = self.teacher is not None and self.teacher.in_turns and self.evaluates(step)
            independent = self.rollouts is None and self.follow is None and step < training.last_step and not evaluates
            work, micros = None, list[Micro]()
            for number, batch in enumerate(batches, start=1):
                taught = Taught(scored, phases)
                if self.teacher is None or not self.teacher.beside:
                    taught()  # its memory is free again before the student's own pass
                with phases("student"):
                    last, gap = number == len(batches), self.rollouts.gap if self.rollouts else None
                    micros.append(self.student.backward(batch, taught, drawn.target_tokens, last, gap))
                taught.release()
                if independent and number == max(1, len(batches) - 1):
                    work = self.prepare(step + 1, phases)
            with phases("student"):
                share, figures = schedule(step, training), self.reduce(micros, self.student.clip())
            if work is not None and self.teacher is not None and self.teacher.queues:
                with phases("teacher"):  # a device that has work does not wait while the host reads the figures
                    work = work.begun()
            with phases("student"):
                totals = figures()
                self.require_finite(step, drawn, totals)
                if self.rollouts is not None and drawn.on_policy:
                    self.rollouts.require_same(step, totals["rollout_gap"])
                elif self.rollouts is not None:
                    del totals["rollout_gap"]  # of nothing
                self.unsaved = None
                self.student.step(share)
            if self.follow is not None:
                with phases("sync"):
                    self.follow.update(step)
            self.state["step"] = step
            self.state["tokens"] += drawn.tokens
            self.state["seconds"] += (seconds := time.perf_counter() - started)
            loss = totals.pop("loss") / drawn.target_tokens
            self.state["loss"] = loss
            self.unsaved = drawn, random_numbers(self.processes)
            self.events.emit(
                "step", step=step, loss=loss, learning_rate=training.learning_rate * share, **totals, **drawn.aligned,
                **written, **self.parity(), target_tokens=drawn.target_tokens, tokens=drawn.tokens, seconds=seconds,
                phases=phases.seconds, samples=drawn.digest, epoch=drawn.epoch,
                memory_bytes=peak_memory(self.processes.device),
                **(self.flops.figures(drawn, seconds, self.processes) if self.flops else {}),
            )  # fmt: skip
            if self.evaluates(step):
                self.evaluate(step)
            if step == training.last_step or self.saves(step):
                self.save(step)
        self.state["engine_restarts"] += int(*self.processes.sum([self.new_restarts()]))  # of the last evaluation
        self.checkpoints.wait()

    def prepare(self, step: int, phases: Phases) -> Work:
        """Draw a step, let the student write what it is to write of it, pack it, and let the teacher begin."""
        with phases("data"):
            drawn = self.steps.draw()
        if not drawn.pairs:
            raise KdflowError(
                f"step {step}: training.epochs are over. The run was begun with another training.tokens_per_step or "
                "training.epochs; give these back as they were"
            )
        written: dict[str, float] = {}
        if self.rollouts is not None:
            with phases("sync"):
                self.rollouts.sync(step, saved=self.saves(step - 1), writes=bool(drawn.on_policy))
            with phases("rollout"):
                drawn, written = self.rollouts.write(step, drawn)
        with phases("data"):
            batches = self.micro_batches(drawn)
        return Work(drawn, written, batches, self.teacher.each(batches) if self.teacher else repeat((None, None)))

    def micro_batches(self, drawn: Step) -> list[Batch]:
        """This rank's share of a step, packed under the token budget."""
        algorithm = self.student.algorithm
        pairs = [require_prepared(algorithm, pair, algorithm.prepare(pair)) for pair in drawn.pairs]
        bins = pack(pairs, self.config.data.max_tokens, self.processes.size)
        mine = share(bins, self.processes.rank, self.processes.size)
        return [collate(pairs, self.teacher is not None).to(self.processes.device) for pairs in mine]

    def reduce(self, micros: list[Micro], grad_norm: torch.Tensor) -> Callable[[], dict[str, float]]:
        """Begin to sum loss and metrics over micro-batches and ranks.

        What is returned gives them, with the gradient's norm: it waits for one copy to the host.
        """
        names = list(micros[0].metrics)
        sums: list[Any] = [sum(micro.loss for micro in micros)]
        sums += [sum(micro.metrics[name][part] for micro in micros) for name in names for part in (0, 1)]
        # The norm is the same on every rank; summed with the rest, it costs no transfer of its own.
        read = self.processes.begin_sum([*sums, grad_norm / self.processes.size, self.new_restarts()])

        def figures() -> dict[str, float]:
            loss, *found, norm, restarts = read()
            # Of a count of 0 there is no mean, but a sum of 0; other counts may well be below 1, as of weights.
            metrics = {name: found[2 * i] / (found[2 * i + 1] or 1.0) for i, name in enumerate(names)}
            self.state["engine_restarts"] += int(restarts)
            return {"loss": loss, "grad_norm": norm, "engine_restarts": int(restarts), **metrics}

        return figures

    def new_restarts(self) -> int:
        """How often engines of this rank were started again since this was asked last."""
        engines = [owner.engine for owner in (self.reference, self.rollouts) if owner is not None]
        before, self.restarts = self.restarts, sum(engine.restarts for engine in engines)
        return self.restarts - before

    def require_finite(self, step: int, drawn: Step, totals: dict[str, float]) -> None:
        """Stop before the optimizer moves if loss or gradient is not finite.

        Raises:
            TrainingStopped: names the samples of the step.
        """
        if all(math.isfinite(totals[name]) for name in ("loss", "grad_norm")):
            return
        names = [pair.id for pair in drawn.pairs]
        self.events.emit("warning", step=step, message="loss or gradient is not finite", sample_ids=names)
        shown = ", ".join(names[:20]) + (
            f" and {len(names) - 20} more (all in metrics.jsonl)" if len(names) > 20 else ""
        )
        raise TrainingStopped(
            f"step {step}: the loss ({totals['loss']:g}) or the gradient norm ({totals['grad_norm']:g}) is not finite. "
            f"The student was not changed by this step. Samples in the step: {shown}"
        )

    def evaluate(self, step: int) -> None:
        """Held-out figures, and at the first and the last step a sample of the student's text."""
        found = self.held_out.evaluate(self.student, self.reference)
        if found is not None:
            figures = dataclasses.asdict(found)
            self.state["evaluation"]["before" if step == 0 else "after"] = figures
            self.events.emit("eval", step=step, **figures)
            if step == 0 or step >= self.config.training.last_step:
                self.events.emit("sample", step=step, **self.held_out.sample(self.student))
        self.state["evaluated"] = step

    def evaluates(self, step: int) -> bool:
        """Whether the student is evaluated after this step, or as it is before the first."""
        every = self.config.training.evaluate_every
        # A run that is resumed with fewer steps than it has taken is beyond its last one.
        return bool(step == 0 or step >= self.config.training.last_step or (every and step % every == 0))

    def owes_evaluation(self) -> bool:
        """Whether the last step is to be evaluated and was not: an error, or another number of steps, left it out."""
        return self.evaluates(self.state["step"]) and self.state["evaluated"] != self.state["step"]

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after this step, the last one aside."""
        every = self.config.training.checkpoint_every
        return bool(every and step % every == 0)

    def save(self, step: int) -> None:
        """Start to write a checkpoint of what is unsaved, and tell of it."""
        self.write(step)
        self.tell_of_checkpoint(step)

    def tell_of_checkpoint(self, step: int) -> None:
        """Tell the trackers that the checkpoint of a step is written, or on its way."""
        self.events.emit("checkpoint", step=step, path=f"checkpoints/step-{step:08d}")

    def write(self, step: int) -> None:
        """Start to write a checkpoint of what is unsaved; also says how often which samples were used.

        Raises:
            KdflowError: the one before could not be written; what is unsaved still is.
        """
        assert self.unsaved is not None
        drawn, random = self.unsaved
        state = {
            **self.state, **self.taken(), "evaluation": dict(self.state["evaluation"]), "data": drawn.state,
            "world_size": self.processes.size, "device": self.processes.device.type,
        }  # fmt: skip
        self.checkpoints.save(step, {**self.tensors(), **random}, state)
        self.unsaved = None  # only now, so that an error of the write before leaves it to the rescue

    def taken(self) -> dict[str, Any]:
        """Seconds in all and the most bytes held at once, those of processes before a resume included."""
        return {
            "wall_seconds": self.state["wall_seconds"] + time.perf_counter() - self.started,
            "peak_memory_bytes": max(self.state["peak_memory_bytes"], peak_memory(self.processes.device)),
        }

    def rescue(self, error: KdflowError) -> str:
        """Save the last whole step, if no rank has gone on from it; says from where the run can go on."""
        # Of several ranks, those whose engine is well wait elsewhere for one whose engine is gone.
        together = self.processes.size == 1 or isinstance(error, TrainingStopped)
        step, told = self.state["step"], ""
        try:
            self.checkpoints.wait()  # the last one may still be on its way to the disk
        except KdflowError as not_written:
            told = f"{not_written}\n"
        if self.unsaved is not None and together:
            try:  # also after one that could not be written: by now there may be room
                self.write(step)
                self.checkpoints.wait()
            except KdflowError as not_written:
                told += f"{not_written}\n"
            else:
                with suppress(KdflowError):  # of a tracker, which may be what ends the run
                    self.tell_of_checkpoint(step)
                return f"{told}Step {step} is kept as a checkpoint: --resume auto goes on from there."
        if (self.checkpoints.directory / "latest").exists():
            return f"{told}The last checkpoint stands: --resume auto goes on from there."
        return f"{told}There is no checkpoint yet."

    def parity(self) -> dict[str, float]:
        """What an engine that runs the teacher found when it was compared last."""
        found = self.reference.engine.parity if self.reference else None
        return {} if found is None else {"teacher_parity": found}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint holds: student, optimizer, a teacher that follows, this rank's random numbers."""
        teacher = self.follow.state() if self.follow else {}
        return {**self.student.state(), **teacher, **random_numbers(self.processes)}
