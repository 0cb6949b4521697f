"""Checks that hold for every divergence and algorithm. Each raises AssertionError and says what does not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdflow.contracts import (
    Algorithm,
    Divergence,
    Head,
    KdflowError,
    ModelSpec,
    Pair,
    Side,
    TargetAlignment,
    Tokens,
)
from kdflow.contracts.returned import require_loss, require_module, require_prepared
from kdflow.data.alignment import joined
from kdflow.testing.raw import by_number, loss, make, side


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
    under names of their own, and ``needs`` name what is used: the algorithm is given no more. A teacher that need not
    share the vocabulary has another number of columns, and with an aligner another number of rows, of which
    ``prepare`` may drop some.

    Args:
        name: the algorithm, or a divergence.
        options: its options.
        module: in place of what the algorithm's ``build`` makes, for hidden sizes 8 and 12 and a vocabulary of 23, or
            29 of a teacher that need not share it.
        seed: of the random inputs.
    """
    with _blamed(name, "when it is made"):
        algorithm = make(name, options)
    given = f"given what its needs name ({', '.join(sorted(algorithm.needs)) or 'nothing'})"
    generator = torch.Generator().manual_seed(seed)
    sizes = 23, 23 if "same_vocabulary" in algorithm.needs else 29
    hidden, teacher_hidden = (torch.randn(11, size, generator=generator, dtype=torch.float64) for size in (8, 12))
    weight, teacher_weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((sizes[0], 8), (sizes[1], 12))
    )
    labels, inputs = torch.randint(0, 23, (2, 11), generator=generator)
    # Two responses of 4 and 5 tokens; a teacher that cuts them itself has 6 and 4, of which some are the same.
    response = torch.tensor([0] * 4 + [1] * 5 + [0] * 2)
    rows = torch.arange(9)
    teacher_rows = torch.tensor([0, 1, 2, 3, 9, 10, 4, 5, 6, 7]) if "aligner" in algorithm.needs else rows
    embeddings, teacher_embeddings = weight.roll(1, 0), teacher_weight.roll(1, 0)
    with _blamed(name, given):
        if module is None:
            specs = ModelSpec(8, sizes[0], Head(weight)), ModelSpec(12, sizes[1], Head(teacher_weight))
            built = algorithm.build(specs[0], specs[1] if "teacher" in algorithm.needs else None)
            module = require_module(algorithm, built)
    trained = {} if module is None else dict(module.double().named_parameters(prefix="module"))
    for key, value in trained.items():
        assert value.ndim, f"{name}: the parameter {key} is a scalar, which FSDP cannot shard: give it the shape [1]"
    own = {key: value for key, value in trained.items() if value.requires_grad}

    def check(first: int, stop: int) -> tuple[Tensor, dict[str, Tensor], set[str]]:
        """The loss of some responses, the gradients of the parameters that it reaches, and its metrics."""
        ours, theirs = (of[(response[of] >= first) & (response[of] < stop)] for of in (rows, teacher_rows))
        leaves = {"hidden": hidden[ours].clone(), "head": weight.clone(), **own}
        of_student = {key: leaves[key].requires_grad_() for key in ("hidden", "head")}
        of_teacher = {"hidden": teacher_hidden[theirs], "head": teacher_weight}
        student, teacher = (
            side({**of, "embed": embed, "labels": labels[at], "inputs": inputs[at], "response": response[at]})
            for of, embed, at in (
                (of_student, embeddings.__getitem__, ours), (of_teacher, teacher_embeddings.__getitem__, theirs),
            )
        )  # fmt: skip
        with _blamed(name, given):
            taught, alignment = _prepared(algorithm, student, teacher if "teacher" in algorithm.needs else None)
            result = loss(name, options, student, taught, module=module, alignment=alignment)
            require_loss(algorithm, result)
        assert result.value.is_floating_point(), f"{name}: the loss is of {result.value.dtype}, not of real numbers"
        assert result.value.requires_grad, f"{name}: the loss of {len(ours)} rows has no graph"
        with _blamed(name, "in its backward pass"):
            gradients = torch.autograd.grad(result.value, tuple(leaves.values()), allow_unused=True)
        reached = {key: gradient for key, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
        return result.value.detach(), reached, set(result.metrics)

    whole, reached, metrics = check(0, 2)
    parts = [check(0, 1), check(1, 2), check(0, 0)]
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


def _prepared(algorithm: Algorithm, student: Side, teacher: Side | None) -> tuple[Side | None, TargetAlignment | None]:
    """What the algorithm's ``prepare`` leaves of the teacher's rows, and how they are aligned.

    Raises:
        KdflowError: it leaves something else.
    """
    alignment = by_number(algorithm, student, teacher)
    if not len(student.rows):
        return teacher, None if alignment is None else joined([])  # as of a rank that is left without samples
    pair = Pair("a made-up pair", _tokens(student), None if teacher is None else _tokens(teacher), alignment)
    found = require_prepared(algorithm, pair, algorithm.prepare(pair))
    if teacher is None:
        return None, None
    kept = np.isin(teacher.tokens.targets.numpy(), [] if found.teacher is None else found.teacher.targets)
    counts, left = [len(student.rows), int(kept.sum())], found.alignment
    if (
        found.teacher is None
        or len(found.teacher.targets) != counts[1]
        or (alignment is None) != (left is None)
        or (left is not None and [len(left.student), len(left.teacher)] != counts)
    ):
        raise KdflowError("prepare must leave targets that the teacher has, aligned: use pair.with_teacher_targets")
    at = torch.from_numpy(kept)
    tokens, response = teacher.tokens, teacher.response_of_row[at]
    tokens = replace(tokens, targets=tokens.targets[at], response_of_target=response)
    return replace(teacher, tokens=tokens, rows=teacher.rows[at], response_of_row=response), left


def _tokens(one: Side) -> Tokens:
    tokens = one.tokens
    return Tokens(tokens.input_ids.numpy(), tokens.targets.numpy(), tokens.response_of_target.numpy())


@contextmanager
def _blamed(name: str, when: str) -> Iterator[None]:
    """What the block raises is the algorithm's fault, whatever it is."""
    try:
        yield
    except KdflowError as error:
        raise AssertionError(f"{name}: {error}") from None
    except Exception as error:
        raise AssertionError(f"{name} fails, {when}: {error!r}") from error
