from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import make_model, make_tokenizer, texts, write_jsonl
from tests.support.runs import make_run

# Comes with torch, so that it is there wherever sglang is.
SGLANG = {"name": "sglang", "attention_backend": "triton", "memory_fraction": 0.3}


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models whose heads are 64 and 128 wide, which the GPU's attention kernels take."""
    root, tokenizer = tmp_path_factory.mktemp("gpu"), make_tokenizer()
    return {
        "student": make_model(root / "student", hidden=256, seed=1, tokenizer=tokenizer, padding=16),
        "teacher": make_model(root / "teacher", hidden=512, layers=3, seed=3, tokenizer=tokenizer, padding=8),
    }


@pytest.fixture(scope="session")
def in_bf16(
    tiny: dict[str, str], models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Makes run files over these models, eight steps in bf16; ``engine`` is the teacher's."""

    def make(name: str, engine: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
        training = {"steps": 8, "tokens_per_step": 2000, "learning_rate": 1e-3, "dtype": "bfloat16"}
        training |= sections.pop("training", {})
        teacher = {**({"engine": engine} if engine else {}), **sections.pop("teacher", {})}
        data = {"max_tokens": 1024, **sections.pop("data", {})}
        output = str(tmp_path_factory.mktemp("run") / name)
        return make_run({**tiny, **models}, training=training, teacher=teacher, data=data, output=output, **sections)

    return make


@pytest.fixture
def on_policy(in_bf16: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The same over prompts, all of which the student answers itself in SGLang."""
    pieces = [text[start : start + 80] for text in texts() for start in range(0, 480, 80)]
    records = [{"prompt": piece[:40], "response": piece[40:]} for piece in pieces]
    source = {"path": write_jsonl(tmp_path / "prompts.jsonl", records), "format": "prompt_response"}

    def make(
        name: str, rollout: dict[str, Any], engine: dict[str, Any] | None = None, **sections: Any
    ) -> dict[str, Any]:
        section = {"max_new_tokens": 24, "engine": {**SGLANG, "cache_tokens": 16384}, **rollout}
        return in_bf16(name, engine, rollout=section, data={"train": [source]}, **sections)

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run: tests that need two GPUs, or sglang."""
    few, without = torch.cuda.device_count() < 2, importlib.util.find_spec("sglang") is None
    for item in items:
        if few and item.get_closest_marker("gpus") is not None:
            item.add_marker(pytest.mark.skip(reason="needs two GPUs"))
        if without and item.get_closest_marker("sglang") is not None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU and sglang"))
