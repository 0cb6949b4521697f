"""The responses that the student writes itself while it is trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdflow.config import RolloutConfig
from kdflow.contracts import Batch, KdflowError, Pair, Rollout, RolloutEngine, Sampling, Side, TrainingStopped
from kdflow.data.rollouts import RolloutTokenizer
from kdflow.data.steps import Step
from kdflow.runtime.processes import Processes
from kdflow.runtime.run_directory import write_atomically
from kdflow.runtime.student import Student
from kdflow.runtime.turns import rest, wake

_COMPARED = 256  # tokens of a micro-batch whose log-probabilities are compared with those they were drawn with
_FULL, _HALF = 1e-2, 0.2  # how far they may lie apart, in nats on average, where only arithmetic differs


class Rollouts:
    """Lets an engine, which holds a copy of the student, write responses in the place of the data's.

    Each rank has an engine and writes its share of a step's responses; every rank learns of all of them, since packing
    goes by their lengths. What is drawn depends on prompt, seed and step, not on ranks.

    Args:
        config: the section ``rollout``.
        sampling: how responses are drawn; its seed is the run's, from which that of each step is made.
        engine: of this rank.
        tokenize: makes training samples out of responses.
        student: whose weights are copied.
        processes: all ranks.
        directory: where responses are written, on request.
    """

    def __init__(self, config: RolloutConfig, sampling: Sampling, engine: RolloutEngine, tokenize: RolloutTokenizer,
                 student: Student, processes: Processes, directory: Path) -> None:  # fmt: skip
        self.engine = engine
        self._config, self._sampling, self._tokenize, self._student = config, sampling, tokenize, student
        self._processes, self._directory = processes, directory
        self._stale, self._synced_at = True, 0

    def sync(self, step: int, saved: bool, writes: bool) -> None:
        """Begin the engine's turn before a step in which it ``writes``, and copy the student's weights, if it is time.

        It is after every ``sync_every`` steps, and where a step was ``saved`` in a checkpoint: a run that resumes there
        has no older weights to go on with. Weights are copied when they are needed: what is drawn with them is compared
        in the same step.
        """
        self._stale = self._stale or saved or (step - 1) % self._config.sync_every == 0
        if writes:
            wake(self.engine)
        if writes and self._stale:
            self.engine.update_weights(self._student.weights())
            self._stale, self._synced_at = False, step

    def write(self, step: int, drawn: Step) -> tuple[Step, dict[str, float]]:
        """The step with the student's responses where it is to write them, and figures; the engine's turn is over."""
        # An engine is told once for all its prompts what ends a response; conversations may end otherwise than texts.
        alike: dict[tuple[int, ...], list[int]] = {}
        for number in sorted(drawn.on_policy):
            alike.setdefault(self._tokenize.stop_ids(drawn.pairs[number]), []).append(number)
        answered: dict[int, list[Rollout]] = {}
        for stop_ids, numbers in alike.items():
            prompts = [self._tokenize.prompt(drawn.pairs[number]) for number in numbers]
            answered |= zip(numbers, self._generate(step, prompts, stop_ids), strict=True)
        if answered:
            rest(self.engine)
        pairs, cut = list[Pair](), 0
        for number, pair in enumerate(drawn.pairs):
            if number not in answered:
                pairs.append(pair)
                continue
            for one in answered[number]:
                pairs.append(made := self._tokenize(pair, one))
                ended_by_room = one.finish == "length" and len(one.ids) < self._sampling.max_new_tokens
                cut += ended_by_room or made is pair or len(made.student.targets) < len(one.ids)
        if self._config.save and self._processes.is_first:
            self._save(step, drawn, answered)
        written = [one for of_prompt in answered.values() for one in of_prompt]
        figures = {
            "rollouts": len(written),
            "rollout_tokens": sum(len(one.ids) for one in written),
            "rollout_stopped": sum(one.finish == "stop" for one in written) / max(len(written), 1),
            "rollout_cut": cut / max(len(written), 1),
        }
        return dataclasses.replace(drawn, pairs=tuple(pairs)), figures

    def _generate(self, step: int, prompts: list[list[int]], stop_ids: tuple[int, ...]) -> list[list[Rollout]]:
        """The responses to each prompt, those of other ranks included."""
        processes = self._processes
        seed = (self._sampling.seed << 32) + step
        sampling = dataclasses.replace(self._sampling, seed=seed, stop_ids=stop_ids)
        mine = range(processes.rank, len(prompts), processes.size)
        # Also where there is nothing to write: ranks that share an engine ask together.
        written = self.engine.respond([prompts[number] for number in mine], sampling)
        told = [[(one.ids, one.log_probabilities, one.finish) for one in of_prompt] for of_prompt in written]
        found: list[list[Rollout]] = [[] for _ in prompts]
        for rank, of_rank in enumerate(processes.gather(told)):
            found[rank :: processes.size] = [
                [self._tokenize.stopped(Rollout(*one)) for one in of_prompt] for of_prompt in of_rank
            ]
        return found

    @torch.no_grad()
    def gap(self, side: Side, batch: Batch) -> dict[str, tuple[Tensor, float]]:
        """How far the log-probabilities of sampled tokens lie from those they were drawn with, in nats, on average.

        Of up to 256 tokens of a micro-batch. It is rounding alone where the engine's weights are the student's.
        """
        assert batch.sampled is not None
        chosen = np.flatnonzero(~np.isnan(batch.sampled))[:_COMPARED]
        rows = torch.from_numpy(chosen).to(side.rows.device)
        logits = side.head.logits(side.rows[rows]).float() / (self._config.temperature or 1.0)
        now = logits.log_softmax(-1).gather(-1, side.tokens.labels[rows][:, None])[:, 0]
        then = torch.from_numpy(batch.sampled[chosen]).to(now.device)
        return {"rollout_gap": ((now - then).abs().sum(), float(len(chosen)))}

    def require_same(self, step: int, gap: float) -> None:
        """Check the gap of a step whose responses were drawn with the weights that are trained.

        Raises:
            TrainingStopped: it is more than another engine's rounding; the engine's model is not the student.
        """
        limit = _FULL if self.engine.context.dtype.itemsize >= 4 else _HALF
        if self._synced_at == step and gap > limit and not self._student.drops_out:
            raise TrainingStopped(
                f"step {step}: the student's responses were drawn by rollout.engine '{self.engine.name}' with "
                f"log-probabilities that differ from the student's by {gap:.3g} nats on average, right after its "
                f"weights were copied; at most {limit:g} can be rounding. The engine did not take the weights, or runs "
                "the model in another way; use rollout.engine.name=transformers. The student was not changed by this "
                "step"
            )

    def _save(self, step: int, drawn: Step, answered: dict[int, list[Rollout]]) -> None:
        text_of = self._tokenize.text
        lines = [
            {"sample": pair.id, "prompt": text_of(self._tokenize.prompt(pair)), "response": text_of(one.ids),
             "tokens": len(one.ids), "finish": one.finish, "log_probability": sum(one.log_probabilities)}
            for pair, of_prompt in ((drawn.pairs[number], of_prompt) for number, of_prompt in sorted(answered.items()))
            for one in of_prompt
        ]  # fmt: skip
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            self._directory.mkdir(exist_ok=True)
            write_atomically(self._directory / f"step-{step:08d}.jsonl", text)
        except OSError as error:
            raise KdflowError(f"{self._directory} cannot be written to: {error.strerror}; mend it") from None
