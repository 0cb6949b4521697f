"""A run that trains adapters, from its checkpoints to what is exported."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

import kdflow
from kdflow import plugins
from kdflow.contracts import KdflowError
from kdflow.runtime.export import export
from kdflow.runtime.processes import Processes
from kdflow.runtime.student import Student
from tests.support.commands import site
from tests.support.distributions import MIMIC, plugin
from tests.support.runs import events, interrupted, make_run, saved, trajectory

__all__ = ["site"]
RunFile = Callable[..., dict[str, Any]]
LORA = {"rank": 4, "alpha": 16}


@pytest.fixture(scope="module")
def run(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run; tests that change it work on a copy."""
    output = tmp_path_factory.mktemp("lora") / "run"
    student = {"model": tiny["untied"], "lora": LORA}
    run = make_run(tiny, student=student, training={"checkpoint_every": 2}, output=str(output))
    kdflow.train(run)
    return run


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 67).reshape(2, 32)).logits


def test_adapters_alone_are_in_the_checkpoint_and_all_of_them_move(run: dict[str, Any]) -> None:
    before, after = (saved(Path(run["output"]) / "checkpoints" / f"step-0000000{step}") for step in (2, 4))
    assert before.keys() == after.keys()
    students = {name for name in before if name.startswith("student.")}
    assert len(students) == 2 * 7 * 2  # layers, linear layers of each, matrices of each
    assert all(".lora_A." in name or ".lora_B." in name for name in students)
    moments = {f"optimizer.{name.removeprefix('student.')}.{key}" for name in students
               for key in ("step", "exp_avg", "exp_avg_sq")}  # fmt: skip
    assert {name for name in before if name.startswith("optimizer.")} == moments
    assert {name for name in students if torch.equal(before[name], after[name])} == set()
    losses = [loss for _, loss in trajectory(run["output"], ["loss"])]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("keep_layers", [None, [0, 2]])
def test_exports_have_the_logits_of_the_student(
    run: dict[str, Any], run_file: RunFile, tiny: dict[str, str], tmp_path: Path, keep_layers: list[int] | None
) -> None:
    output, base = Path(run["output"]), tiny["untied"]
    if keep_layers is not None:
        output, base = tmp_path / "run", str(tmp_path / "adapter" / "base")
        student = {"model": tiny["teacher"], "keep_layers": keep_layers, "lora": LORA}
        kdflow.train(run_file(student=student, teacher={"model": tiny["student"]}))
    export(output, tmp_path / "merged")
    export(output, tmp_path / "adapter", adapter=True)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    untrained = AutoModelForCausalLM.from_pretrained(base)
    assert merged.state_dict().keys() == untrained.state_dict().keys()
    difference = (_logits(merged) - _logits(untrained)).abs().max()
    assert difference > 1e-2
    assert (tmp_path / "adapter" / "base").exists() == (keep_layers is not None), "the adapter alone"
    for adapted in (
        PeftModel.from_pretrained(untrained, tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),  # finds the base by itself
    ):
        torch.testing.assert_close(_logits(adapted), _logits(merged), rtol=0, atol=float(difference) * 1e-4)

    # What was exported is what was trained: its figures go on where those of the run ended.
    again = run_file(student={"model": str(tmp_path / "merged")}, training={"steps": 1}, output=str(tmp_path / "again"))
    again["teacher"] = {"model": tiny["teacher" if keep_layers is None else "student"]}
    found = kdflow.train(again).evaluation["before"]["divergence"]
    assert found == pytest.approx(events(output, "eval")[-1]["divergence"], rel=1e-5)


def test_an_adapter_in_half_the_size(run: dict[str, Any], tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        export(Path(run["output"]), tmp_path / dtype, dtype, adapter=True)
    full, half = (tmp_path / dtype / "adapter_model.safetensors" for dtype in ("float32", "bfloat16"))
    assert half.stat().st_size < 0.7 * full.stat().st_size


def test_no_adapter_without_lora(run_file: RunFile, tmp_path: Path) -> None:
    kdflow.train(run_file(training={"steps": 1}))
    with pytest.raises(KdflowError, match=r"holds no adapter: its run has no student\.lora; export without --adapter"):
        export(tmp_path / "run", tmp_path / "exported", adapter=True)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    "training",
    [{"activation_checkpointing": True}, {"activation_checkpointing": 2}, {"head_chunk": 7}],
    ids=["every block recomputed", "every second", "chunks of 7 rows"],
)
def test_what_saves_memory_changes_nothing(run: dict[str, Any], tmp_path: Path, training: dict[str, Any]) -> None:
    kdflow.train({**run, "training": {**run["training"], **training}, "output": str(tmp_path / "run")})
    for key in ("loss", "grad_norm"):
        expected = [value for _, value in trajectory(run["output"], [key])]
        assert min(expected) > 0
        assert [value for _, value in trajectory(tmp_path / "run", [key])] == pytest.approx(expected, rel=2e-5)


def test_a_resumed_run_follows_the_same_trajectory(run: dict[str, Any], tmp_path: Path) -> None:
    output = interrupted(Path(run["output"]), tmp_path / "run", 2)
    kdflow.train({**run, "output": str(output)}, resume="auto")
    assert events(output, "resumed")
    assert trajectory(output) == trajectory(run["output"])
    assert events(output, "eval")[-1]["divergence"] == events(run["output"], "eval")[-1]["divergence"]


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"model": "student"}, "the weights of student.model was '"),
        ({"lora": {**LORA, "rank": 8}}, "student.lora.rank was 4 and is 8"),
        ({"lora": {**LORA, "targets": ["q_proj"]}}, r"student.lora.targets was 'all-linear' and is \['q_proj'\]"),
        ({"keep_layers": [1, 0]}, r"student.keep_layers was None and is \[1, 0\]"),
        ({"lora": None}, "student.lora.rank was 4 and is None"),
    ],
)
def test_adapters_are_not_put_upon_another_student(
    run: dict[str, Any], tiny: dict[str, str], tmp_path: Path, student: dict[str, Any], message: str
) -> None:
    output = interrupted(Path(run["output"]), tmp_path / "run", 2)
    student = {**run["student"], **student, **({"model": tiny[student["model"]]} if "model" in student else {})}
    with pytest.raises(KdflowError, match=f"holds adapters for another student: .*{message}"):
        kdflow.train({**run, "student": student, "output": str(output)}, resume="auto")


def test_a_base_that_changed_is_noticed_by_export(run_file: RunFile, tiny: dict[str, str], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny["untied"], base)
    kdflow.train(run_file(student={"model": str(base), "lora": LORA}, training={"steps": 1}))
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.001)
    model.save_pretrained(base)
    with pytest.raises(KdflowError, match="holds other weights than when its adapters were trained"):
        export(tmp_path / "run", tmp_path / "exported")


@pytest.mark.parametrize("parameters", ["float32", "bfloat16"])
def test_the_frozen_base_is_held_in_what_is_computed_in(tiny: dict[str, str], parameters: str) -> None:
    student = kdflow.config.StudentConfig(model=tiny["untied"], lora=LORA)
    training = kdflow.config.TrainingConfig(dtype="bfloat16", parameters=parameters)
    algorithm = plugins.load([]).algorithm("sft")
    with Processes() as processes:
        tokenizer = kdflow.tokenizers.load(student.model)
        found = Student(student, training, algorithm(algorithm.Options()), tokenizer, None, None, processes)
        dtypes = {(parameter.requires_grad, parameter.dtype) for _, parameter in found.named_parameters()}
        assert dtypes == {(False, torch.bfloat16), (True, getattr(torch, parameters))}
        assert all(parameter.requires_grad for group in found.optimizer.param_groups for parameter in group["params"])


def test_bf16_computes_what_fp32_does(run: dict[str, Any], tmp_path: Path) -> None:
    kdflow.train({**run, "training": {**run["training"], "dtype": "bfloat16"}, "output": str(tmp_path / "run")})
    expected = [loss for _, loss in trajectory(run["output"], ["loss"])]
    assert [loss for _, loss in trajectory(tmp_path / "run", ["loss"])] == pytest.approx(expected, rel=1e-2)


def test_dropout_falls_upon_the_adapters(run: dict[str, Any], tmp_path: Path) -> None:
    student = {**run["student"], "lora": {**LORA, "dropout": 0.5}}
    kdflow.train({**run, "student": student, "output": str(tmp_path / "run")})
    plain, dropped = ([loss for _, loss in trajectory(path, ["loss"])] for path in (run["output"], tmp_path / "run"))
    assert dropped[0] == plain[0], "adapters begin at zero, whatever is dropped before them"
    assert all(one != other for one, other in zip(dropped[1:], plain[1:], strict=True))


def test_an_algorithms_own_module_is_trained_beside_adapters(
    run_file: RunFile, tiny: dict[str, str], site: Path, tmp_path: Path
) -> None:
    plugin("kdflow_mimic", MIMIC).install(site)
    student = {"model": tiny["untied"], "lora": LORA}
    kdflow.train(run_file(student=student, algorithm={"name": "mimic"}, training={"checkpoint_every": 2}))
    before, after = (saved(tmp_path / "run" / "checkpoints" / f"step-0000000{step}") for step in (2, 4))
    students = {name for name in before if name.startswith("student.")}
    assert {"student.algorithm.weight", "student.algorithm.bias"} < students
    assert {name for name in students if torch.equal(before[name], after[name])} == set()


def test_peft_is_asked_for_before_anything_runs(
    run_file: RunFile, tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "peft" else sys)
    with pytest.raises(KdflowError) as caught:
        kdflow.train(run_file(student={"model": tiny["student"], "lora": {}}))
    expected = "student.lora needs the package peft, which is not installed: pip install 'kdflow[lora]'"
    assert str(caught.value) == expected
    assert not (tmp_path / "run").exists()


def test_the_run_file_as_written_holds_every_option_of_lora(run: dict[str, Any]) -> None:
    state = json.loads((Path(run["output"]) / "checkpoints" / "latest" / "run_state.json").read_text())
    assert state["run"]["student"]["lora"] == {"rank": 4, "alpha": 16, "dropout": 0.0, "targets": "all-linear"}
