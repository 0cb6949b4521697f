"""Checks that hold for every divergence and algorithm. Each raises AssertionError and says what does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdflow.contracts import Divergence
from kdflow.testing.raw import loss


def check_divergence(divergence: Divergence, *, vocab_size: int = 17, seed: int = 0) -> None:
    """Check what the runtime relies on: one finite, non-negative value a row, zero with zero gradient at equality.

    Among the inputs are logits of ±1e4, columns at -inf on both sides, a vocabulary of 1 and shifted logits.
    """
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(6, vocab_size, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    masked = torch.arange(vocab_size) % 5 == 1
    extreme = 1e4 * torch.where(torch.rand(6, vocab_size, generator=generator) < 0.5, -1.0, 1.0).double()
    cases = {
        "random logits": (student, teacher),
        "columns at -inf on both sides": tuple(x.masked_fill(masked, -torch.inf) for x in (student, teacher)),
        "logits of ±1e4": (extreme, -extreme),
        "a vocabulary of 1": (student[:, :1], teacher[:, :1]),
        "equal logits": (teacher, teacher),
        "equal logits with columns at -inf": (teacher.masked_fill(masked, -torch.inf),) * 2,
    }
    for case, (one, other) in cases.items():
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            values, gradient = _differentiate(divergence, one.to(dtype), other.to(dtype))
            where = f"{divergence.name} on {case} in {dtype}"
            assert values.shape == (len(one),), f"{where}: values have the shape {tuple(values.shape)}, not [n]"
            assert values.isfinite().all(), f"{where}: values are not finite: {values}"
            assert gradient.isfinite().all(), f"{where}: gradients are not finite"
            assert (values >= 0).all(), f"{where}: negative values: {values}"
            if case.startswith("equal") or case == "a vocabulary of 1":
                assert values.abs().max() <= tolerance, f"{where}: {values}, not 0"
                assert gradient.abs().max() <= tolerance, f"{where}: the gradient is not 0"
    plain, _ = _differentiate(divergence, student, teacher)
    shifted, _ = _differentiate(divergence, student + 7.5, teacher - 3.25)
    assert torch.allclose(plain, shifted, rtol=1e-9), f"{divergence.name} changes when logits are shifted"


def _differentiate(divergence: Divergence, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    values = divergence(leaf, teacher)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def check_algorithm(
    name: str, options: Mapping[str, Any] | None = None, *, module: torch.nn.Module | None = None, seed: int = 0
) -> None:
    """Check what the runtime relies on: sums that add up over micro-batches, and a graph where there is no row."""
    generator = torch.Generator().manual_seed(seed)

    def raw(rows: slice) -> tuple[dict[str, Any], dict[str, Any]]:
        student = {"hidden": hidden[rows].clone().requires_grad_(), "head": weight, "labels": labels[rows]}
        return student, {"hidden": teacher_hidden[rows], "head": teacher_weight, "labels": labels[rows]}

    hidden, teacher_hidden = (torch.randn(9, size, generator=generator, dtype=torch.float64) for size in (8, 12))
    weight, teacher_weight = (torch.randn(23, size, generator=generator, dtype=torch.float64) for size in (8, 12))
    labels = torch.randint(0, 23, (9,), generator=generator)
    weight.requires_grad_()
    if module is not None:
        module = module.double()
    values = {}
    for rows in (slice(0, 9), slice(0, 4), slice(4, 9), slice(0, 0)):
        student, teacher = raw(rows)
        result = loss(name, options, student, teacher, module=module)
        assert result.value.shape == (), f"{name}: the loss has the shape {tuple(result.value.shape)}, not a scalar"
        (gradient,) = torch.autograd.grad(result.value, weight, allow_unused=True)
        assert gradient is not None, f"{name}: {student['hidden'].shape[0]} rows give no gradient for the head"
        values[rows.start, rows.stop] = result.value.detach()
    assert values[0, 0] == 0, f"{name}: no rows give a loss of {values[0, 0]}, not 0"
    assert torch.allclose(values[0, 9], values[0, 4] + values[4, 9], rtol=1e-9), (
        f"{name}: nine rows give {values[0, 9]}, but four and five of them {values[0, 4]} + {values[4, 9]}: not a sum"
    )
