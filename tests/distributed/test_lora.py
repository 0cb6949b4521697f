"""Adapters on several ranks, and killed: real processes, real gloo, real SIGKILL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdflow
from tests.support.runs import events, kill_when, start, train, trajectory

RunFile = Callable[..., dict[str, Any]]


def test_one_process_equals_two_ranks(tiny: dict[str, str], run_file: RunFile, tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "student": {"model": tiny["untied"], "lora": {"rank": 3}},  # three rows on two ranks: the shards differ
        "algorithm": {"name": "jsd", "ce_weight": 0.2},
        "training": {"tokens_per_step": 1000},
    }
    kdflow.train(run_file(output=str(tmp_path / "one"), **shared))
    data = {**run_file()["data"], "max_tokens": 128}
    train(run_file(output=str(tmp_path / "two"), data=data, **shared), "--nproc-per-node", "2")
    for key in ("loss", "grad_norm"):
        expected = [value for _, value in trajectory(tmp_path / "one", [key])]
        assert [value for _, value in trajectory(tmp_path / "two", [key])] == pytest.approx(expected, rel=2e-5)
    one, two = (events(tmp_path / name, "eval")[-1]["divergence"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)


def test_killed_and_resumed_with_dropout(tiny: dict[str, str], run_file: RunFile, tmp_path: Path) -> None:
    """Bitwise: what dropout draws is part of the checkpoint."""
    run = run_file(
        student={"model": tiny["untied"], "lora": {"rank": 4, "dropout": 0.2}},
        training={"steps": 10, "tokens_per_step": 1000, "checkpoint_every": 2},
        output=str(tmp_path / "killed"),
    )
    train({**run, "output": str(tmp_path / "whole")})
    kill_when(start(run), lambda: (tmp_path / "killed" / "checkpoints" / "step-00000004").exists())
    train(run, "--resume", "auto")
    assert events(tmp_path / "killed", "resumed")
    assert trajectory(tmp_path / "killed") == trajectory(tmp_path / "whole")
