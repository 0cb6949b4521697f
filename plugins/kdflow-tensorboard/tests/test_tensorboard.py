"""What a run leaves for TensorBoard, read back with TensorBoard's own reader."""

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
import yaml
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

import kdflow
from kdflow.testing import tiny_run
from kdflow_tensorboard import TensorBoard


class Shown:
    """What TensorBoard shows of a run directory: read as its server reads, which heeds what was taken back."""

    def __init__(self, run: Path) -> None:
        self._events = EventAccumulator(
            str(run / "tensorboard"), tensor_size_guidance={"scalars": 0, "text": 0}
        ).Reload()

    def names(self) -> set[str]:
        return {tag for tag in self._events.Tags()["tensors"] if not tag.endswith("/text_summary")}

    def chart(self, name: str) -> list[tuple[int, float]]:
        return [(point.step, make_ndarray(point.tensor_proto).item()) for point in self._events.Tensors(name)]

    def texts(self, name: str) -> list[tuple[int, str]]:
        found = self._events.Tensors(f"{name}/text_summary")
        return [(text.step, make_ndarray(text.tensor_proto).item().decode()) for text in found]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def indented(text: str) -> str:
    """A Markdown block that shows the text as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


@contextmanager
def tracker(directory: Path, first_step: int = 1, **run: Any) -> Iterator[TensorBoard]:
    tracker = TensorBoard()
    tracker.start(directory, run, first_step)
    yield tracker
    tracker.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, made by the command that a user types."""
    directory = tmp_path_factory.mktemp("trained")
    run = tiny_run(directory, tracking=["console", "jsonl", "tensorboard"], training={"evaluate_every": 2})
    (directory / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    command = [sys.executable, "-m", "kdflow", "train", str(directory / "run.yaml")]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(run["output"])


def test_every_number_of_a_step_is_a_chart(trained: Path) -> None:
    shown, steps = Shown(trained), events(trained, "step")
    for name in ("loss", "grad_norm", "learning_rate", "target_tokens", "seconds"):
        assert shown.chart(f"train/{name}") == [(step["step"], pytest.approx(step[name])) for step in steps]
    teacher = [(step["step"], pytest.approx(step["phases"]["teacher"])) for step in steps]
    assert shown.chart("train/phases/teacher") == teacher
    assert not shown.names() & {"train/step", "train/samples", "train/event"}


def test_every_held_out_figure_is_a_chart(trained: Path) -> None:
    shown, evaluations = Shown(trained), events(trained, "eval")
    assert [evaluation["step"] for evaluation in evaluations] == [0, 2, 4]
    for name in ("divergence", "cross_entropy", "perplexity", "bits_per_byte", "agreement"):
        expected = [(evaluation["step"], pytest.approx(evaluation[name])) for evaluation in evaluations]
        assert shown.chart(f"eval/{name}") == expected


def test_the_students_text_and_the_run_file_are_texts(trained: Path) -> None:
    shown = Shown(trained)
    samples = [(sample["step"], sample["prompt"] + sample["text"]) for sample in events(trained, "sample")]
    assert [step for step, _ in samples] == [0, 4]
    assert shown.texts("sample") == [(step, indented(text)) for step, text in samples]
    ((step, run),) = shown.texts("run")
    assert step == 0
    assert json.loads(run) == yaml.safe_load((trained / "run.yaml").read_text(encoding="utf-8"))


def test_a_resumed_run_shows_each_step_once(trained: Path, tmp_path: Path) -> None:
    """Steps 3 and 4 are lost and run again; the charts hold what metrics.jsonl holds."""
    run = tiny_run(tmp_path, tracking=["jsonl", "tensorboard"], training={"checkpoint_every": 2})
    kdflow.train(run)
    output = Path(run["output"])
    before = Shown(output).chart("train/seconds")
    shutil.rmtree(output / "checkpoints" / "step-00000004")
    kdflow.train(run, resume="auto")
    shown = Shown(output)
    steps = [(step["step"], pytest.approx(step["seconds"])) for step in events(output, "step")]
    assert shown.chart("train/seconds") == steps
    assert shown.chart("train/seconds")[:2] == before[:2]
    assert shown.chart("train/seconds")[2:] != before[2:]
    assert [step for step, _ in shown.chart("eval/divergence")] == [0, 4]
    assert [step for step, _ in shown.texts("sample")] == [0, 4]
    assert [step for step, _ in shown.texts("run")] == [0, 2]


def test_a_run_that_starts_afresh_takes_everything_back(tmp_path: Path) -> None:
    """Its directory may hold events: those of a run that was killed before it saved anything."""
    for value in (1.0, 2.0):
        with tracker(tmp_path) as told:
            told.event({"event": "eval", "step": 0, "divergence": value})
            told.event({"event": "step", "step": 1, "loss": value})
    assert Shown(tmp_path).chart("eval/divergence") == [(0, 2.0)]
    assert Shown(tmp_path).chart("train/loss") == [(1, 2.0)]


def test_what_a_checkpoint_stands_for_is_on_disk_when_it_is(tmp_path: Path) -> None:
    """After kill -9 a run goes on from its checkpoint and does not tell the steps before it again."""
    with tracker(tmp_path) as told:
        told.event({"event": "step", "step": 1, "loss": 0.5})
        told.event({"event": "checkpoint", "step": 1, "path": "checkpoints/step-00000001"})
        assert Shown(tmp_path).chart("train/loss") == [(1, 0.5)]


def test_figures_that_are_null_or_infinite(tmp_path: Path) -> None:
    figures = {"divergence": None, "perplexity": math.inf, "gap": math.nan, "skipped": -math.inf}
    with tracker(tmp_path) as told:
        told.event({"event": "eval", "step": 0, **figures, "done": True, "name": "a", "parts": {"x": None, "y": 1}})
    shown = Shown(tmp_path)
    assert shown.names() == {"eval/perplexity", "eval/gap", "eval/skipped", "eval/parts/y"}
    assert shown.chart("eval/perplexity") == [(0, math.inf)]
    assert math.isnan(shown.chart("eval/gap")[0][1])


def test_warnings_are_texts_and_no_markup(tmp_path: Path) -> None:
    with tracker(tmp_path) as told:
        told.event({"event": "warning", "step": 3, "message": "# loss\n<b>is</b> not finite"})
        told.event({"event": "resumed", "step": 3})
        told.event({"event": "end", "steps": 3, "loss": None})
    assert Shown(tmp_path).texts("warning") == [(3, "    # loss\n    <b>is</b> not finite\n")]
    assert Shown(tmp_path).names() == set()


def test_it_takes_no_options(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tracking=[{"name": "tensorboard", "logdir": "x"}])
    with pytest.raises(kdflow.KdflowError, match=r"tracking\.0\.logdir: unknown key"):
        kdflow.train(run)


def test_listing_plugins_does_not_load_it() -> None:
    code = "import sys, kdflow_tensorboard; sys.exit('torch' in sys.modules or 'tensorboard' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
