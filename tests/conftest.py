from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

# Before anything imports these libraries: no hub, no accidental GPU, quiet.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models: more threads than one only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU Triton's kernels are interpreted, which Triton wants to know before it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import fx

from kdflow.models.joined import joining
from tests.support.models import make_foreign_tokenizer, make_model, make_tokenizer, texts, write_jsonl
from tests.support.runs import make_run


@pytest.fixture(scope="session")
def shadows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each other distribution with plugins of kdflow one of the same name that has none."""
    directory = tmp_path_factory.mktemp("shadows")
    for name in {str(entry.dist.name) for entry in metadata.entry_points(group="kdflow") if entry.dist}:
        if name != "kdflow":
            info = directory / f"{name.replace('-', '_')}-0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n", encoding="utf-8")
    return directory


@pytest.fixture(autouse=True, scope="module")
def no_other_plugins(shadows: Path) -> Iterator[None]:
    """Whatever is installed beside kdflow, tests see its own plugins and those that they install."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(shadows)  # importlib.metadata takes the first distribution of a name on the path
        patch.setenv("PYTHONPATH", str(shadows), prepend=os.pathsep)
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[fx.GraphModule]]:
    """The graphs of which machine code would be made of a student's blocks; none is made."""
    found: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        found.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    torch.compiler.reset()
    monkeypatch.setattr("kdflow.models.joined.lookup_backend", lambda name: keep)
    joining.cache_clear()
    yield found
    joining.cache_clear()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A student and a teacher of one vocabulary, an untied and padded student, a foreign teacher, and text files."""
    root = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    pieces = [text[start : start + 240] for text in texts() for start in range(0, 960, 240)]
    return {
        "student": make_model(root / "student", hidden=32, seed=1, tokenizer=tokenizer),
        "untied": make_model(root / "untied", hidden=32, seed=2, tokenizer=tokenizer, tied=False, padding=16),
        "teacher": make_model(root / "teacher", hidden=48, layers=3, seed=3, tokenizer=tokenizer, padding=8),
        "foreign": make_model(
            root / "foreign", hidden=40, layers=2, seed=4, tokenizer=make_foreign_tokenizer(), padding=5
        ),
        "train": write_jsonl(root / "train.jsonl", [{"text": piece} for piece in pieces[:48]]),
        "eval": write_jsonl(root / "eval.jsonl", [{"text": piece} for piece in pieces[48:54]]),
    }


@pytest.fixture
def run_file(tiny: dict[str, str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes run files over the tiny models, see :func:`tests.support.runs.make_run`."""
    return lambda **sections: make_run(tiny, **{"output": str(tmp_path / "run"), **sections})
