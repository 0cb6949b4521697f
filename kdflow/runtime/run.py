"""A whole run: everything is put together here, and checked before anything is trained."""

from __future__ import annotations

import dataclasses
import gc
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch

from kdflow.config import RunConfig
from kdflow.contracts import EngineContext, KdflowError, Sampling, Tracker
from kdflow.data.rollouts import RolloutTokenizer
from kdflow.data.samples import open_tables
from kdflow.data.steps import nothing_to_learn, open_steps
from kdflow.data.tokenization import PairTokenizer, first_difference
from kdflow.models.lora import identity
from kdflow.plugins import Plugins, plugin_set
from kdflow.runtime.checkpoint import Checkpoints
from kdflow.runtime.events import Events
from kdflow.runtime.export import write_student
from kdflow.runtime.flops import StepFlops
from kdflow.runtime.follow import Follow
from kdflow.runtime.held_out import HeldOut
from kdflow.runtime.loop import Loop
from kdflow.runtime.phases import Phases
from kdflow.runtime.plan import with_sleep_decided
from kdflow.runtime.prepare import engines, make_algorithm, prepare
from kdflow.runtime.processes import Processes
from kdflow.runtime.random_numbers import random_numbers, restore_random_numbers
from kdflow.runtime.rollouts import Rollouts
from kdflow.runtime.run_directory import RunDirectory, changes
from kdflow.runtime.student import Student
from kdflow.runtime.teacher import Teacher, require_sizes
from kdflow.runtime.tokenizers import open_tokenizers, require_shared_vocabulary
from kdflow.runtime.turns import rest
from kdflow.tokenizers.vocabulary import VocabularyComparison

_log = logging.getLogger("kdflow")


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        output: the run directory.
        steps: optimizer steps, those before a resume included.
        loss: of the last step, per target token; None where no step was run.
        evaluation: held-out figures ``before`` and ``after``.
    """

    output: Path
    steps: int
    loss: float | None
    evaluation: dict[str, dict[str, Any]]


def train(
    run: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    resume: Literal["auto"] | None = None,
    block: Iterable[str] = (),
) -> RunResult:
    """Train as a run file says.

    Args:
        run: path of a run file, or its content.
        overrides: ``key=value`` with dotted keys.
        resume: ``"auto"`` goes on from the newest checkpoint, or starts afresh where there is none.
        block: plugins that are not loaded, besides those that the run file blocks.

    Raises:
        KdflowError: something in the run cannot work; the message says what, where, and what to do.
    """
    config, plugins = prepare(run, overrides, block)
    for engine in engines(config, plugins).values():
        engine.require_installed()
    directory = RunDirectory(config.output)
    with Processes(config.training.replicas) as processes:
        _log.info(f"{processes.size} processes train, this one on {processes.device}")
        processes.agree("plugins", plugin_set(plugins), "install the same on every machine")
        processes.agree("the run", config.as_dict(), "give every machine the same run file and overrides")
        if processes.device.type == "cuda":
            config = with_sleep_decided(config, plugins, processes)
        try:
            processes.first(lambda: directory.create(resume is not None))
            _require_shared(directory.path, processes)
            return _Run(config, plugins, directory, processes).run(resume is not None)
        finally:
            directory.unlock()


class _Run:
    def __init__(self, config: RunConfig, plugins: Plugins, directory: RunDirectory, processes: Processes) -> None:
        self.config, self.plugins, self.directory, self.processes = config, plugins, directory, processes
        self.algorithm = make_algorithm(config, plugins)
        self._written = False

    def run(self, resume: bool) -> RunResult:
        """Train; whatever of it was made is closed, also where the rest could not be made."""
        with ExitStack() as closing:
            # Sharded modules are in cycles, which would keep what they hold of the device from the process's next run.
            closing.callback(gc.collect)
            return self._run(resume, closing)

    def _run(self, resume: bool, closing: ExitStack) -> RunResult:
        config, processes = self.config, self.processes
        started, parts = time.perf_counter(), Phases(("data", "teacher", "student", "rollout"))
        torch.manual_seed(config.seed + processes.rank)
        with parts("data"):
            tokenize, vocabulary = open_tokenizers(config, self.plugins, self.algorithm)
            require_shared_vocabulary(config.algorithm.name, self.algorithm, vocabulary)
            steps, last_step = open_steps(config, self.plugins, tokenize)
            closing.callback(steps.close)
            config = config.model_copy(update={"training": config.training.model_copy(update={"steps": last_step})})
            _log.info(f"the training data is open: the run has {last_step} steps")
            processes.agree("the training data", steps.records, "give every machine the same files")
            held_out, unusable = self._held_out(tokenize, vocabulary)
        steps.skipped.update(unusable)
        teacher_spec = None
        if processes.is_first:
            closing.callback(shutil.rmtree, self.directory.student, ignore_errors=True)
        with parts("teacher"):
            teacher = self._teacher(vocabulary)
        if teacher is not None:
            closing.callback(teacher.close)
        if teacher is not None and tokenize.teacher is not None:
            require_sizes(teacher.engine, tokenize.teacher.bytes_of)
            teacher_spec = dataclasses.replace(
                teacher.engine.spec, head=teacher.head, tokenizer=tokenize.teacher.bytes_of,
                end=tokenize.teacher.end(steps.chat),
            )  # fmt: skip
        with parts("student"):
            student = Student(
                config.student, config.training, self.algorithm, tokenize.student.bytes_of,
                tokenize.student.end(steps.chat), teacher_spec, processes,
            )  # fmt: skip
        with parts("rollout"):
            rollouts = self._rollouts(tokenize, student)
        if rollouts is not None:
            closing.callback(rollouts.engine.close)
        follow = None
        if config.teacher is not None and config.teacher.follow is not None and teacher is not None:
            follow = Follow(config.teacher.follow, student, teacher.engine)
        checkpoints = Checkpoints(self.directory.checkpoints, config.training.keep_checkpoints, processes)
        closing.callback(checkpoints.wait)
        state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "wall_seconds": 0.0, "peak_memory_bytes": 0,
                                 "loss": None, "engine_restarts": 0, "evaluation": {}, "evaluated": None,
                                 "plugins": plugin_set(self.plugins), "run": config.as_dict(),
                                 "records": steps.records}  # fmt: skip
        state["adapters"] = processes.broadcast(identity(config.student) if processes.is_first else None)
        events = Events(self._trackers() if processes.is_first else [])
        closing.callback(events.close)
        learnt_from = teacher if "teacher" in self.algorithm.needs else None
        flops = StepFlops.of(config, learnt_from.engine if learnt_from else None)
        loop = Loop(config, processes, steps, student, learnt_from, teacher, rollouts, follow, held_out, flops,
                    checkpoints, events, state, started)  # fmt: skip
        warnings = self._resume(loop) if resume else []
        if vocabulary is not None and vocabulary.same and vocabulary.renaming:
            warnings.append(f"student and teacher share a vocabulary, but {vocabulary.renaming}")
        if processes.is_first:
            self.directory.forget_after(state["step"], last_step, loop.owes_evaluation())
            if state["step"] < last_step:  # else what is written tells how the weights came about
                self.directory.describe(config, self.plugins)
        first = state["step"] + 1
        events.start(self.directory.path, config.as_dict(), first)
        if resume and state["step"] > 0:
            events.emit("resumed", step=state["step"])
        if teacher is not None:
            rows = teacher.engine.transport
            events.emit("teacher", step=state["step"], engine=teacher.engine.name, transport=rows.name,
                        copies_per_row=rows.copies_per_row, bytes_per_row=rows.bytes_per_row)  # fmt: skip
        for warning in warnings:
            events.emit("warning", step=state["step"], message=warning)
        events.emit("ready", step=state["step"], seconds=time.perf_counter() - started, parts=parts.seconds)
        loop.run()
        summary = {
            "steps": state["step"],
            "tokens": state["tokens"],
            "seconds": state["seconds"],
            "loss": state["loss"],
            **loop.taken(),
            "world_size": processes.size,
            "evaluation": state["evaluation"],
            "engine_restarts": state["engine_restarts"],
            "samples": dict(steps.accounting),
            "skipped": [{"sample": name, "reason": steps.skipped[name]} for name in sorted(steps.skipped, key=_place)],
        }
        if processes.is_first:
            self.directory.write_summary(summary)
        events.emit("end", **summary)
        return RunResult(self.directory.path, state["step"], state["loss"], state["evaluation"])

    def _held_out(
        self, tokenize: PairTokenizer, vocabulary: VocabularyComparison | None
    ) -> tuple[HeldOut, dict[str, str]]:
        """The held-out samples, and what is wrong with those that are skipped."""
        tables = open_tables(self.config.data.eval, self.config.data, self.plugins, tokenize)
        prepared = [table[index] for table in tables for index in range(len(table))]
        pairs = [found.pair for found in prepared if found.pair is not None]
        if prepared and not pairs:
            faulty = next((found for found in prepared if found.problem is not None), prepared[0])
            raise KdflowError(nothing_to_learn("eval", f"{len(prepared)} records", faulty))
        # A teacher of more merges than the student's cuts a text otherwise, though ids below are the same: rows differ.
        same = vocabulary is not None and vocabulary.same and all(
            pair.teacher is not None and first_difference(pair.student, pair.teacher) is None for pair in pairs
        )  # fmt: skip
        _log.info(f"{len(pairs)} samples are held out")
        held_out = HeldOut(pairs, self.config.data.max_tokens, tokenize.student.tokenizer, same, self.processes)
        return held_out, {found.id: found.problem for found in prepared if found.problem is not None}

    def _teacher(self, vocabulary: VocabularyComparison | None) -> Teacher | None:
        config = self.config
        if config.teacher is None:
            return None
        assert vocabulary is not None
        engine = config.teacher.engine
        cls, options = self.plugins.configured("teacher engine", engine.name, engine.options())
        dtype = getattr(torch, config.training.dtype)
        context = EngineContext(
            self.processes.device, dtype, config.training.compile, config.data.max_tokens, bool(config.teacher.sleep)
        )
        model = config.teacher.model if config.teacher.follow is None else self._whole_student()
        made = cls(model, options, context)
        rest(made)
        return Teacher(made, vocabulary.teacher_size)

    def _whole_student(self) -> str:
        """The student as engines load it: one that is cut in depth is written to the run directory first."""
        student = self.config.student
        if student.keep_layers is None:
            return student.model
        if not self._written:
            self.processes.first(lambda: write_student(student, self.directory.student))
            self._written = True
        return str(self.directory.student)

    def _rollouts(self, tokenize: PairTokenizer, student: Student) -> Rollouts | None:
        """What lets the student write, where the run asks for it."""
        config, asked = self.config, self.config.rollout
        if asked is None or config.rollout_fraction == 0.0:
            return None
        cls, options = self.plugins.configured("rollout engine", asked.engine.name, asked.engine.options())
        dtype = getattr(torch, config.training.dtype)
        context = EngineContext(self.processes.device, dtype, sleeps=bool(asked.sleep))
        sampling = Sampling(  # nothing beyond data.max_length is learnt
            asked.max_new_tokens, asked.temperature, asked.top_p, asked.n, config.seed, max_length=tokenize.max_length
        )
        sampling.require_different()
        engine, made = cls(self._whole_student(), options, context), RolloutTokenizer(tokenize, asked.stop)
        rest(engine)
        return Rollouts(asked, sampling, engine, made, student, self.processes, self.directory.rollouts)

    def _trackers(self) -> list[Tracker]:
        trackers = []
        for choice in self.config.tracking:
            cls, options = self.plugins.configured("tracker", choice.name, choice.options())
            trackers.append(cls(options))
        return trackers

    def _resume(self, loop: Loop) -> list[str]:
        """Load the newest whole checkpoint, and say what is not as it was."""
        wanted, random = loop.tensors(), random_numbers(self.processes)

        def tensors(saved: Mapping[str, Any]) -> dict[str, torch.Tensor]:
            if changed := changes(saved.get("adapters") or {}, loop.state["adapters"] or {}):
                raise KdflowError(
                    f"{self.directory.checkpoints} holds adapters for another student: {'; '.join(changed)}. Give "
                    "student.model, student.keep_layers and student.lora back as they were, or give another output"
                )
            kept, keeps = (run["student"].get("keep_layers") for run in (saved["run"], loop.state["run"]))
            if kept != keeps:  # a cut student's layers are numbered anew: they would fit, and lie in wrong places
                raise KdflowError(
                    f"student.keep_layers was {kept!r} and is {keeps!r}: what was trained are other layers; give it "
                    "back as it was, or give another output"
                )
            layout = (self.processes.size, self.processes.device.type)
            if (saved["world_size"], saved.get("device", layout[1])) != layout:
                for name in random:
                    del wanted[name]  # another layout has other random numbers
            return wanted

        saved, warnings = loop.checkpoints.load(tensors)
        if saved is None:
            return warnings
        restore_random_numbers(self.processes, wanted)
        was, now = saved["run"]["training"]["tokens_per_step"], self.config.training.tokens_per_step
        if self.config.training.epochs is not None and was != now:
            raise KdflowError(
                f"training.tokens_per_step was {was} and is {now}: how many steps training.epochs takes depends on it; "
                "give it back as it was, or training.steps in place of training.epochs"
            )
        if loop.follow is not None:
            loop.follow.hand_over()
        loop.steps.restore(saved["data"])
        kept = ("step", "tokens", "seconds", "wall_seconds", "peak_memory_bytes", "loss", "engine_restarts",
                "evaluation")  # fmt: skip
        loop.state["evaluated"] = saved.get("evaluated", saved["step"])  # an older version did not tell
        loop.state.update({"wall_seconds": saved["seconds"], **{key: saved[key] for key in kept if key in saved}})
        for what in ("run", "plugins"):
            warnings += [f"resumed with another {what}: {change}" for change in changes(saved[what], loop.state[what])]
        records, before = loop.state["records"], saved.get("records", {})
        warnings += [
            f"resumed with other records in {name}: which samples come next is not what it was"
            for name in records
            if before.get(name, records[name]) != records[name]
        ]
        return warnings


def _require_shared(directory: Path, processes: Processes) -> None:
    """Check that every rank sees the run directory: each writes its part of a checkpoint there.

    Raises:
        KdflowError: a rank does not; all are told.
    """
    with ExitStack() as made:
        name = None
        if processes.is_first:
            name = Path(made.enter_context(tempfile.NamedTemporaryFile(prefix=".kdflow-", dir=directory)).name).name
        seen = processes.gather((directory / processes.broadcast(name)).exists())
    if not all(seen):
        raise KdflowError(
            f"output: rank {seen.index(False)} does not see what rank 0 writes into {directory}; give a directory that "
            "all machines share"
        )


def _place(sample: str) -> list[str | int]:
    """What samples are ordered by: numbers in their names by their value, so that line 9 comes before line 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", sample)]
