"""Packed attention on a GPU against the same on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdflow.models.attention import packed_attention
from kdflow.models.flash import flash_attention, has_flash
from tests.models.test_attention import FEATURES, HEADS, LENGTHS, WIDTH, bounds, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_gpu_gives_what_the_cpu_gives(features: dict[str, Any], dtype: torch.dtype) -> None:
    total = sum(LENGTHS)
    inputs, weight = tensors(total, total, dtype), torch.randn(1, total, HEADS, WIDTH).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        here = [x.detach().to(device).requires_grad_() for x in inputs]
        options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in features.items()}
        found, _ = packed_attention(
            nn.Module(), *here, None, cu_seqlens=bounds(LENGTHS).to(device), longest=9, **options
        )
        gradients = torch.autograd.grad((found * weight.to(device)).sum(), here)
        results.append([x.cpu().float() for x in (found, *gradients)])
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", [None, 70])
def test_flash_attention_gives_what_fp32_gives(window: int | None, size: int) -> None:
    if not has_flash(size):
        pytest.skip("needs flash-attn-3 and a Hopper GPU, or flash-attn-4 and one of Hopper or Blackwell")
    lengths = [300, 1, 200, 129, 70]
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value, weight = (
        torch.randn(1, heads, sum(lengths), size, device="cuda", generator=generator).bfloat16()
        for heads in (4, 2, 2, 4)
    )
    cut = bounds(lengths).cuda()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        if dtype == torch.bfloat16:
            found = flash_attention(*(x[0].transpose(0, 1) for x in inputs), cut, 300, None, window)[0][None]
        else:
            found, _ = packed_attention(nn.Module(), *inputs, None, sliding_window=window, cu_seqlens=cut, longest=300)
        gradients = torch.autograd.grad((found * weight.transpose(1, 2).to(dtype)).sum(), inputs)
        results.append([x.float() for x in (found, *gradients)])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() < 1e-2 * exact.norm()
