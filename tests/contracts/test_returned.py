"""What plugins return is looked at, and what is wrong with it is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor

import kdflow
from kdflow.contracts import EngineContext, KdflowError, Lease, LossSum, Options, Pair, TargetAlignment, Tokens
from kdflow.contracts.returned import require_leases, require_loss, require_module, require_prepared

ONE = torch.tensor(1.0)
VALUE = r"loss must return a kdflow\.contracts\.LossSum whose value is a scalar tensor, but "


class Plugins(kdflow.Algorithm):
    """A plugin's algorithm."""

    name = "x"

    def loss(self, *_: Any) -> NoReturn:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, f"{VALUE}returned None"),
        (ONE, rf"{VALUE}returned a Tensor of the shape \[\]"),
        (LossSum(1.0), f"{VALUE}its value is 1.0"),  # type: ignore[arg-type]
        (LossSum(ONE[None]), rf"{VALUE}its value is a Tensor of the shape \[1\]"),
        (LossSum(ONE, {"a": (1.0, 1)}), r"a count, which is a number, but 'a' maps to \(1.0, 1\)"),  # type: ignore[dict-item]
        (LossSum(ONE, {"a": ONE}), r"but 'a' maps to a Tensor of the shape \[\]"),  # type: ignore[dict-item]
        (LossSum(ONE, {"a": (ONE[None], 1)}), "but 'a' maps to "),
        (LossSum(ONE, {3: (ONE, 1)}), "metrics map names to .* but 3 maps to "),  # type: ignore[dict-item]
        (LossSum(ONE, None), "metrics map names to .* but they are None"),  # type: ignore[arg-type]
        (LossSum(ONE, {"loss": (ONE, 1)}), "its metrics loss have names of a step's own figures"),
    ],
)
def test_what_is_no_loss_is_refused(returned: object, message: str) -> None:
    good = LossSum(ONE, {"accuracy": (ONE, 2)})
    assert require_loss(Plugins(), good) is good
    with pytest.raises(KdflowError, match=f"algorithm 'x': .*{message}"):
        require_loss(Plugins(), returned)


@pytest.mark.parametrize("returned", [[torch.nn.Linear(2, 2)], torch.nn.Parameter(ONE)])
def test_what_is_no_module_is_refused(returned: object) -> None:
    module = torch.nn.Linear(2, 2)
    assert [require_module(Plugins(), good) for good in (module, None)] == [module, None]
    with pytest.raises(KdflowError, match=r"algorithm 'x': build must return a torch\.nn\.Module .*, but returned "):
        require_module(Plugins(), returned)


def test_targets_are_dropped_of_the_teacher_alone() -> None:
    student, teacher = (Tokens(np.arange(6), np.arange(count), np.zeros(count, int)) for count in (4, 5))
    pair = Pair("train.jsonl:7", student, teacher, TargetAlignment(np.arange(4), np.array([0, 1, 2, 3, -1])))
    fewer = pair.with_teacher_targets(np.arange(5) < 3)
    assert [require_prepared(Plugins(), pair, good) for good in (pair, fewer)] == [pair, fewer]
    halved = replace(student, targets=student.targets[::2], response=student.response[::2])
    with pytest.raises(
        KdflowError, match=r"'x': prepare must .* student's targets as they are, .* of train\.jsonl:7: "
    ):
        require_prepared(Plugins(), pair, replace(pair, student=halved))
    with pytest.raises(KdflowError, match=r"'x': prepare must return a kdflow\.contracts\.Pair, but returned None"):
        require_prepared(Plugins(), pair, None)


class Engine(kdflow.TeacherEngine):
    """A plugin's engine."""

    name = "y"
    head = spec = None  # type: ignore[assignment]

    def score(self, batch: object) -> NoReturn:
        raise NotImplementedError

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> NoReturn:
        raise NotImplementedError

    def close(self) -> NoReturn:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"score_all must return a list of kdflow\.contracts\.Lease, but returned None"),
        ([None], r"score must return a kdflow\.contracts\.Lease of rows \[N, 4\], but returned None"),
        ([torch.zeros(3, 4)], r".*of rows \[N, 4\], but returned a Tensor of the shape \[3, 4\]"),
        ([Lease(None, "")], r".*of rows \[N, 4\], but its rows are None"),  # type: ignore[arg-type]
        ([Lease(torch.zeros(3, 5), "")], r".*of rows \[N, 4\], but its rows are a Tensor of the shape \[3, 5\]"),
    ],
)
def test_what_are_no_leases_is_refused(returned: object, message: str) -> None:
    engine, good = (
        Engine("", Options(), EngineContext(torch.device("cpu"), torch.float32)),
        [Lease(torch.zeros(3, 4), "")],
    )
    assert require_leases(engine, good, 4) is good
    with pytest.raises(KdflowError, match=f"teacher engine 'y': {message}"):
        require_leases(engine, returned, 4)
