"""Training on one GPU: bf16, packed varlen attention, compiled blocks, resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kdflow
from kdflow.contracts import Pair, Tokens
from kdflow.data.packing import collate
from kdflow.models.loading import load_model
from kdflow.models.packed import packed_hidden_states
from kdflow.runtime.events import Events
from tests.support.runs import events, kill_when, losses, make_run, start, train, trajectory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
RunFile = Callable[..., dict[str, Any]]


def _train(tiny: dict[str, str], models: dict[str, str], output: Path, **training: Any) -> Path:
    settings = {"steps": 8, "tokens_per_step": 2000, "learning_rate": 1e-3, "dtype": "bfloat16", **training}
    run = make_run(
        {**tiny, **models}, training=settings, algorithm={"name": "jsd", "ce_weight": 0.2}, output=str(output)
    )
    run["data"]["max_tokens"] = 1024
    kdflow.train(run)
    return output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_equals_alone(models: dict[str, str], cuda: torch.device, dtype: torch.dtype) -> None:
    model = load_model(models["student"], dtype, cuda)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 300, (length,), generator=generator).numpy() for length in (100, 7, 333)]
    pairs = [Pair(str(i), Tokens(ids, *(torch.arange(len(ids) - 1).numpy(),) * 2)) for i, ids in enumerate(samples)]
    together = packed_hidden_states(model, collate(pairs, with_teacher=False).to(cuda).student)
    alone = [packed_hidden_states(model, collate([pair], with_teacher=False).to(cuda).student) for pair in pairs]
    reference = torch.cat(alone).float()
    error = (together.float() - reference).norm() / reference.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_fp32_follows_the_cpu(
    tiny: dict[str, str], models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = _train(tiny, models, tmp_path / "gpu", dtype="float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = _train(tiny, models, tmp_path / "cpu", dtype="float32")
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=1e-4)


def test_bf16_compiled_and_checkpointed(tiny: dict[str, str], models: dict[str, str], tmp_path: Path) -> None:
    exact = losses(_train(tiny, models, tmp_path / "fp32", dtype="float32"))
    assert exact[-1] < exact[0]
    for name, training in {
        "bf16": {},
        "chunked": {"head_chunk": 64},
        "checkpointed": {"activation_checkpointing": True},
        "compiled": {"compile": True},
        "compiled and checkpointed": {"compile": True, "activation_checkpointing": True},
    }.items():
        assert losses(_train(tiny, models, tmp_path / name, **training)) == pytest.approx(exact, rel=1e-2), name


def test_one_copy_a_step_goes_to_the_host(
    tiny: dict[str, str], models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several micro-batches, and the teacher's work for the next step among them."""
    emit, first, last = Events.emit, 4, 9
    tracer = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    )

    def trace(self: Events, event: str, **fields: Any) -> None:
        emit(self, event, **fields)
        if event == "step" and fields["step"] in (first, last):
            torch.cuda.synchronize()
            (tracer.start if fields["step"] == first else tracer.stop)()

    monkeypatch.setattr(Events, "emit", trace)
    _train(tiny, models, tmp_path / "traced", steps=last + 1)
    tracer.export_chrome_trace(str(tmp_path / "trace.json"))
    traced = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    copies = [event for event in traced if event.get("cat") == "gpu_memcpy" and "DtoH" in event["name"]]
    assert len(copies) == last - first
    assert max(event["args"]["bytes"] for event in copies) < 100


def test_killed_and_resumed(tiny: dict[str, str], models: dict[str, str], tmp_path: Path) -> None:
    training = {"steps": 30, "tokens_per_step": 2000, "dtype": "bfloat16", "checkpoint_every": 2}
    run = make_run(
        {**tiny, **models}, training={**make_run(tiny)["training"], **training}, output=str(tmp_path / "killed")
    )
    whole = {**run, "output": str(tmp_path / "whole")}
    train(whole)
    kill_when(start(run), lambda: (tmp_path / "killed" / "checkpoints" / "step-00000006").exists())
    train(run, "--resume", "auto")
    assert trajectory(run["output"], ["samples", "learning_rate"]) == trajectory(
        whole["output"], ["samples", "learning_rate"]
    )
    assert losses(Path(run["output"])) == pytest.approx(losses(Path(whole["output"])), rel=1e-3)
    assert events(run["output"], "resumed")
