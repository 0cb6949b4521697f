"""8-bit moments and stochastic rounding on several ranks: real processes, real gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdflow
from tests.support.models import make_model
from tests.support.runs import interrupted, train, trajectory

RunFile = Callable[..., dict[str, Any]]


def test_8_bit_moments_go_on_with_another_number_of_ranks(run_file: RunFile, tmp_path: Path) -> None:
    """The blocks that share a scale do not depend on the shards."""
    run = run_file(
        student={"model": make_model(tmp_path / "model", hidden=64, seed=1)},
        training={"optimizer": "adamw_8bit", "checkpoint_every": 2, "tokens_per_step": 1000},
    )
    one, both = tmp_path / "one", tmp_path / "both"
    kdflow.train({**run, "output": str(one)})
    interrupted(one, both, 2)
    train({**run, "output": str(both)}, "--nproc-per-node", "2", "--resume", "auto")
    losses = [[loss for _, loss in trajectory(output, ["loss"])] for output in (one, both)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_stochastic_rounding_resumes_bitwise_on_two_ranks(
    tiny: dict[str, str], run_file: RunFile, tmp_path: Path
) -> None:
    """Each rank draws its own random numbers, so two ranks equal one process only on average."""
    run = run_file(training={"parameters": "bfloat16", "checkpoint_every": 2, "tokens_per_step": 1000})
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train({**run, "output": str(whole)}, "--nproc-per-node", "2")
    interrupted(whole, resumed, 2)
    train({**run, "output": str(resumed)}, "--nproc-per-node", "2", "--resume", "auto")
    assert trajectory(resumed) == trajectory(whole)
