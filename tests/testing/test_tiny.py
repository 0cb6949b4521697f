"""The tiny run for plugin authors is a run like any other, and quick."""

from __future__ import annotations

import json
from pathlib import Path

import kdflow
from kdflow.testing import tiny_run


def test_the_student_learns(tmp_path: Path) -> None:
    result = kdflow.train(tiny_run(tmp_path))
    assert result.output == tmp_path / "run"
    before, after = result.evaluation["before"]["divergence"], result.evaluation["after"]["divergence"]
    assert after < 0.8 * before


def test_sections_are_merged_and_values_replaced(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, training={"steps": 1}, algorithm={"name": "jsd", "beta": 0.3}, tracking=["jsonl"], seed=7)
    assert (run["training"]["steps"], run["training"]["dtype"]) == (1, "float32")
    assert (run["algorithm"], run["seed"]) == ({"name": "jsd", "beta": 0.3}, 7)
    assert kdflow.train(run).steps == 1


def test_it_is_the_same_run_every_time(tmp_path: Path) -> None:
    """Also over models that an earlier call made."""
    losses = []
    for part in ("one", "other", "one"):
        (tmp_path / part).mkdir(exist_ok=True)
        output = tmp_path / f"run-{len(losses)}"
        losses.append(kdflow.train(tiny_run(tmp_path / part, output=str(output))).loss)
    assert losses[0] == losses[1] == losses[2]


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    train, held_out = (
        {json.loads(line)["prompt"] for line in Path(run["data"][part][0]["path"]).read_text().splitlines()}
        for part in ("train", "eval")
    )
    assert train
    assert held_out
    assert not train & held_out
