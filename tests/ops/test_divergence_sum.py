"""The distillation head: chunked, masked and weighted, and equal to the plain computation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kdflow
from kdflow import Divergence, Head, ops
from tests.support.draw import quick
from tests.support.heads import Sizes, heads, parameters, plain_logits, trainable

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl", "tvd")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(actual: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def plain(
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head],
    divergence: Divergence,
    targets: Tensor,
    ce_weight: float,
) -> Tensor:
    """All rows at once; ids that are not on both sides are cut off instead of masked."""
    valid = [len(head.weight) if head.valid_vocab is None else head.valid_vocab for _, head in (student, teacher)]
    logits, others = plain_logits(*student), plain_logits(*teacher)
    shared = min(valid)
    kd = divergence(logits[:, :shared], others[:, :shared]).sum()
    ce = torch.nn.functional.cross_entropy(logits[:, : valid[0]], targets, reduction="sum")
    return (1 - ce_weight) * kd + ce_weight * ce


@quick
@given(
    data=st.data(),
    count=st.integers(1, 9),
    chunk=st.integers(1, 10),
    vocabularies=st.sampled_from([(7, 7), (7, 10), (10, 7)]),
    name=st.sampled_from(DIVERGENCES),
    temperature=st.sampled_from((1.0, 2.0)),
    ce_weight=st.sampled_from((0.0, 0.3, 1.0)),
    seed=st.integers(0, 2**31),
)
def test_equals_the_plain_computation(
    data: st.DataObject, count: int, chunk: int, vocabularies: tuple[int, int], name: str, temperature: float,
    ce_weight: float, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        (
            torch.randn(count, hidden, generator=generator, dtype=torch.float64),
            data.draw(heads(vocab, hidden, generator)),
        )
        for vocab, hidden in zip(vocabularies, (3, 4), strict=True)
    )
    targets = torch.randint(0, vocabularies[0] - 2, (count,), generator=generator)
    leaves = trainable(*parameters([(*student, None), (*teacher, None)]))
    divergence = kdflow.get_divergence(name, temperature=temperature)
    with ops.chunk_rows(chunk):
        value = ops.divergence_sum(*student, *teacher, divergence, targets=targets, ce_weight=ce_weight)
    expected = plain(student, teacher, divergence, targets, ce_weight)
    same(value, expected)
    assert value.shape == ()
    gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    same(gradients, torch.autograd.grad(expected, leaves, materialize_grads=True))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_same_heads_and_rows_give_zero(name: str) -> None:
    rows, head = random(5, 3), Head(random(8, 3, seed=1), valid_vocab=6)
    leaf = rows.clone().requires_grad_()
    value = ops.divergence_sum(leaf, head, rows, head, kdflow.get_divergence(name))
    same(value.detach(), torch.zeros((), dtype=torch.float64))
    same(torch.autograd.grad(value, leaf)[0], torch.zeros_like(rows))


def test_padding_gets_no_gradient() -> None:
    weight = random(8, 3, seed=1).requires_grad_()
    other = Head(random(7, 4, seed=2), valid_vocab=5)
    value = ops.divergence_sum(random(5, 3), Head(weight), random(5, 4, seed=3), other, kdflow.get_divergence("jsd"))
    (gradient,) = torch.autograd.grad(value, weight)
    assert (gradient[:5].abs().sum(-1) > 0).all()
    assert (gradient[5:] == 0).all()


def test_the_cross_entropy_is_over_all_of_the_students_vocabulary_at_temperature_1() -> None:
    student, teacher = (random(4, 3), Head(random(9, 3, seed=1))), (random(4, 3, seed=2), Head(random(6, 3, seed=3)))
    targets = torch.tensor([0, 5, 7, 8])
    divergence = kdflow.get_divergence("forward_kl", temperature=3.0)
    value = ops.divergence_sum(*student, *teacher, divergence, targets=targets, ce_weight=1.0)
    same(value, torch.nn.functional.cross_entropy(plain_logits(*student), targets, reduction="sum"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("target", [-100, -1, 8, 10**6])
def test_a_target_that_is_no_id_of_the_head_is_refused(dtype: torch.dtype, target: int) -> None:
    rows, head = random(3, 4).to(dtype), Head(random(8, 4).to(dtype))
    with pytest.raises(ValueError, match="targets are ids of the student's head, 0 to 7"):
        ops.divergence_sum(
            rows, head, rows, head, kdflow.get_divergence("jsd"), targets=torch.tensor([1, target, 3]), ce_weight=0.5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_padding_is_an_infinitely_unlikely_target(dtype: torch.dtype) -> None:
    rows, head = random(3, 4).to(dtype), Head(random(8, 4).to(dtype), valid_vocab=6)
    found = ops.divergence_sum(
        rows, head, rows, head, kdflow.get_divergence("jsd"), targets=torch.tensor([1, 7, 3]), ce_weight=0.5
    )
    assert found == math.inf


def test_a_temperature_takes_the_place_of_the_divergences_own() -> None:
    sides = random(4, 3), Head(random(6, 3, seed=1)), random(4, 3, seed=2), Head(random(6, 3, seed=3))
    own = kdflow.get_divergence("skew_kl", skew=0.3, temperature=2.0)
    value = ops.divergence_sum(*sides, own, temperature=0.5)
    same(value, ops.divergence_sum(*sides, kdflow.get_divergence("skew_kl", skew=0.3, temperature=0.5)), rtol=0, atol=0)
    assert own.temperature == 2.0
    assert not torch.allclose(value, ops.divergence_sum(*sides, own))


def test_no_rows_give_zero_and_gradients_of_zero() -> None:
    leaves = random(0, 3), random(6, 3, seed=1), random(6, seed=2), random(0, 4), random(7, 4, seed=3)
    rows, weight, bias, others, other_weight = trainable(*leaves)
    for name in DIVERGENCES:
        for ce_weight in (0.0, 0.5):
            value = ops.divergence_sum(
                rows, Head(weight, bias), others, Head(other_weight, valid_vocab=5), kdflow.get_divergence(name),
                targets=torch.zeros(0, dtype=torch.long), ce_weight=ce_weight,
            )  # fmt: skip
            assert value == 0
            for gradient, leaf in zip(torch.autograd.grad(value, leaves), leaves, strict=True):
                assert torch.equal(gradient, torch.zeros_like(leaf))


def test_half_the_loss_has_half_the_gradient() -> None:
    rows = random(5, 3).requires_grad_()
    sides = Head(random(6, 3, seed=1)), random(5, 3, seed=2), Head(random(6, 3, seed=3)), kdflow.get_divergence("jsd")
    (whole,) = torch.autograd.grad(ops.divergence_sum(rows, *sides), rows)
    (half,) = torch.autograd.grad(ops.divergence_sum(rows, *sides) * 0.5, rows)
    assert torch.equal(half, whole * 0.5)


def test_nothing_of_the_size_of_all_logits_is_ever_made() -> None:
    count, vocab, hidden, chunk = 2048, 5000, 16, 64
    rows, weight, others, other_weight = (
        random(*shape, seed=seed).float()
        for seed, shape in enumerate(((count, hidden), (vocab, hidden), (count, hidden), (vocab, hidden)))
    )
    leaves = trainable(rows, weight)
    with Sizes() as sizes, ops.chunk_rows(chunk):
        value = ops.divergence_sum(
            rows, Head(weight, valid_vocab=vocab - 8), others, Head(other_weight), kdflow.get_divergence("jsd"),
            targets=torch.arange(count), ce_weight=0.5,
        )  # fmt: skip
        torch.autograd.grad(value / count, leaves)
    assert torch.Size((chunk, vocab)) in sizes.shapes
    assert torch.Size((vocab, hidden)) in sizes.shapes
    assert max(shape.numel() for shape in sizes.shapes) <= chunk * vocab


# --- in training ------------------------------------------------------------------------------------------------------


def sides(count: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    student = {"hidden": random(count, 3), "head": random(6, 3, seed=1), "labels": torch.arange(count) % 6}
    return student, {"hidden": random(count, 4, seed=2), "head": random(6, 4, seed=3)}


def test_the_parts_of_a_weighted_loss_are_reported_as_sums_and_counts() -> None:
    student, teacher = sides()
    result = kdflow.testing.loss("jsd", {"ce_weight": 0.25, "temperature": 2.0}, student, teacher)
    assert set(result.metrics) == {"kd", "ce"}
    (kd, count), (ce, ce_count) = result.metrics["kd"], result.metrics["ce"]
    assert count == ce_count == 5.0
    same(result.value, 0.75 * kd + 0.25 * ce)
    same(kd, kdflow.testing.loss("jsd", {"temperature": 2.0}, student, teacher).value)
    same(ce, kdflow.testing.loss("sft", {}, student).value)
    assert not kd.requires_grad
    assert not ce.requires_grad


def test_the_parts_are_the_same_where_there_is_no_row() -> None:
    assert set(kdflow.testing.loss("jsd", {"ce_weight": 0.25}, *sides(0)).metrics) == {"kd", "ce"}
    assert kdflow.testing.loss("jsd", {}, *sides()).metrics == kdflow.testing.loss("jsd", {}, *sides(0)).metrics == {}


# --- wrong inputs -----------------------------------------------------------------------------------------------------


def call(divergence: Any = None, rows: int = 3, **options: Any) -> Tensor:
    head = Head(torch.zeros(4, 2))
    chosen = kdflow.get_divergence("jsd") if divergence is None else divergence
    return ops.divergence_sum(torch.zeros(3, 2), head, torch.zeros(rows, 2), head, chosen, **options)


def test_wrong_inputs_are_errors_that_help() -> None:
    targets = torch.zeros(3, dtype=torch.long)
    with pytest.raises(
        TypeError, match=r"must be a kdflow\.Divergence, such as kdflow\.get_divergence\('jsd'\), not 'jsd'"
    ):
        call("jsd")
    with pytest.raises(TypeError, match=r"must be a kdflow\.Divergence"):
        call(type(kdflow.get_divergence("jsd")))
    with pytest.raises(ValueError, match="ce_weight > 0 needs targets"):
        call(ce_weight=0.5)
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"ce_weight must lie between 0 and 1, not {weight}"):
            call(ce_weight=weight, targets=targets)
    with pytest.raises(ValueError, match=r"same number of rows, not \[3, 2\]"):
        call(rows=2)
    with pytest.raises(ValueError, match=r"same number of rows, not \[3, 3\] and \[2\]"):
        call(ce_weight=0.5, targets=targets[:2])
    for temperature in (0.0, -1.0, 1e-45, math.inf, math.nan):
        with pytest.raises(
            ValueError, match=f"temperature must be a finite number of at least 1e-06, not {temperature}"
        ):
            call(temperature=temperature)
