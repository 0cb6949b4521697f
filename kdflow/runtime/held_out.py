"""The held-out samples of a run, evaluated over all ranks."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from kdflow.contracts import Pair
from kdflow.data.packing import collate, pack, share
from kdflow.evaluation.held_out import Evaluation, measure, summarise
from kdflow.runtime.processes import Processes
from kdflow.runtime.student import Student
from kdflow.runtime.teacher import Teacher
from kdflow.runtime.turns import awake

_PROMPT_TOKENS, _NEW_TOKENS = 32, 48


class HeldOut:
    """Held-out pairs, packed once; with the ``same_targets`` on both sides their distributions are compared."""

    def __init__(
        self, pairs: list[Pair], max_tokens: int, tokenizer: Any, same_targets: bool, processes: Processes
    ) -> None:
        self._pairs, self._tokenizer, self._processes = pairs, tokenizer, processes
        self._same_targets = same_targets
        self._mine = share(pack(pairs, max_tokens, processes.size), processes.rank, processes.size)

    def evaluate(self, student: Student, teacher: Teacher | None) -> Evaluation | None:
        """Figures over all held-out samples; None where there are none."""
        if not self._pairs:
            return None
        teacher = teacher if self._same_targets else None
        measured: list[tuple[torch.Tensor, ...]] = []
        with awake(teacher.engine) if teacher else nullcontext():
            for pairs in self._mine:
                batch = collate(pairs, teacher is not None).to(self._processes.device)
                lease, side = teacher.score(batch) if teacher else (None, None)
                measured.append(student.measure(batch, partial(measure, teacher=side)))
                if lease is not None:
                    lease.release()
        target_tokens = sum(len(pair.student.targets) for pair in self._pairs)
        text_bytes = sum(pair.student.text_bytes for pair in self._pairs)
        sums = [torch.stack(values).double().sum() for values in zip(*measured, strict=True)]
        return summarise(self._processes.sum(sums), target_tokens, text_bytes)

    def sample(self, student: Student) -> dict[str, str]:
        """The first held-out sample's prompt, or the beginning of its text, as the student goes on with it."""
        tokens = self._pairs[0].student
        cut = int(tokens.targets[0]) + 1
        prompt = tokens.ids[: cut if cut > 1 else min(_PROMPT_TOKENS, len(tokens) - 1)]
        new = min(_NEW_TOKENS, student.context_length // 2)
        prompt = prompt[-(student.context_length - new) :]
        ids = student.generate(torch.from_numpy(prompt).to(self._processes.device), new, self._tokenizer.eos_token_id)
        decode = self._tokenizer.decode
        return {"prompt": decode(prompt.tolist()), "text": decode(ids.tolist(), skip_special_tokens=True)}
