"""Every hook of kdflow, on one page. Each returns classes; the example under it is a whole plugin.

A plugin is a module that an entry point of the group ``kdflow`` names. Hooks are collected once, at start; from then
on there are only method calls on what the run file selects.
"""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from kdflow.contracts import (
        Algorithm,
        Aligner,
        DatasetReader,
        Divergence,
        Evaluator,
        RolloutEngine,
        TeacherEngine,
        Tracker,
    )

hookspec = pluggy.HookspecMarker("kdflow")
hookimpl = pluggy.HookimplMarker("kdflow")


@hookspec
def kdflow_divergences() -> Iterable[type[Divergence]]:
    """Divergences between next-token distributions; each is a complete algorithm.

    Example:
        import kdflow

        class Squared(kdflow.Divergence):
            name = "squared"

            def per_token(self, student_logits, teacher_logits):
                return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).square().sum(-1)

        @kdflow.hookimpl
        def kdflow_divergences():
            return [Squared]
    """


@hookspec
def kdflow_algorithms() -> Iterable[type[Algorithm]]:
    """Algorithms that are more than a divergence.

    Example:
        import kdflow
        from kdflow.contracts import LossSum

        class Mimic(kdflow.Algorithm):
            name = "mimic"
            needs = frozenset({"teacher", "same_vocabulary"})

            def build(self, student, teacher):
                import torch
                return torch.nn.Linear(student.hidden_size, teacher.hidden_size)

            def loss(self, student, teacher, batch):
                projected = self.module(student.rows).float()
                return LossSum((projected - teacher.rows.float()).square().mean(-1).sum())

        @kdflow.hookimpl
        def kdflow_algorithms():
            return [Mimic]
    """


@hookspec
def kdflow_aligners() -> Iterable[type[Aligner]]:
    """Aligners of two tokenizations of one response.

    Example:
        import kdflow
        from kdflow.contracts import Alignment

        class Whole(kdflow.Aligner):
            name = "whole"

            def align(self, student_tokens, teacher_tokens):
                return Alignment(((slice(0, len(student_tokens)), slice(0, len(teacher_tokens))),))

        @kdflow.hookimpl
        def kdflow_aligners():
            return [Whole]
    """


@hookspec
def kdflow_teachers() -> Iterable[type[TeacherEngine]]:
    """Engines that give a teacher's hidden states.

    Example:
        import kdflow
        from kdflow.contracts import Lease, ModelSpec

        class Noise(kdflow.TeacherEngine):
            name = "noise"
            spec = ModelSpec(hidden_size=8, vocab_size=100)

            @property
            def head(self):
                import torch
                weight = torch.ones(100, 8, device=self.context.device, dtype=self.context.dtype)
                return kdflow.Head(weight)

            def score(self, batch):
                import torch
                rows = torch.randn(len(batch.targets), 8, device=self.context.device, dtype=self.context.dtype)
                return Lease(rows, batch.digest)

            def update_weights(self, weights):
                raise RuntimeError("noise has no weights")

            def close(self):
                pass

        @kdflow.hookimpl
        def kdflow_teachers():
            return [Noise]
    """


@hookspec
def kdflow_rollouts() -> Iterable[type[RolloutEngine]]:
    """Engines that let a model write responses.

    Example:
        import kdflow
        from kdflow.contracts import Rollout

        class Echo(kdflow.RolloutEngine):
            name = "echo"

            def generate(self, prompt_ids, sampling):
                cut = [tuple(ids[: sampling.max_new_tokens]) for ids in prompt_ids for _ in range(sampling.n)]
                return [Rollout(ids, (0.0,) * len(ids)) for ids in cut]

            def update_weights(self, weights):
                raise RuntimeError("echo has no weights")

            def close(self):
                pass

        @kdflow.hookimpl
        def kdflow_rollouts():
            return [Echo]
    """


@hookspec
def kdflow_datasets() -> Iterable[type[DatasetReader]]:
    """Readers of data formats: one record in, one sample out.

    Example:
        import kdflow
        from kdflow.contracts import Sample

        class Question(kdflow.DatasetReader):
            name = "question"

            def read(self, record):
                if "question" not in record or "answer" not in record:
                    raise ValueError("the fields 'question' and 'answer' are needed")
                return Sample(prompt=record["question"] + "\\n", response=record["answer"])

        @kdflow.hookimpl
        def kdflow_datasets():
            return [Question]
    """


@hookspec
def kdflow_trackers() -> Iterable[type[Tracker]]:
    """Trackers, which hear every event of a run.

    Example:
        import kdflow

        class Losses(kdflow.Tracker):
            name = "losses"

            def start(self, directory, run, first_step):
                self.file = (directory / "losses.txt").open("a")

            def event(self, event):
                if event["event"] == "step":
                    print(event["loss"], file=self.file)

            def close(self):
                self.file.close()

        @kdflow.hookimpl
        def kdflow_trackers():
            return [Losses]
    """


@hookspec
def kdflow_evaluators() -> Iterable[type[Evaluator]]:
    """Evaluators, which ask a model questions and count.

    Example:
        import kdflow
        from kdflow.contracts import Sample

        class Brevity(kdflow.Evaluator):
            name = "brevity"

            def evaluate(self, records, model):
                texts = model.respond([Sample(prompt=record["prompt"]) for record in records], 64)
                return {"characters": (float(sum(map(len, texts))), len(texts))}

        @kdflow.hookimpl
        def kdflow_evaluators():
            return [Brevity]
    """
