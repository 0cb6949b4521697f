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
    responses: Any = ()

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Rollout]:
        return self.responses  # type: ignore[no-any-return]

    def update_weights(self, weights: Iterator[Any]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


GOOD = Rollout((5, 6), (-1.0, 1e-3), "stop")  # rounding may put a sure token's above 0


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ([GOOD], "1 responses, not 1 to each of 2 prompts"),
        ([GOOD, Rollout((5, 6, 7), (-1.0,))], "1 log-probabilities to a response of 3 ids"),
        ([Rollout((), (-1.0,)), GOOD], "1 log-probabilities to a response of 0 ids"),
        ([GOOD, Rollout((5,), (-1.0,), "eos")], "finish is 'eos', not 'stop' or 'length'"),  # type: ignore[arg-type]
        ([GOOD, Rollout((5, -1), (-1.0, -1.0))], "ids such as -1; they are whole numbers from 0"),
        ([GOOD, Rollout((1.5,), (-1.0,))], r"ids such as \(1.5,\); they are whole numbers"),  # type: ignore[arg-type]
        ([GOOD, Rollout(torch.tensor([5]), (-1.0,))], "as Tensor and tuple; both are tuples"),  # type: ignore[arg-type]
        ([GOOD, Rollout((5, 6), (-1.0, float("nan")))], "log-probabilities such as nan; they are finite"),
        ([GOOD, Rollout((5, 6), (-float("inf"), -1.0))], "log-probabilities such as -inf; they are finite"),
        ([GOOD, Rollout((5, 6), (-1.0, 3.0))], "log-probabilities such as 3.0; they are finite numbers of at most 0"),
        ([GOOD, [5, 6]], r"\[5, 6\] in the place of a response"),
    ],
)
def test_responses_that_are_not_what_they_must_be_are_refused(responses: list[Any], message: str) -> None:
    engine = Wrong("", Options(), EngineContext(torch.device("cpu"), torch.float32))
    engine.responses = [GOOD, GOOD]
    assert engine.respond([[1], [2]], Sampling()) == [[GOOD], [GOOD]]
    with pytest.raises(KdflowError, match="prompt 1 has no tokens: there is nothing to go on from"):
        engine.respond([[1], []], Sampling())
    engine.responses = responses
    with pytest.raises(KdflowError, match=f"rollout engine 'wrong' gave .*{message}"):
        engine.respond([[1], [2]], Sampling())


@pytest.mark.parametrize("returned", [None, (one for one in [GOOD])], ids=["None", "a generator"])
def test_responses_that_are_no_list_are_refused(returned: Any) -> None:
    engine = Wrong("", Options(), EngineContext(torch.device("cpu"), torch.float32))
    engine.responses = returned
    with pytest.raises(KdflowError, match=r"'wrong': generate must return a list of kdflow\.contracts\.Rollout, but "):
        engine.respond([[1]], Sampling())
