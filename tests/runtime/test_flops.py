"""Floating-point operations beside those that torch counts, and what a run tells of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import kdflow
from kdflow.contracts import Pair, Tokens
from kdflow.data.steps import Step
from kdflow.runtime import flops as module
from kdflow.runtime.flops import StepFlops, peak
from kdflow.runtime.memory import model_shape
from kdflow.runtime.prepare import prepare
from tests.support.runs import events

RunFile = Callable[..., dict[str, Any]]
TOKENS = 40
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


def counted(model: Any, train: bool) -> float:
    """By torch, all tokens being targets. It counts attention as if every token saw all others."""
    ids = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, use_cache=False).logits
        if train:
            logits.sum().backward()
    kinds = counter.get_flop_counts()["Global"]
    seen = {kind: (TOKENS + 1) / (2 * TOKENS) if "bmm" in str(kind) else 1.0 for kind in kinds}
    return sum(count * seen[kind] for kind, count in kinds.items())


def load(path: str) -> Any:
    """With attention by plain products."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("name", ["student", "untied"])
def test_products_are_those_that_torch_counts(name: str, tiny: dict[str, str]) -> None:
    student, teacher = (load(tiny[side]) for side in (name, "teacher"))
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    shapes = [model_shape(tiny[side], torch.float32) for side in (name, "teacher")]
    # The weights of norms are parameters, and in no product.
    alone = StepFlops(shapes[0], None, stored=False, frozen=False).count([TOKENS], TOKENS)
    assert alone == pytest.approx(counted(student, train=True), rel=6e-3)
    both = StepFlops(shapes[0], shapes[1], stored=False, frozen=False).count([TOKENS], TOKENS, [TOKENS], TOKENS)
    assert both - alone == pytest.approx(counted(teacher, train=False), rel=6e-3)


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (transformers.LlamaConfig(**SIZES), {0: 4 * 32}),
        (transformers.MistralConfig(**SIZES, sliding_window=3), {3: 4 * 32}),
        (transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=5), {5: 2 * 64, 0: 2 * 64}),
    ],
)
def test_attention_is_counted_for_what_a_token_sees(
    config: transformers.PretrainedConfig, attention: dict[int, int], tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    shape = model_shape(str(tmp_path), torch.float32)
    assert shape.attention == attention
    nothing = dataclasses.replace(shape, attention={})
    for lengths in ([1], [3], [4], [10], [10, 2, 7]):
        with_attention, without = (StepFlops(one, None, False, False).count(lengths, 0) for one in (shape, nothing))
        seen = sum(
            width * min(at + 1, most or length)
            for most, width in attention.items() for length in lengths for at in range(length)
        )  # fmt: skip
        assert with_attention - without == 12 * seen


def test_what_is_not_computed_does_not_count(tiny: dict[str, str]) -> None:
    student, teacher = (model_shape(tiny[side], torch.float32) for side in ("student", "teacher"))
    whole = StepFlops(student, teacher, stored=False, frozen=False)
    stored = StepFlops(student, teacher, stored=True, frozen=False)
    frozen = StepFlops(student, teacher, stored=False, frozen=True)
    lengths, pairs = [60, 40], 60 * 61 // 2 + 40 * 41 // 2
    own, theirs = (4 * pairs * shape.attention[0] for shape in (student, teacher))
    both = lengths, 30, lengths, 30
    assert whole.count(*both) - stored.count(*both) == 2 * teacher.body * 100 + theirs
    assert whole.count(lengths, 30) - frozen.count(lengths, 30) == 2 * student.body * 100 + 2 * student.head * 30
    again = whole.count(lengths, 30, recompute=True) - whole.count(lengths, 30)
    assert again == 2 * student.body * 100 + own


def test_the_teachers_work_is_on_its_own_tokens_and_targets(tiny: dict[str, str]) -> None:
    student, teacher = (model_shape(tiny[side], torch.float32) for side in ("student", "teacher"))
    flops = StepFlops(student, teacher, stored=False, frozen=False)

    def tokens(count: int, targets: int) -> Tokens:
        return Tokens(np.zeros(count, np.int64), np.arange(targets), np.zeros(targets, np.int64))

    step = Step((Pair("a", tokens(20, 8), tokens(70, 12)), Pair("b", tokens(10, 6), tokens(5, 2))))
    processes: Any = SimpleNamespace(size=1, device=torch.device("cpu"))
    alone = StepFlops(student, None, stored=False, frozen=False).count([20, 10], 14)
    pairs = 70 * 71 // 2 + 5 * 6 // 2
    theirs = 2 * teacher.body * 75 + 2 * teacher.head * 14 + 4 * pairs * teacher.attention[0]
    assert flops.figures(step, 1.0, processes) == {"flops_per_second": alone + theirs}


def test_a_run_tells_its_speed_and_the_share_of_a_known_device(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run_file(student={"keep_layers": "::2"})
    counts, known = list[tuple[list[int], float]](), StepFlops.count

    def remember(self: StepFlops, lengths: list[int], *others: Any) -> float:
        counts.append((lengths, known(self, lengths, *others)))
        return counts[-1][1]

    with monkeypatch.context() as patched:
        patched.setattr(StepFlops, "count", remember)
        kdflow.train(made)
    steps = events(made["output"], "step")
    shapes = (
        model_shape(made["student"]["model"], torch.float32, "::2"),
        model_shape(made["teacher"]["model"], torch.float32),
    )
    flops = StepFlops(*shapes, stored=False, frozen=False)
    for event, (lengths, count) in zip(steps, counts, strict=True):
        assert sum(lengths) == event["tokens"]
        assert count == flops.count(*[lengths, event["target_tokens"]] * 2)
        assert event["flops_per_second"] == pytest.approx(count / event["seconds"])
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
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA GeForce RTX 4090": None,
             "NVIDIA RTX A1000 6GB Laptop GPU": None, "NVIDIA A100": 312e12}  # fmt: skip
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak(torch.device("cuda", 0)) == expected
    assert peak(torch.device("cpu")) is None
