"""What engines promise, and how one that does not keep it is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import kdflow
from kdflow.contracts import EngineContext, KdflowError, Options, Rollout, Sampling


class Wrong(kdflow.RolloutEngine):
    """A plugin's engine, whose responses are these."""

    name = "wrong"
    responses: Sequence[Rollout] = ()

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Rollout]:
        return list(self.responses)

    def update_weights(self, weights: Iterator[Any]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


GOOD = Rollout((5, 6), (-1.0, -2.0), "stop")


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ([GOOD], "1 responses, not 1 to each of 2 prompts"),
        ([GOOD, Rollout((5, 6, 7), (-1.0,))], "1 log-probabilities to a response of 3 ids"),
        ([Rollout((), (-1.0,)), GOOD], "1 log-probabilities to a response of 0 ids"),
        ([GOOD, Rollout((5,), (-1.0,), "eos")], "finish is 'eos', not 'stop' or 'length'"),  # type: ignore[arg-type]
    ],
)
def test_responses_that_are_not_what_they_must_be_are_refused(responses: list[Rollout], message: str) -> None:
    engine = Wrong("", Options(), EngineContext(torch.device("cpu"), torch.float32))
    engine.responses = [GOOD, GOOD]
    assert engine.respond([[1], [2]], Sampling()) == [[GOOD], [GOOD]]
    with pytest.raises(KdflowError, match="prompt 1 has no tokens: there is nothing to go on from"):
        engine.respond([[1], []], Sampling())
    engine.responses = responses
    with pytest.raises(KdflowError, match=f"rollout engine 'wrong' gave .*{message}"):
        engine.respond([[1], [2]], Sampling())
