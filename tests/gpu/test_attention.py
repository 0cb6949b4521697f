"""Packed attention on a GPU against the same on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdflow.models.attention import packed_attention
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
