"""Whole runs on the data that they are given: epochs, weights, streams, records that cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from pyarrow import parquet

import kdflow
from kdflow.contracts import KdflowError
from kdflow.data import order
from tests.support.runs import events, finish, kill_when, start, trajectory

RunFile = Callable[..., dict[str, Any]]


def summary(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


def test_epochs_are_gone_through_to_the_last_sample(run_file: RunFile, tmp_path: Path) -> None:
    run = run_file(training={"epochs": 2, "steps": None})
    result = kdflow.train(run)
    samples = summary(result.output)["samples"]
    assert samples["drawn"] == samples["trained"] == 2 * 48
    steps = events(result.output, "step")
    assert result.steps == len(steps) == summary(result.output)["steps"]
    assert all(step["tokens"] >= 400 for step in steps[:-1])
    assert steps[-1]["learning_rate"] < steps[1]["learning_rate"] / 10, "the schedule knows where the run ends"
    # What the run directory keeps is a run file that gives the same run.
    again = kdflow.train(str(result.output / "run.yaml"), [f"output={tmp_path / 'again'}"])
    assert trajectory(again.output) == trajectory(result.output)


def test_steps_end_a_run_before_its_epochs(run_file: RunFile) -> None:
    assert kdflow.train(run_file(training={"epochs": 2, "steps": 3})).steps == 3


def test_a_source_of_more_weight_is_seen_more_often(run_file: RunFile, tiny: dict[str, str]) -> None:
    train = [
        {"path": tiny["train"], "format": "text", "weight": 0.5},
        {"path": tiny["eval"], "format": "text", "weight": 3},
    ]
    result = kdflow.train(run_file(data={"train": train}, training={"epochs": 1, "steps": None}))
    assert summary(result.output)["samples"]["trained"] == 24 + 18


@pytest.mark.parametrize("streaming", [False, True])
def test_records_that_cannot_be_used_are_skipped_and_listed(
    run_file: RunFile, tiny: dict[str, str], tmp_path: Path, streaming: bool
) -> None:
    path = tmp_path / "broken.jsonl"
    lines = Path(tiny["train"]).read_text().splitlines()
    path.write_text("\n".join([*lines[:8], "{", *lines[8:10], '{"text": ""}', *lines[10:]]))
    source = {"path": str(path), "format": "text", "streaming": streaming}
    data = {"train": [source], "eval": [{"path": str(path), "format": "text"}], "on_error": "skip"}
    result = kdflow.train(run_file(data=data, training={"steps": 40}))
    found = summary(result.output)
    reasons = {entry["sample"]: entry["reason"] for entry in found["skipped"]}
    assert list(reasons) == [f"{path}:9", f"{path}:12"], "in the order of the lines"
    assert reasons[f"{path}:12"] == f"{path}:12: 'text' is empty: there is nothing to learn"
    samples = found["samples"]
    assert samples["drawn"] == samples["trained"] + samples["dropped: unusable"]
    assert samples["dropped: unusable"] >= 2


def test_a_stream_that_is_killed_goes_on_where_it_was(run_file: RunFile, tiny: dict[str, str], tmp_path: Path) -> None:
    data = {"train": [{"path": tiny["train"], "format": "text", "streaming": True}]}
    training = {"steps": 30, "checkpoint_every": 4}
    whole = kdflow.train(run_file(data=data, training=training, output=str(tmp_path / "whole")))
    run = run_file(data=data, training=training, output=str(tmp_path / "killed"))
    kill_when(start(run), lambda: len(events(tmp_path / "killed", "step")) >= 14)
    finish(start(run, "--resume", "auto"))
    assert events(tmp_path / "killed", "resumed")
    assert trajectory(tmp_path / "killed") == trajectory(whole.output)


def test_a_stream_that_breaks_leaves_a_checkpoint(
    run_file: RunFile, tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "WINDOW", 16)
    path = tmp_path / "train.parquet"
    texts = [json.loads(line)["text"] for line in Path(tiny["train"]).read_text().splitlines()]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(path), batch_size=16)
    whole = path.read_bytes()
    at = parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    path.write_bytes(whole[:at] + b"\xff" * 64 + whole[at + 64 :])
    data = {"train": [{"path": str(path), "format": "text", "streaming": True}]}
    run = run_file(data=data, training={"steps": 40})
    with pytest.raises(KdflowError) as caught:
        kdflow.train(run)
    steps = len(events(run["output"], "step"))
    assert 0 < steps < 40
    told, rescued = str(caught.value).splitlines()
    assert told.startswith(f"{path} cannot be read to its end: ")
    assert rescued == f"Step {steps} is kept as a checkpoint: --resume auto goes on from there."
    path.write_bytes(whole)
    assert kdflow.train(run, resume="auto").steps == 40


def test_what_a_stream_cannot_do_is_refused(run_file: RunFile, tiny: dict[str, str]) -> None:
    streamed = {"path": tiny["train"], "format": "text", "streaming": True}
    with pytest.raises(KdflowError, match=r"^run: training.epochs: the size of streamed data is not known; give"):
        kdflow.train(run_file(data={"train": [streamed]}, training={"epochs": 1, "steps": None}))
    with pytest.raises(KdflowError, match=r"train: either all sources are streamed or none is"):
        kdflow.train(run_file(data={"train": [streamed, {**streamed, "streaming": False}]}))
    with pytest.raises(KdflowError, match=r"eval: held-out samples .* cannot be streamed"):
        kdflow.train(run_file(data={"eval": [streamed]}))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_no_model_is_shown_more_tokens_than_it_has_positions_for(
    side: str, tiny: dict[str, str], run_file: RunFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = shutil.copytree(tiny[side], tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    run = run_file(training={"steps": 2})
    run[side]["model"] = str(short)
    samples = summary(kdflow.train(run).output)["samples"]
    assert samples["truncated"] == samples["trained"] > 0
    for step in events(run["output"], "step"):
        assert step["tokens"] % 40 == 0
        assert step["target_tokens"] == step["tokens"] // 40 * 39
    assert f"the {side} has positions for 40 tokens" in caplog.text


def test_a_resume_tells_that_records_have_changed(run_file: RunFile, tiny: dict[str, str], tmp_path: Path) -> None:
    text = tmp_path / "changing.jsonl"
    lines = Path(tiny["train"]).read_text().splitlines(keepends=True)
    text.write_text("".join(lines))
    run = run_file(data={"train": [{"path": str(text), "format": "text"}]}, training={"steps": 2})
    kdflow.train(run)
    longer = {**run, "training": {**run["training"], "steps": 3}}
    text.write_text("".join(lines[1:]))
    kdflow.train(longer, resume="auto")
    told = [event["message"] for event in events(run["output"], "warning")]
    assert f"resumed with other records in {text}: which samples come next is not what it was" in told
    kdflow.train({**longer, "training": {**run["training"], "steps": 4}}, resume="auto")
    again = [event["message"] for event in events(run["output"], "warning") if event["step"] == 3]
    assert not [message for message in again if "other records" in message]
