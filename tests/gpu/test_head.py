"""The distillation head on a GPU, through the kernel and, for plain divergences, the compiler, against fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kdflow
from kdflow import Divergence, Head, ops
from kdflow.ops import tuning
from tests.support.heads import relative_errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl", "tvd")
VOCAB, ROWS = 40_003, 700


class Squared(Divergence):
    name = "squared"

    def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).square().sum(-1)


def sides(device: torch.device, rows: int = ROWS) -> list[Tensor]:
    """Student's rows, weight and bias, teacher's rows and weight, in bf16."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((rows, 256), (VOCAB, 256), (VOCAB,), (rows, 512), (VOCAB + 61, 512))
    scales = (1.0, 256**-0.5, 1.0, 1.0, 512**-0.5)
    return [
        (torch.randn(*shape, generator=generator, device=device) * scale).bfloat16()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def results(tensors: list[Tensor], divergence: Divergence, dtype: torch.dtype, **head: Any) -> list[Tensor]:
    """Loss, and gradients for the student's rows, weight and bias."""
    rows, weight, bias, others, other_weight = (x.detach().to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in (rows, weight, bias)]
    student, teacher = Head(weight, bias, valid_vocab=VOCAB - 3, **head), Head(other_weight, **head)
    targets = torch.arange(len(rows), device=rows.device) * 7
    loss = ops.divergence_sum(rows, student, others, teacher, divergence, targets=targets, ce_weight=0.2)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("name", [*DIVERGENCES, "squared", "sorted_l1"])
def test_values_and_gradients_equal_fp64(cuda: torch.device, name: str) -> None:
    head = {"softcap": 5.0, "scale": 2.0} if name in ("jsd", "squared") else {}
    divergence = Squared(temperature=1.5) if name == "squared" else kdflow.get_divergence(name, temperature=1.5)
    tensors = sides(cuda)
    with ops.chunk_rows(300):
        found = results(tensors, divergence, torch.bfloat16, **head)
    exact = results(tensors, divergence, torch.float64, **head)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs).norm() < 3e-2 * theirs.norm()
    assert found[0].item() == pytest.approx(exact[0].item(), rel=1e-3)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    ("temperature", "ce_weight", "head"),
    [
        (1.0, 0.0, {}),
        (2.0, 0.0, {}),
        (1.0, 0.1, {}),
        (1.0, 0.0, {"softcap": 30.0}),
        (1.0, 0.1, {"valid_vocab": 39_990}),
    ],
)
def test_gradients_are_as_good_as_those_of_plain_torch(
    cuda: torch.device, name: str, temperature: float, ce_weight: float, head: dict[str, Any]
) -> None:
    rows, weight, _, others, other_weight = sides(cuda)
    tensors = [rows, 2 * weight, others, 2 * other_weight[:VOCAB]]
    divergence = kdflow.get_divergence(name, temperature=temperature)
    ours, plain = relative_errors(tensors, divergence, ce_weight, head)
    for error, bound in zip(ours[1:], plain[1:], strict=True):
        assert error < 1.01 * bound


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_buffer_of_all_rows_is_made(cuda: torch.device, name: str) -> None:
    tensors = sides(cuda, rows=8192)
    results(tensors, kdflow.get_divergence(name), torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with ops.chunk_rows(512):
        results(tensors, kdflow.get_divergence(name), torch.bfloat16)
    # Both sides' logits of a chunk in bf16, gradients in fp32 and bf16, copies of the inputs.
    logits, weight = 512 * VOCAB * 2, VOCAB * 256
    assert torch.cuda.max_memory_allocated() - before < 2 * logits + 12 * weight + 2**26


@pytest.mark.parametrize("name", [*DIVERGENCES, "squared"])
def test_no_rows_give_zero(cuda: torch.device, name: str) -> None:
    divergence = Squared() if name == "squared" else kdflow.get_divergence(name)
    for result in results(sides(cuda, rows=0), divergence, torch.bfloat16):
        assert not result.any()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without blocks, in a process that has chosen none; heads of any size are worth a measurement."""
    monkeypatch.setenv("KDFLOW_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_WORTHWHILE", 0)
    monkeypatch.setattr(tuning, "chosen", {})
    return tmp_path / "kernels"


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("blocks", tuning.CANDIDATES)
def test_every_block_size_gives_values_and_gradients_of_fp64(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch, name: str, blocks: tuning.Blocks
) -> None:
    monkeypatch.setattr(tuning, "CANDIDATES", (blocks,))
    divergence, tensors = kdflow.get_divergence(name), sides(cuda)
    found = results(tensors, divergence, torch.bfloat16)
    for ours, theirs in zip(found, results(tensors, divergence, torch.float64), strict=True):
        assert (ours.double() - theirs).norm() < 3e-2 * theirs.norm()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_blocks_are_measured_once_on_a_machine(
    cuda: torch.device, own_cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    divergence, tensors = kdflow.get_divergence(name), sides(cuda)
    found = results(tensors, divergence, torch.bfloat16)
    (file,) = own_cache.iterdir()
    told = json.loads(file.read_text("utf-8"))
    assert list(told["ms"]) == [f"{lanes},{warps}" for lanes, warps in tuning.CANDIDATES]
    assert all(0 < time < 1000 for time in told["ms"].values())
    exact = results(tensors, divergence, torch.float64)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs).norm() < 3e-2 * theirs.norm(), "what was measured is done once more"

    monkeypatch.setattr(tuning, "chosen", {})  # as in another process
    monkeypatch.setattr(tuning, "measure", None)
    results(tensors, divergence, torch.bfloat16)
    assert [list(blocks) for blocks in tuning.chosen.values()] == [told["blocks"]]
