"""Floating-point operations beside those that torch counts, and what a run tells of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import kdflow
from kdflow.runtime import flops as module
from kdflow.runtime.flops import StepFlops, peak
from kdflow.runtime.memory import model_shape
from kdflow.runtime.prepare import prepare
from tests.support.runs import events

RunFile = Callable[..., dict[str, Any]]
TOKENS = 40
ATTENTION = ("scaled_dot_product", "bmm")  # its own products, which are left out


def counted(model: Any, train: bool) -> float:
    """By torch, all tokens being targets."""
    ids = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, use_cache=False).logits
        if train:
            logits.sum().backward()
    kinds = counter.get_flop_counts()["Global"]
    return float(sum(count for kind, count in kinds.items() if not any(name in str(kind) for name in ATTENTION)))


@pytest.mark.parametrize("name", ["student", "untied"])
def test_products_are_those_that_torch_counts(name: str, tiny: dict[str, str]) -> None:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(tiny[side], dtype=torch.float32) for side in (name, "teacher")
    )
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    shapes = [model_shape(tiny[side], torch.float32) for side in (name, "teacher")]
    # The weights of norms are parameters, and in no product.
    alone = StepFlops(shapes[0], None, stored=False, frozen=False).count(TOKENS, TOKENS)
    assert alone == pytest.approx(counted(student, train=True), rel=6e-3)
    both = StepFlops(shapes[0], shapes[1], stored=False, frozen=False).count(TOKENS, TOKENS)
    assert both - alone == pytest.approx(counted(teacher, train=False), rel=6e-3)


def test_what_is_not_computed_does_not_count(tiny: dict[str, str]) -> None:
    student, teacher = (model_shape(tiny[side], torch.float32) for side in ("student", "teacher"))
    whole = StepFlops(student, teacher, stored=False, frozen=False)
    stored = StepFlops(student, teacher, stored=True, frozen=False)
    frozen = StepFlops(student, teacher, stored=False, frozen=True)
    assert whole.count(100, 30) - stored.count(100, 30) == 2 * teacher.body * 100
    assert whole.count(100, 30) - frozen.count(100, 30) == 2 * student.body * 100 + 2 * student.head * 30
    assert whole.count(100, 30, recompute=True) - whole.count(100, 30) == 2 * student.body * 100


def test_a_run_tells_its_speed_and_the_share_of_a_known_device(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run_file(student={"keep_layers": "::2"})
    kdflow.train(made)
    steps = events(made["output"], "step")
    shapes = (
        model_shape(made["student"]["model"], torch.float32, "::2"),
        model_shape(made["teacher"]["model"], torch.float32),
    )
    flops = StepFlops(*shapes, stored=False, frozen=False)
    for event in steps:
        expected = flops.count(event["tokens"], event["target_tokens"]) / event["seconds"]
        assert event["flops_per_second"] == pytest.approx(expected)
        assert "flops_utilisation" not in event, "nobody knows what this processor could do"
    monkeypatch.setattr(module, "peak", lambda _: 1e12)
    again = {**made, "output": made["output"] + "-again"}
    kdflow.train(again)
    for event in events(again["output"], "step"):
        assert event["flops_utilisation"] == pytest.approx(event["flops_per_second"] / 1e12)


def test_a_teacher_that_transformers_does_not_know_is_not_counted(run_file: RunFile, tmp_path: Path) -> None:
    config, _ = prepare(run_file(), (), ())
    teacher: Any = SimpleNamespace(model=str(tmp_path), stored=False)
    assert StepFlops.of(config, teacher) is None
    teacher.model = run_file()["teacher"]["model"]
    assert StepFlops.of(config, teacher) is not None


def test_devices_are_known_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA GeForce RTX 4090": None}
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak(torch.device("cuda", 0)) == expected
    assert peak(torch.device("cpu")) is None
