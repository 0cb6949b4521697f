"""A student and a teacher of two tokenizers: equivalent configurations, and projectors trained like the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kdflow
from tests.distributed.test_equivalence import RunFile, _assert_same, _run
from tests.support.runs import events, interrupted, saved, trajectory

ALGORITHMS: list[dict[str, Any]] = [
    {"name": "uld", "ce_weight": 0.1},
    {"name": "min_edit", "top_k": 5, "temperature": 2.0},
    {"name": "overlap", "divergence": "jsd"},
    {"name": "dskd", "alignment": "cma", "ce_weight": 0.1},
    {"name": "dskd", "alignment": "eta", "initialise": "random"},
]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{a['name']}-{a.get('alignment', '')}")
def test_one_process_equals_two_ranks_and_other_micro_batches(
    tiny: dict[str, str], run_file: RunFile, tmp_path: Path, algorithm: dict[str, Any]
) -> None:
    data = {**run_file()["data"], "max_tokens": 512}
    shared: dict[str, Any] = {
        "student": tiny["untied"], "algorithm": algorithm, "teacher": {"model": tiny["foreign"]}, "data": data
    }  # fmt: skip
    plain = _run(run_file, tmp_path, "plain", **shared)
    losses = [loss for _, loss in trajectory(plain, ["loss"])]
    assert losses[-1] < losses[0], "nothing was learnt: the comparison would mean nothing"
    step = events(plain, "step")[0]
    assert step["aligned_one_to_one"] + step["aligned_spanning"] + step["aligned_unmatched"] == pytest.approx(1)
    assert 0 < step["aligned_one_to_one"] < 1
    _assert_same(plain, _run(run_file, tmp_path, "two-ranks", processes=2, **shared), rtol=1e-4)
    small = {**shared, "data": {**data, "max_tokens": 256}, "training": {"head_chunk": 11}}
    _assert_same(plain, _run(run_file, tmp_path, "small", **small), rtol=1e-4)
    figures = events(plain, "eval")
    assert figures[-1]["divergence"] is None
    assert figures[-1]["bits_per_byte"] < figures[0]["bits_per_byte"] * 1.2


def test_projectors_are_trained_saved_and_restored(tiny: dict[str, str], run_file: RunFile, tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "student": tiny["student"], "teacher": {"model": tiny["foreign"]}, "algorithm": {"name": "dskd"},
        "training": {"checkpoint_every": 2, "keep_checkpoints": 9, "clip_norm": 0.01},
    }  # fmt: skip
    two_ranks = _run(run_file, tmp_path, "two-ranks", processes=2, **shared)
    first, last = (saved(two_ranks / "checkpoints" / f"step-{step:08d}") for step in (2, 5))
    names = [name for name in last if name.startswith("student.algorithm.")]
    assert sorted(names) == [
        f"student.algorithm.{part}.{kind}" for part in ("query", "s2t", "t2s") for kind in ("bias", "weight")
    ]
    for name in names:
        assert not torch.equal(first[name], last[name]), f"{name} does not move"
        assert last[f"optimizer.{name.removeprefix('student.')}.exp_avg"].any()
    resumed = interrupted(two_ranks, tmp_path / "resumed", 2)
    training = {"steps": 5, "tokens_per_step": 1000, **shared.pop("training")}
    model = {"model": shared.pop("student")}
    kdflow.train(run_file(output=str(resumed), student=model, training=training, **shared), resume="auto")
    _assert_same(two_ranks, resumed, rtol=1e-4)
    for name in names:
        torch.testing.assert_close(
            saved(resumed / "checkpoints" / "step-00000005")[name], last[name], rtol=1e-3, atol=1e-6
        )


def test_projectors_have_their_own_learning_rate(tiny: dict[str, str], run_file: RunFile, tmp_path: Path) -> None:
    """Adam's first step moves every parameter by the learning rate."""
    moved = {}
    for rate in (1e-4, 1e-2):
        run = run_file(
            output=str(tmp_path / str(rate)), student={"model": tiny["student"]}, teacher={"model": tiny["foreign"]},
            algorithm={"name": "dskd", "projector_learning_rate": rate, "initialise": "random"},
            training={"steps": 2, "checkpoint_every": 1, "learning_rate": 1e-3, "schedule": "constant", "warmup": 0},
        )  # fmt: skip
        kdflow.train(run)
        one, two = (saved(tmp_path / str(rate) / "checkpoints" / f"step-{step:08d}") for step in (1, 2))
        moved[rate] = [
            float((two[name] - one[name]).abs().median())
            for name in ("student.algorithm.t2s.weight", "student.model.model.layers.0.mlp.up_proj.weight")
        ]
    assert moved[1e-2][0] == pytest.approx(100 * moved[1e-4][0], rel=0.3)
    assert moved[1e-2][1] == pytest.approx(moved[1e-4][1], rel=0.3)
