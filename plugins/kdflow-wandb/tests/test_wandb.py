"""What a run tells Weights & Biases: the real library, offline, and the records that it wrote."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from wandb.proto.wandb_internal_pb2 import Record

import kdflow
from kdflow.testing import tiny_run
from kdflow_wandb import WandB


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No account, no network, nothing of this user's, and no word of what the machine is."""
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("API_KEY", "PROJECT", "ENTITY", "RUN_ID", "NAME", "TAGS", "RUN_GROUP"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    yield
    wandb.teardown()  # it reads its environment once


def records(file: Path) -> Iterator[Record]:
    """The records of a ``.wandb`` file: a log as LevelDB writes it, behind 7 bytes that name the format."""
    data, at, whole = file.read_bytes(), 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:  # the rest of a block is too short for a header
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


class Told:
    """One start of a run, as wandb would send it."""

    def __init__(self, directory: Path) -> None:
        found = list(records(next(directory.glob("*.wandb"))))
        self.run = next(record.run for record in found if record.HasField("run"))
        self.config = {item.key: json.loads(item.value_json) for item in self.run.config.update}
        self.history = [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in found
            if record.HasField("history")
        ]
        self.summary = {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for record in found
            if record.HasField("summary")
            for item in record.summary.update
        }
        self.axes = {
            record.metric.glob_name: record.metric.step_metric for record in found if record.HasField("metric")
        }
        self.exit_code = next(record.exit.exit_code for record in found if record.HasField("exit"))

    def chart(self, name: str) -> list[tuple[int, Any]]:
        return [(row["step"], row[name]) for row in self.history if name in row]


def starts(run: Path) -> list[Told]:
    """What each start of a run told, oldest first."""
    wandb.teardown()  # its process writes the last of it when it ends
    return [Told(directory) for directory in sorted((run / "wandb").glob("offline-run-*"))]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


@contextmanager
def tracker(directory: Path, **options: Any) -> Iterator[WandB]:
    tracker = WandB(WandB.Options(**options))
    tracker.start(directory, {"seed": 0}, 1)
    yield tracker
    tracker.close()


def test_a_run_from_its_command_to_its_summary(tmp_path: Path) -> None:
    """With WANDB_MODE=offline and the bare name in the run file, as the README tells."""
    run = tiny_run(tmp_path, tracking=["console", "jsonl", "wandb"], training={"evaluate_every": 2})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    command = [sys.executable, "-m", "kdflow", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wandb:" not in done.stdout
    output = Path(run["output"])
    (told,) = starts(output)

    config = yaml.safe_load((output / "run.yaml").read_text(encoding="utf-8"))
    assert {key: told.config[key] for key in config} == config
    assert told.run.run_id == (output / "wandb-run-id").read_text(encoding="utf-8").strip()

    steps, evaluations = events(output, "step"), events(output, "eval")
    for name in ("loss", "grad_norm", "learning_rate", "seconds"):
        assert told.chart(f"train/{name}") == [(step["step"], step[name]) for step in steps]
    assert told.chart("train/phases/teacher") == [(step["step"], step["phases"]["teacher"]) for step in steps]
    for name in ("divergence", "perplexity", "agreement"):
        assert told.chart(f"eval/{name}") == [(evaluation["step"], evaluation[name]) for evaluation in evaluations]
    assert told.axes["train/*"] == told.axes["eval/*"] == "step"

    samples = told.chart("sample/path")
    assert len(samples) == 2
    for sample, (_, path) in zip(events(output, "sample"), samples, strict=True):
        table = json.loads((output / "wandb" / "latest-run" / "files" / path).read_text(encoding="utf-8"))
        assert table["columns"] == ["step", "prompt", "text"]
        assert table["data"] == [[sample["step"], sample["prompt"], sample["text"]]]

    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    for name in ("steps", "tokens", "seconds", "loss", "peak_memory_bytes"):
        assert told.summary[name] == summary[name]
    after = summary["evaluation"]["after"]
    assert told.summary["evaluation/after/divergence"] == after["divergence"]
    assert told.exit_code == 0


def test_a_resumed_run_goes_on_under_its_id(tmp_path: Path) -> None:
    tracking = ["jsonl", {"name": "wandb", "project": "sums"}]
    run = tiny_run(tmp_path, tracking=tracking, training={"checkpoint_every": 2})
    output = Path(kdflow.train(run).output)
    shutil.rmtree(output / "checkpoints" / "step-00000004")
    kdflow.train(run, ["training.clip_norm=2.0"], resume="auto")
    first, second = starts(output)
    assert first.run.run_id == second.run.run_id
    assert [step for step, _ in first.chart("train/loss")] == [1, 2, 3, 4]
    assert [step for step, _ in second.chart("train/loss")] == [3, 4]
    assert second.chart("train/loss") == first.chart("train/loss")[2:]
    assert (first.config["training"]["clip_norm"], second.config["training"]["clip_norm"]) == (1.0, 2.0)


def test_another_run_directory_is_another_run(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        with tracker(tmp_path / name):
            pass
    ids = {(tmp_path / name / "wandb-run-id").read_text() for name in ("one", "other")}
    assert len(ids) == 2


def test_a_run_that_stops_is_marked_as_failed(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tracking=["wandb"], training={"learning_rate": 1e30, "clip_norm": None})
    with pytest.raises(kdflow.KdflowError, match="not finite"):
        kdflow.train(run)
    (told,) = starts(Path(run["output"]))
    assert told.exit_code == 1
    assert told.chart("train/loss")


def test_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options go before wandb's environment variables."""
    monkeypatch.setenv("WANDB_PROJECT", "environment")
    monkeypatch.setenv("WANDB_MODE", "online")
    options = {"project": "p", "entity": "e", "group": "g", "display_name": "d", "tags": ["a", "b"], "mode": "offline"}
    assert set(options) == set(WandB.Options.model_fields)
    with tracker(tmp_path, **options):
        pass
    run = starts(tmp_path)[0].run
    found = {"project": run.project, "entity": run.entity, "group": run.run_group, "display_name": run.display_name}
    assert {**found, "tags": list(run.tags), "mode": "offline"} == options


def test_what_is_not_given_is_left_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "environment")
    monkeypatch.setenv("WANDB_NAME", "named")
    monkeypatch.setenv("WANDB_TAGS", "x,y")
    with tracker(tmp_path):
        pass
    run = starts(tmp_path)[0].run
    assert (run.project, run.display_name, list(run.tags)) == ("environment", "named", ["x", "y"])


@pytest.mark.parametrize(("entry", "message"), [
    ({"projct": "x"}, r"tracking\.1\.projct: unknown key; did you mean 'project'\?"),
    ({"tags": "x"}, r"tracking\.1\.tags: input should be a valid list, not 'x'"),
    ({"mode": "sometimes"}, r"tracking\.1\.mode: input should be 'online' or 'offline', not 'sometimes'"),
])  # fmt: skip
def test_options_that_do_not_fit(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    run = tiny_run(tmp_path, tracking=["jsonl", {"name": "wandb", **entry}])
    with pytest.raises(kdflow.KdflowError, match=message):
        kdflow.train(run)
    assert not Path(run["output"]).exists()


@pytest.mark.parametrize(("entry", "message"), [
    ({"mode": "online"}, "No API key configured"), ({"project": "a/b"}, "Invalid project name 'a/b'"),
    ({"tags": ["x" * 65]}, "Tags must be between 1 and 64 characters"),
])  # fmt: skip
def test_what_wandb_refuses_is_an_error_that_can_be_mended(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    run = tiny_run(tmp_path, tracking=["console", {"name": "wandb", **entry}])
    with pytest.raises(kdflow.KdflowError, match=f"tracker 'wandb' cannot start: .*{message}.*mode: offline"):
        kdflow.train(run)


def test_figures_that_are_null_or_infinite(tmp_path: Path) -> None:
    figures = {"divergence": None, "perplexity": math.inf, "gap": math.nan}
    with tracker(tmp_path) as told:
        told.event({"event": "eval", "step": 0, **figures, "name": "a", "done": True, "parts": {"x": None, "y": 1}})
        told.event({"event": "end", "steps": 0, "loss": None, "evaluation": {"after": figures}})
    (found,) = starts(tmp_path)
    (row,) = [row for row in found.history if "step" in row]
    assert {key for key in row if not key.startswith("_")} == {"step", "eval/perplexity", "eval/gap", "eval/parts/y"}
    assert float(row["eval/perplexity"]) == math.inf
    assert math.isnan(float(row["eval/gap"]))
    assert "loss" not in found.summary


def test_a_run_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    """kdflow.train in a program that has a run of its own open."""
    with wandb.init(dir=tmp_path / "own", id="own") as own:
        (tmp_path / "run").mkdir()
        with tracker(tmp_path / "run") as told:
            told.event({"event": "step", "step": 1, "loss": 0.5})
        own.log({"mine": 1})
    (found,) = starts(tmp_path / "run")
    assert found.run.run_id != "own"
    assert found.chart("train/loss") == [(1, 0.5)]
    (found,) = starts(tmp_path / "own")
    assert [row["mine"] for row in found.history] == [1]


def test_listing_plugins_does_not_load_it() -> None:
    code = "import sys, kdflow_wandb; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
