"""A teacher that is the student, and one that sees another prompt."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kdflow
from kdflow.contracts import KdflowError
from tests.support.models import texts, write_jsonl
from tests.support.runs import events, interrupted, saved, train, trajectory

RunFile = Callable[..., dict[str, Any]]
FAST = {"learning_rate": 1e-2, "schedule": "constant", "warmup": 0, "steps": 6}


@pytest.fixture
def follow(run_file: RunFile, tiny: dict[str, str], tmp_path: Path) -> RunFile:
    """Makes runs whose teacher follows the student, which learns from the data too, so that there is a difference."""

    def make(how: dict[str, Any], **sections: Any) -> dict[str, Any]:
        made = run_file(**{"algorithm": {"name": "forward_kl", "ce_weight": 0.5}, "training": FAST, **sections})
        return {**made, "teacher": {"follow": how}}

    return make


def kd(output: Path) -> list[float]:
    return [event["kd"] for event in events(output, "step")]


def run(made: dict[str, Any]) -> Path:
    kdflow.train(made)
    return Path(made["output"])


@pytest.mark.parametrize("student", [{}, {"keep_layers": "::2"}, {"lora": {"rank": 4}}])
def test_a_teacher_that_follows_every_step_has_nothing_to_teach(
    follow: RunFile, tiny: dict[str, str], student: dict[str, Any]
) -> None:
    made = follow({"every": 1}, student={"model": tiny["untied"], **student})
    output = run(made)
    assert max(map(abs, kd(output))) < 1e-6
    assert not (output / ".student").exists()
    late = kd(run({**made, "teacher": {"follow": {"every": 3}}, "output": f"{output}-late"}))
    assert max(late[0], late[3]) < 1e-6 < 1e-4 < min(late[1], late[2], late[4], late[5])


def test_an_average_is_of_all_weights_head_included(follow: RunFile, tiny: dict[str, str]) -> None:
    made = follow({"ema": 0.75}, student={"model": tiny["untied"]}, training={**FAST, "checkpoint_every": 1,
                                                                              "keep_checkpoints": 9})  # fmt: skip
    output = run(made)
    checkpoints = [saved(path) for path in sorted((output / "checkpoints").glob("step-*"))]
    names = [name.removeprefix("teacher.") for name in checkpoints[0] if name.startswith("teacher.")]
    assert "lm_head.weight" in names
    for before, after in itertools.pairwise(checkpoints):
        for name in names:
            expected = 0.75 * before[f"teacher.{name}"] + 0.25 * after[f"student.model.{name}"]
            torch.testing.assert_close(after[f"teacher.{name}"], expected, rtol=1e-5, atol=1e-7)
    assert kd(output)[0] < 1e-6 < 1e-4 < min(kd(output)[2:])


def test_an_average_moves_where_bf16_would_not(follow: RunFile) -> None:
    training = {**FAST, "learning_rate": 1e-3, "parameters": "bfloat16", "checkpoint_every": 1, "keep_checkpoints": 9}
    output = run(follow({"ema": 0.999}, training=training))
    first, *_, last = (saved(path) for path in sorted((output / "checkpoints").glob("step-*")))
    for name in (name for name in first if name.startswith("teacher.")):
        student = name.replace("teacher.", "student.model.")
        moved = first[student] != last[student]
        assert (first[name] != last[name])[moved].float().mean() > 0.9


def test_resumed_and_on_two_ranks_it_is_the_same_teacher(follow: RunFile, tmp_path: Path) -> None:
    made = follow({"every": 4}, training={**FAST, "checkpoint_every": 2, "keep_checkpoints": 9})
    whole = run(made)
    resumed = interrupted(whole, tmp_path / "resumed", 2)
    kdflow.train({**made, "output": str(resumed)}, resume="auto")
    assert trajectory(resumed) == trajectory(whole)
    assert kd(resumed) == kd(whole)
    train({**made, "output": str(tmp_path / "two")}, "--nproc-per-node", "2")
    assert kd(tmp_path / "two") == pytest.approx(kd(whole), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("teacher", "message"), [
    ({"follow": {"every": 2}, "model": "other"}, "teacher.follow: such a teacher is the student itself"),
    ({"follow": {"every": 2, "ema": 0.5}}, "give either every, a number of steps, or ema, a share such as 0.999"),
    ({"follow": {}}, "give either every, a number of steps, or ema"),
    ({"follow": {"ema": 1.0}}, "teacher.follow.ema: input should be less than 1, not 1.0"),
    ({}, "teacher.model: this key is needed"),
])  # fmt: skip
def test_faults_of_the_section_are_named(follow: RunFile, teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(KdflowError) as caught:
        kdflow.train({**follow({"every": 1}), "teacher": teacher})
    assert message in str(caught.value)


def test_an_engine_that_takes_no_weights_is_refused_before_anything_is_loaded(follow: RunFile) -> None:
    made = follow({"every": 100})
    made["teacher"]["engine"] = {"name": "cache"}
    told = "'cache' holds rows of a teacher that stays as it is: choose another engine, or leave teacher.follow out"
    with pytest.raises(KdflowError, match=f"teacher.engine: {told}"):
        kdflow.train(made)
    assert not Path(made["output"]).exists()


def test_the_written_run_file_reads_back(follow: RunFile) -> None:
    output = run(follow({"every": 2}, training={**FAST, "steps": 2}))
    again = kdflow.train(output / "run.yaml", [f"output={output}-again"])
    assert trajectory(again.output) == trajectory(output)


@pytest.mark.parametrize("form", ["prompt_response", "chat"])
def test_the_teacher_may_see_another_prompt(follow: RunFile, tmp_path: Path, form: str) -> None:
    """Context distillation: with the same prompt the same model has nothing to teach, with more of it it has."""
    pieces = [text[start : start + 120] for text in texts() for start in range(0, 480, 120)][:24]
    found = {}
    for name in ("same", "more"):
        records: list[dict[str, Any]] = [{"prompt": piece[40:80], "response": piece[80:]} for piece in pieces]
        if form == "chat":
            turns = [zip(("user", "assistant"), one.values(), strict=True) for one in records]
            records = [{"messages": [{"role": r, "content": text} for r, text in of_one]} for of_one in turns]
        if name == "more":
            records = [{**one, "teacher_prompt": piece[:80]} for one, piece in zip(records, pieces, strict=True)]
        source = {"path": write_jsonl(tmp_path / f"{name}.jsonl", records), "format": form}
        data = {"train": [source], "eval": [source], "max_length": 256, "max_tokens": 256}
        made = follow({"every": 1}, data=data, output=str(tmp_path / name), training={**FAST, "steps": 3})
        found[name] = run(made)
    assert max(kd(found["same"])) < 1e-6 < 1e-5 < min(kd(found["more"]))
    assert events(found["same"], "eval")[0]["divergence"] < 1e-6 < 1e-5 < events(found["more"], "eval")[0]["divergence"]
    assert json.loads((found["more"] / "summary.json").read_text())["samples"]["trained"] > 0
