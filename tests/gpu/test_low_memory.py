"""Adapters, 8-bit moments and bf16 parameters on a GPU, where torchao compiles its kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kdflow
from kdflow.runtime.processes import Processes
from kdflow.runtime.random_numbers import random_numbers, restore_random_numbers
from tests.support.models import make_model, make_tokenizer
from tests.support.runs import interrupted, losses, make_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains a student whose heads are 64 wide, which the GPU's attention kernels take."""
    root = tmp_path_factory.mktemp("gpu")
    model = make_model(root / "model", hidden=256, seed=1, tokenizer=make_tokenizer())

    def run(name: str, resume: Path | None = None, lora: dict[str, Any] | None = None, **training: Any) -> Path:
        settings = {"steps": 8, "tokens_per_step": 2000, "learning_rate": 1e-3, "dtype": "bfloat16",
                    "checkpoint_every": 4, **training}  # fmt: skip
        output = resume or root / name
        run = make_run(tiny, student={"model": model, "lora": lora}, teacher=None, algorithm={"name": "sft"},
                       training=settings, output=str(output))  # fmt: skip
        kdflow.train(run, resume="auto" if resume else None)
        return output

    return run


def test_adapters(train: Train) -> None:
    lora = {"rank": 8}
    exact = losses(train("lora-fp32", lora=lora, dtype="float32", learning_rate=1e-2))
    assert exact[-1] < exact[0]
    for name, training in {
        "bf16": {},
        "compiled": {"compile": True},
        "compiled, every second block recomputed": {"compile": True, "activation_checkpointing": 2},
        "8-bit moments": {"optimizer": "adamw_8bit"},
    }.items():
        found = losses(train(f"lora-{name}", lora=lora, learning_rate=1e-2, **training))
        assert found == pytest.approx(exact, rel=1e-2), name


@pytest.mark.parametrize(
    "training",
    [{"optimizer": "adamw_8bit"}, {"parameters": "bfloat16"}, {"optimizer": "adamw_8bit", "parameters": "bfloat16"}],
    ids=["8-bit moments", "bf16 parameters", "both"],
)
def test_optimizers_follow_fp32_and_resume(train: Train, tmp_path: Path, training: dict[str, Any]) -> None:
    name = json.dumps(training)
    exact, whole = train(f"fp32 beside {name}"), train(name, **training)
    assert losses(whole) == pytest.approx(losses(exact), rel=2e-2)
    resumed = train(name, resume=interrupted(whole, tmp_path / "resumed", 4), **training)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-3)


def test_random_numbers_of_the_device_go_on() -> None:
    with Processes() as processes:
        states = random_numbers(processes)
        before = torch.rand(100, device=processes.device)
        torch.cuda.manual_seed(1234)
        restore_random_numbers(processes, states)
        assert torch.equal(torch.rand(100, device=processes.device), before)
