"""The memory plan against what a run really takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import kdflow
from kdflow.runtime.check import check
from tests.support.models import make_model, make_tokenizer, write_jsonl

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW in fp32": {},
    "three micro-batches": {"tokens_per_step": 3 * 8192},
    "compiled": {"compile": True},
    "bf16 parameters": {"parameters": "bfloat16"},
    "8-bit moments": {"optimizer": "adamw_8bit"},
    "every block computed again": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_plan_is_near_the_truth(
    cuda: torch.device, run_file: Callable[..., dict[str, Any]], tmp_path: Path, option: str
) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tmp_path / "model", hidden=1024, layers=12, seed=1, tokenizer=tokenizer, padding=30000)
    text = " ".join(f"word{number}" for number in range(20000))
    train = write_jsonl(
        tmp_path / "long.jsonl", [{"text": text[start : start + 20000]} for start in range(0, 120000, 20000)]
    )
    data = {"train": [{"path": train, "format": "text"}], "eval": [], "max_length": 8192, "max_tokens": 8192}
    training = {"steps": 3, "tokens_per_step": 8192, "dtype": "bfloat16", **OPTIONS[option]}
    run = run_file(student={"model": model}, teacher={"model": model}, data=data, training=training)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    planned = check(tmp_path / "run.yaml", [], (), 1)
    assert planned["problems"] == []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kdflow.train(run)
    taken = torch.cuda.max_memory_allocated() - before
    print({key: value / 2**20 for key, value in planned["memory"]["bytes"].items()}, "taken", taken / 2**20)
    assert planned["memory"]["bytes"]["total"] == pytest.approx(taken, rel=0.1)
