"""The run files of examples/; those between real models of different families are run, shortened."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import kdflow
from kdflow import config, plugins
from tests.support.pretrained import pretrained

ROOT = Path(__file__).parents[2]
RUN_FILES = [path for path in sorted(ROOT.glob("examples/**/*.yaml")) if "student:" in path.read_text("utf-8")]
CROSS_TOKENIZER = [path for path in RUN_FILES if path.parent.name == "cross_tokenizer"]


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_a_run_file_names_data_that_is_there_and_an_output_of_its_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run = config.load(path).resolve(plugins.load())
    assert all(Path(source.path).is_file() for source in (*run.data.train, *run.data.eval))
    assert run.output == f"runs/{path.relative_to(ROOT / 'examples').with_suffix('')}"
    assert f"kdflow train {path.relative_to(ROOT)}" in path.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", CROSS_TOKENIZER, ids=lambda path: path.stem)
def test_smollm2_learns_from_gemma(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretrained("google/gemma-3-270m")
    pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    monkeypatch.chdir(ROOT)
    # One text, to learn and to be measured on: three steps are too few to see more of.
    text = tmp_path / "text.jsonl"
    text.write_text((ROOT / "examples/data/eval.jsonl").read_text("utf-8").splitlines()[0], encoding="utf-8")
    # A smaller learning rate than the examples': the first steps of theirs throw the cut student about.
    short = ["training.steps=3", "training.learning_rate=2e-4", "training.tokens_per_step=128", "data.max_length=128",
             "data.max_tokens=128", f"data.train.0.path={text}", f"data.eval.0.path={text}",
             f"output={tmp_path / 'run'}"]  # fmt: skip
    result = kdflow.train(path, short)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["kd"] > 0
        assert math.isfinite(step["grad_norm"])
        assert step["aligned_one_to_one"] > 0.8
    before, after = (result.evaluation[when]["bits_per_byte"] for when in ("before", "after"))
    assert after < before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gkd", "uld"])
def test_smollm2_learns_from_what_it_writes_itself(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between SmolLM2 and Gemma too, which reads the student's bytes."""
    pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    if name == "uld":
        pretrained("google/gemma-3-270m")
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "examples/data/continue.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "".join(json.loads(lines[0]).values())}), "utf-8")
    short = ["training.steps=2", "training.tokens_per_step=100", "training.learning_rate=1e-3", "training.warmup=0",
             "training.schedule=constant", "training.dtype=float32", "rollout.fraction=1", "rollout.max_new_tokens=12",
             "rollout.temperature=0", f"data.train.0.path={tmp_path / 'two.jsonl'}",
             f"data.eval.0.path={tmp_path / 'text.jsonl'}", f"output={tmp_path / 'run'}"]  # fmt: skip
    if name == "gkd":
        short += ["algorithm.on_policy=1"]
    kdflow.train(ROOT / "examples" / "on_policy" / f"{name}.yaml", short)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    responses = [
        {line["sample"]: line["response"] for line in map(json.loads, file.read_text("utf-8").splitlines())}
        for file in sorted((tmp_path / "run" / "rollouts").iterdir())
    ]
    assert len(steps) == len(responses) == 2
    assert responses[0].keys() == responses[1].keys()
    assert responses[0] != responses[1], "one step at this learning rate shows in what is written"
    for step in steps:
        assert step["loss"] > 0
        assert math.isfinite(step["grad_norm"])
        assert step["rollout_gap"] < 1e-3
        if name == "uld":
            assert step["aligned_one_to_one"] > 0.8
