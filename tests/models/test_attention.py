"""Packed attention against attention written out over all tokens with a mask, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdflow.models.attention import packed_attention
from kdflow.models.flash import has_flash

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
LENGTHS = [6, 1, 9, 3]
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaling": {"scaling": 0.7},
    "window": {"sliding_window": 4},
    "window of one": {"sliding_window": 1},
    "window longer than all": {"sliding_window": 50},
    "softcap": {"softcap": 0.8},
    "softcap and window": {"softcap": 0.8, "sliding_window": 4, "scaling": 0.7},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "sinks and window": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0]), "sliding_window": 4},
}


def tensors(new: int, seen: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(new + seen)
    shapes = [(1, HEADS, new, WIDTH), (1, KEY_HEADS, seen, WIDTH), (1, KEY_HEADS, seen, WIDTH)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sample: Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """A query and a key at a time; ``sample`` numbers the sample of each key, and queries are the last of the keys."""
    new, seen = query.shape[2], key.shape[2]
    result = torch.zeros(1, new, HEADS, WIDTH, dtype=query.dtype)
    for head in range(HEADS):
        keys, values = (x[0, head // (HEADS // KEY_HEADS)] for x in (key, value))
        for at in range(new):
            position = seen - new + at
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            visible = [k for k in range(first, position + 1) if sample[k] == sample[position]]
            scores = keys[visible] @ query[0, head, at] * (WIDTH**-0.5 if scaling is None else scaling)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            total = weights.sum() + (0 if s_aux is None else s_aux[head].exp())
            result[0, at, head] = weights @ values[visible] / total
    return result


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_packed_samples_attend_to_themselves_alone(features: dict[str, Any]) -> None:
    total = sum(LENGTHS)
    inputs = tensors(total, total)
    sample = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    packed, weights = packed_attention(nn.Module(), *inputs, None, cu_seqlens=bounds(LENGTHS), longest=9, **features)
    expected = written_out(*inputs, sample, **features)
    assert weights is None
    # Scores are kept in fp32 where a softcap or sinks are applied to them.
    exact = "softcap" not in features and "s_aux" not in features
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(packed, expected, **tolerance)
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = [torch.autograd.grad((result * weight).sum(), inputs) for result in (packed, expected)]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize(("new", "seen"), [(1, 1), (7, 7), (1, 9), (3, 9)])
def test_without_bounds_it_is_one_sample_whose_keys_may_be_cached(
    features: dict[str, Any], new: int, seen: int
) -> None:
    inputs = tensors(new, seen)
    found, _ = packed_attention(nn.Module(), *inputs, None, **features)
    torch.testing.assert_close(found, written_out(*inputs, torch.zeros(seen), **features), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_bf16_stays_bf16_and_is_right_to_rounding(features: dict[str, Any]) -> None:
    total = sum(LENGTHS)
    inputs = tensors(total, total, torch.bfloat16)
    found, _ = packed_attention(nn.Module(), *inputs, None, cu_seqlens=bounds(LENGTHS), longest=9, **features)
    sample = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    assert found.dtype == torch.bfloat16
    expected = written_out(*(x.double() for x in inputs), sample, **features)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def test_a_batch_of_rows_is_refused_since_padding_would_be_attended_to() -> None:
    inputs = [x.expand(2, -1, -1, -1) for x in tensors(5, 5)]
    with pytest.raises(ValueError, match="one row of samples, not 2"):
        packed_attention(nn.Module(), *inputs, None)


def test_models_with_heads_of_other_sizes_compile_after_one_another() -> None:
    """The size of a head is a symbol to the compiler from the second model on."""
    compiled = torch.compile(lambda x: x + has_flash(x.shape[-1]), fullgraph=True, backend="eager")
    for size in (64, 128, 96):
        assert torch.equal(compiled(torch.ones(2, size)), torch.ones(2, size) + has_flash(size))
