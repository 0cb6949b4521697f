"""Everything that can be known of a run before it takes a GPU: no weights are loaded."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdflow.config import RunConfig
from kdflow.contracts import KdflowError, Pair, TeacherEngine
from kdflow.contracts.returned import require_prepared
from kdflow.data.packing import pack
from kdflow.data.rendering import SideTokenizer
from kdflow.engines.cache.capture import find_capture
from kdflow.engines.cache.shards import Shards
from kdflow.engines.cache.teacher import CacheTeacher
from kdflow.engines.transformers.teacher import TransformersTeacher
from kdflow.models.loading import meta_model
from kdflow.plugins import Plugins
from kdflow.runtime import memory
from kdflow.runtime.check_data import DataCheck, Problems, find_data
from kdflow.runtime.flops import StepFlops
from kdflow.runtime.plan import MemoryPlan
from kdflow.runtime.prepare import engines, make_algorithm, prepare
from kdflow.runtime.processes import require_groups
from kdflow.runtime.run_directory import RunDirectory, environment, nearest_existing
from kdflow.runtime.tokenizers import open_tokenizers, require_shared_vocabulary
from kdflow.tokenizers.vocabulary import vocabulary_size


def check(run: str | Path, overrides: Sequence[str], block: Iterable[str], devices: int) -> dict[str, Any]:
    """All figures of a run as plain data; ``problems`` are sentences, and none of them means that it can start.

    Raises:
        KdflowError: the run file itself is at fault.
    """
    config, plugins = prepare(run, overrides, block)
    return _Check(config, plugins, devices).report()


class _Check:
    def __init__(self, config: RunConfig, plugins: Plugins, devices: int) -> None:
        self.config, self.plugins, self.devices = config, plugins, devices
        self.problems = Problems()
        self.looked_at: list[Pair] = []  # of the training data
        self.prepared: list[Pair] = []  # what the algorithm makes of them
        self.algorithm = make_algorithm(config, plugins)

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "environment": environment(self.plugins, Path(self.config.output)),
            "run": self.config.as_dict(),
        }
        with self.problems.collected():
            require_groups(self.config.training.replicas, self.devices)
        for engine in engines(self.config, self.plugins).values():
            with self.problems.collected():
                engine.require_installed()
        captured: Shards | None = None
        with self.problems.collected():
            captured = self._capture()
        for name, section in (("output", self._output), ("tokenizers", self._tokenizers), ("models", self._models)):
            with self.problems.collected():
                found[name] = section()
        if "tokenizers" in found:
            data = DataCheck(self.config, self.plugins, self.tokenize, captured, self.problems)
            found["data"], self.looked_at = data.figures(), data.looked_at
            with self.problems.collected():
                self.prepared = [self._prepare(pair) for pair in self.looked_at]
            if len(found["data"]["train"]) == len(self.config.data.train):
                found["sample"] = data.sample()
                found["batches"] = self._batches(found["data"]["train"])
        else:
            find_data(self.config, self.problems)
        if "models" in found:
            found["memory"] = self._memory(found.get("batches", {}))
            with self.problems.collected():
                self._require_disk(found["memory"]["checkpoints_on_disk"], found["environment"]["hardware"])
            if "batches" in found:
                found["flops_per_step"] = self._flops(found["batches"])
        return {**found, "problems": self.problems}

    def _output(self) -> str:
        path = Path(self.config.output)
        with self.problems.collected():
            RunDirectory(path).require_free()
            there = nearest_existing(path)
            if not there.is_dir() or not os.access(there, os.W_OK):
                why = "may not be written to" if there.is_dir() else "is a file"
                raise KdflowError(f"output: {path} cannot be written to: {there} {why}")
        return str(path)

    def _capture(self) -> Shards | None:
        """Where the teacher's rows are read from, if they are not computed."""
        teacher = self.config.teacher
        if teacher is None or teacher.engine.name != CacheTeacher.name:
            return None
        dtype = getattr(torch, self.config.training.dtype)
        return Shards(find_capture(teacher.engine.options().get("path"), teacher.model, dtype))

    def _tokenizers(self) -> dict[str, Any]:
        self.tokenize, vocabulary = open_tokenizers(self.config, self.plugins, self.algorithm)
        sides = {"student": self.tokenize.student, "teacher": self.tokenize.teacher}
        found: dict[str, Any] = {name: _tokenizer(side) for name, side in sides.items() if side is not None}
        if vocabulary is not None:
            described = {"same": vocabulary.same, "renaming": vocabulary.renaming, **dataclasses.asdict(vocabulary)}
            found["vocabulary"] = described
            with self.problems.collected():
                require_shared_vocabulary(self.config.algorithm.name, self.algorithm, vocabulary)
        return found

    def _models(self) -> dict[str, Any]:
        self.student, self.teacher = memory.student_shape(self.config), self._teacher_shape()
        shapes = {"student": self.student} | ({"teacher": self.teacher} if self.teacher else {})
        return {
            name: {"architecture": s.name, "parameters": s.parameters, "trained": s.trained, "layers": s.layers,
                   "hidden_size": s.hidden_size, "vocab_size": s.vocab_size}
            for name, s in shapes.items()
        }  # fmt: skip

    def _teacher_shape(self) -> memory.Shape | None:
        """The teacher's shape; None of a teacher whose sizes cannot be read, which may teach all the same."""
        try:
            return memory.teacher_shape(self.config)
        except KdflowError:
            teacher = self.config.teacher
            assert teacher is not None
            if teacher.engine.name == TransformersTeacher.name:  # others may run what transformers does not know
                with self.problems.collected():
                    meta_model(teacher.model, getattr(torch, self.config.training.dtype))
            return None

    def _prepare(self, pair: Pair) -> Pair:
        """What the algorithm makes of a pair.

        Raises:
            KdflowError: it fails at it, or makes something else.
        """
        try:
            returned = self.algorithm.prepare(pair)
        except KdflowError:
            raise
        except Exception as error:  # plugins raise what they like
            told = f"prepare failed at {pair.id}: {type(error).__name__}: {error}"
            raise KdflowError(f"algorithm '{self.algorithm.name}': {told}") from error
        return require_prepared(self.algorithm, pair, returned)

    def _batches(self, sources: list[dict[str, Any]]) -> dict[str, Any]:
        training = self.config.training
        weights = np.array([source["weight"] * (source["records"] or 1) * source["usable_share"] for source in sources])
        tokens = (
            float(np.average([source["mean_tokens"] for source in sources], weights=weights)) if any(weights) else 0
        )
        targets = float(np.average([s["mean_targets"] for s in sources], weights=weights)) if any(weights) else 0
        if not tokens:
            return {}
        samples = max(1.0, training.tokens_per_step / tokens)
        micro = math.ceil(max(tokens, training.tokens_per_step) / self.config.data.max_tokens / self.devices)
        found: dict[str, Any] = {
            "samples_per_step": samples, "target_tokens_per_step": samples * targets,
            "micro_batches_per_step_and_device": micro,
        }  # fmt: skip
        if all(source["records"] is not None for source in sources):
            epoch = float(weights.sum()) / samples  # those that cannot be used are drawn, and fill no step
            found["steps_per_epoch"] = epoch
            steps = training.steps if training.epochs is None else min(training.steps or 1e18, training.epochs * epoch)
            found |= {"steps": round(steps or 0), "epochs": (steps or 0) / epoch}
        return found

    def _memory(self, batches: dict[str, Any]) -> dict[str, Any]:
        capacity = memory.capacity()
        plan = MemoryPlan(
            self.config, self.plugins, self.algorithm, self.student, self.teacher, self.devices, capacity,
            self._most_targets(), batches.get("micro_batches_per_step_and_device", 2),
        )  # fmt: skip
        on_gpu = torch.cuda.is_available()
        asleep = plan.asleep() if on_gpu else [one for one in plan.engines if one.sleeps]
        fullest, needed = plan.needed(asleep)
        total = needed["total"] or 0
        if total > capacity:
            turns, others = "", [one for one in plan.engines if one not in asleep and one.asleep < one.awake]
            if others and (less := plan.total(asleep + others)) < total:
                keys = " and ".join(f"{one.section}.sleep" for one in others)
                turns = f"set {keys}, with which it is {less / 2**30:.1f} GiB, "
            self.problems.append(
                f"about {total / 2**30:.1f} GiB are needed on each device, which has {capacity / 2**30:.1f} GiB: "
                f"{turns}lower data.max_tokens, set training.activation_checkpointing, or use more devices"
            )
        disk = self._checkpoints(batches) * memory.checkpoint_bytes(self.config, self.student)
        return {"devices": self.devices, "fullest": fullest, "bytes": needed, "capacity": capacity,
                "asleep": [one.section for one in asleep], "checkpoints_on_disk": disk}  # fmt: skip

    def _checkpoints(self, batches: dict[str, Any]) -> int:
        """Those that are on disk at once at most: all that are kept, and the one that is being written."""
        training = self.config.training
        if training.checkpoint_every is None:
            return 1
        steps = batches.get("steps") or training.steps
        written = math.inf if steps is None else math.ceil(steps / training.checkpoint_every)
        return int(min(training.keep_checkpoints + 1, written))

    def _require_disk(self, needed: int, hardware: dict[str, Any]) -> None:
        if needed > (free := hardware["free_disk_bytes"]):
            raise KdflowError(
                f"output: the checkpoints take about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free "
                f"where {self.config.output} is: make room there, lower training.keep_checkpoints, or give another "
                "output"
            )

    def _most_targets(self) -> int:
        """Learnt tokens of a full micro-batch: as dense as the densest of the records looked at, or all tokens."""
        most, config = self.config.data.max_tokens, self.config
        if not self.prepared or config.rollout_fraction > 0:  # how much the student writes is not known
            return most
        bins = pack(self.prepared, most)
        densest = max(
            sum(len(pair.student.targets) for pair in pairs) / sum(len(pair.student) for pair in pairs)
            for pairs in bins
        )
        return math.ceil(densest * most)

    def _flops(self, batches: dict[str, Any]) -> float | None:
        if not batches or not self.looked_at:
            return None
        config, teacher = self.config, self.teacher if "teacher" in self.algorithm.needs else None
        if teacher is None and config.teacher is not None and "teacher" in self.algorithm.needs:
            return None
        stored = False
        if config.teacher is not None:
            engine: type[TeacherEngine] = self.plugins.find(config.teacher.engine.name, "teacher engine").cls
            stored = engine.stored
        flops = StepFlops(self.student, teacher, stored, config.student.lora is not None)
        recompute = bool(config.training.activation_checkpointing)
        lengths = [len(pair.student) for pair in self.looked_at]
        share = sum(lengths) / config.training.tokens_per_step
        targets = batches["target_tokens_per_step"] * share
        sides = [pair.teacher for pair in self.looked_at if pair.teacher is not None]
        ratio = sum(len(side.targets) for side in sides) / sum(len(pair.student.targets) for pair in self.looked_at)
        total = flops.count(lengths, targets, [len(side) for side in sides], targets * ratio, recompute=recompute)
        return total / share


def _tokenizer(side: SideTokenizer) -> dict[str, Any]:
    tokenizer = side.tokenizer
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": vocabulary_size(tokenizer),
        "begins_texts_with": tokenizer.convert_ids_to_tokens(side.prefix),
        "ends_responses_with": tokenizer.eos_token,
        "chat_template": tokenizer.chat_template is not None,
    }
