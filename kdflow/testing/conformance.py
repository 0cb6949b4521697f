"""Checks that hold for every divergence and algorithm. Each raises AssertionError and says what does not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kdflow.contracts import STEP_FIGURES, Divergence, KdflowError, LossSum, ModelSpec
from kdflow.testing.raw import loss, make


def check_divergence(divergence: Divergence, *, vocab_size: int = 17, seed: int = 0) -> None:
    """Check what the runtime relies on: one finite, non-negative value a row, zero with zero gradient at equality.

    A row's value and gradient are its own, whatever other rows there are.

    Among the inputs are logits of ±1e4, columns at -inf on both sides, a vocabulary of 1, shifted logits, and no rows,
    as of a rank without targets.
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
        "no rows": (student[:0], teacher[:0]),
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
    plain, gradient = _differentiate(divergence, student, teacher)
    alone = [_differentiate(divergence, student[row, None], teacher[row, None]) for row in range(len(student))]
    for what, together, parts in (
        ("value", plain, [v for v, _ in alone]),
        ("gradient", gradient, [g for _, g in alone]),
    ):
        assert torch.allclose(together, torch.cat(parts), rtol=1e-6, atol=1e-12), (
            f"{divergence.name}: a row's {what} depends on the other rows"
        )
    shifted, _ = _differentiate(divergence, student + 7.5, teacher - 3.25)
    assert torch.allclose(plain, shifted, rtol=1e-9), f"{divergence.name} changes when logits are shifted"


def _differentiate(divergence: Divergence, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    try:
        values = divergence(leaf, teacher)
    except KdflowError as error:
        raise AssertionError(str(error)) from None
    except Exception as error:
        raise AssertionError(f"{divergence.name} fails on logits {list(student.shape)}: {error!r}") from error
    assert values.requires_grad, f"{divergence.name}: the values carry no gradient"
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def check_algorithm(
    name: str, options: Mapping[str, Any] | None = None, *, module: torch.nn.Module | None = None, seed: int = 0
) -> None:
    """Check what the runtime relies on.

    Losses are sums that add up over micro-batches, and so do gradients; the same parameters get some and the same
    metrics are reported whatever the number of rows, also where there is none. Metrics are pairs of a sum and a count
    under names of their own, and ``needs`` name what is used: the algorithm is given no more.

    Args:
        name: the algorithm, or a divergence.
        options: its options.
        module: in place of what the algorithm's ``build`` makes, for hidden sizes 8 and 12 and a vocabulary of 23.
        seed: of the random inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, teacher_hidden = (torch.randn(9, size, generator=generator, dtype=torch.float64) for size in (8, 12))
    weight, teacher_weight = (torch.randn(23, size, generator=generator, dtype=torch.float64) for size in (8, 12))
    labels, inputs = torch.randint(0, 23, (2, 9), generator=generator)
    response = torch.tensor([0] * 4 + [1] * 5)
    embeddings, teacher_embeddings = weight.roll(1, 0), teacher_weight.roll(1, 0)
    algorithm = make(name, options)
    needs = ", ".join(sorted(algorithm.needs)) or "nothing"
    with _given(name, needs):
        if module is None:
            module = algorithm.build(ModelSpec(8, 23), ModelSpec(12, 23) if "teacher" in algorithm.needs else None)
    trained = {} if module is None else dict(module.double().named_parameters(prefix="module"))
    own = {key: value for key, value in trained.items() if value.requires_grad}

    def check(start: int, stop: int) -> tuple[Tensor, dict[str, Tensor], set[str]]:
        """The loss of some rows, the gradients of the parameters that it reaches, and its metrics."""
        rows = slice(start, stop)
        leaves = {"hidden": hidden[rows].clone(), "head": weight.clone(), **own}
        both = {"labels": labels[rows], "inputs": inputs[rows], "response": response[rows]}
        student = {key: leaves[key].requires_grad_() for key in ("hidden", "head")}
        teacher = {"hidden": teacher_hidden[rows], "head": teacher_weight, "embed": teacher_embeddings.__getitem__}
        with _given(name, needs):
            result = loss(
                name, options, {**student, **both, "embed": embeddings.__getitem__}, {**teacher, **both}, module=module
            )
        assert isinstance(result, LossSum), f"{name}: the loss is no LossSum, but {result!r}"
        assert isinstance(result.value, Tensor), f"{name}: the loss is no tensor, but {result.value!r}"
        for key, metric in result.metrics.items():
            assert key not in STEP_FIGURES, f"{name}: a metric is called '{key}' like a figure of every step"
            assert _is_sum_and_count(metric), f"{name}: the metric '{key}' is {metric!r}, not a 0-d tensor and a number"
        assert result.value.shape == (), f"{name}: the loss has the shape {tuple(result.value.shape)}, not a scalar"
        assert result.value.requires_grad, f"{name}: the loss of {stop - start} rows has no graph"
        gradients = torch.autograd.grad(result.value, tuple(leaves.values()), allow_unused=True)
        reached = {key: gradient for key, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
        return result.value.detach(), reached, set(result.metrics)

    whole, reached, metrics = check(0, 9)
    parts = [check(0, 4), check(4, 9), check(0, 0)]
    assert "hidden" in reached, f"{name}: the hidden states get no gradient"
    for _, some, names in parts:
        assert some.keys() == reached.keys(), (
            f"{name}: gradients reach {sorted(reached)}, but with other rows {sorted(some)}"
        )
        assert names == metrics, f"{name}: metrics are {sorted(metrics)}, but with other rows {sorted(names)}"
    first, second, nothing = (value for value, _, _ in parts)
    assert nothing == 0, f"{name}: no rows give a loss of {nothing}, not 0"
    assert torch.allclose(whole, first + second, rtol=1e-5), (
        f"{name}: nine rows give {whole}, but four and five of them {first} + {second}: not a sum"
    )
    for key, gradient in reached.items():
        one, other = (some[key] for _, some, _ in parts[:2])
        added = torch.cat([one, other]) if key == "hidden" else one + other
        assert (gradient - added).abs().max() <= 1e-4 * gradient.abs().max() + 1e-9, (
            f"{name}: the gradient of {key} of nine rows is not that of four and five of them: not a sum"
        )


@contextmanager
def _given(name: str, needs: str) -> Iterator[None]:
    """What the block raises is the algorithm's fault, whatever it is."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{name} fails, given what its needs name ({needs}): {error!r}") from error


def _is_sum_and_count(metric: object) -> bool:
    match metric:
        case (Tensor() as total, Real()):
            return total.shape == ()
    return False
