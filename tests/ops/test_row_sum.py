"""Chunked sums equal unchunked ones, and hold only a chunk's logits."""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import InternalTorchDynamoError

from kdflow import Head
from kdflow.ops import chunk_rows, row_sum
from kdflow.ops.row_sum import even_rows_per_chunk
from tests.support.draw import quick
from tests.support.heads import Operand, Sizes, heads, parameters, plain_logits, plain_sum, trainable


def mixed(one: Tensor, other: Tensor, factor: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    """A function of two operands and three row arguments, finite where logits are -inf."""
    likely = one.logsumexp(-1) - one.softmax(-1)[:, 0] * table.sum(-1)
    return (
        factor * likely + one.softmax(-1).square().sum(-1) * other.softmax(-1).square().sum(-1) + labels.to(one.dtype)
    )


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(actual: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@st.composite
def columns_of(draw: st.DrawFn, vocab: int) -> Tensor | slice | None:
    kind = draw(st.sampled_from(("all", "slice", "ids")))
    if kind == "all":
        return None
    if kind == "slice":
        return draw(st.sampled_from((slice(None, 4), slice(1, None, 2), slice(-3, None))))
    ids = draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=vocab, unique=True))
    # One column that is no padding at least, without which there is no distribution.
    return torch.tensor([0, *[i for i in ids if i]])


def test_no_rows_have_a_chunk_too() -> None:
    assert even_rows_per_chunk(0, 1000) > 0


@quick
@given(data=st.data(), count=st.integers(1, 11), chunk=st.integers(1, 13), seed=st.integers(0, 2**31))
def test_equals_the_unchunked_sum(data: st.DataObject, count: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    operands: list[Operand] = []
    for vocab, hidden in ((7, 3), (9, 4)):
        head = data.draw(heads(vocab, hidden, generator))
        columns = data.draw(columns_of(vocab))
        if isinstance(columns, slice) and columns == slice(-3, None) and head.valid_vocab == vocab - 2:
            columns = slice(-4, None)
        operands.append((torch.randn(count, hidden, generator=generator, dtype=torch.float64), head, columns))
    row_args = [random(count, seed=1), torch.arange(count), random(count, 2, seed=2)]
    leaves = trainable(*parameters(operands), *row_args)
    with chunk_rows(chunk):
        value = row_sum(mixed, operands, row_args)
    expected = plain_sum(mixed, operands, row_args)
    same(value, expected)
    same(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_slice_of_columns_knows_padding_in_every_dtype(dtype: torch.dtype) -> None:
    """bf16 has no 257, fp16 no 70001."""
    valid = 70001 if dtype == torch.float16 else 301
    head, columns = Head(torch.zeros(valid + 99, 1, dtype=dtype), valid_vocab=valid), slice(200, None)
    assert head.logits(torch.ones(1, 1, dtype=dtype), columns).isneginf().sum() == 99


@pytest.mark.parametrize("columns", [None, slice(1, 4), slice(None, None, 2), torch.tensor([5, 0, 2])], ids=str)
def test_a_head_is_its_formula(columns: Tensor | slice | None) -> None:
    head = Head(random(6, 3), random(6), scale=0.5, softcap=2.0, valid_vocab=4)
    rows = random(5, 3, seed=1)
    same(head.logits(rows, columns), plain_logits(rows, head, columns))
    assert head.logits(rows).abs()[:, :4].max() < 2.0
    assert head.logits(rows)[:, 4:].isneginf().all()
    assert Head(random(6, 3).bfloat16()).logits(rows.bfloat16()).dtype == torch.float32


# --- chunks -----------------------------------------------------------------------------------------------------------


def chunks(count: int, groups: Tensor | None = None, vocab: int = 2) -> list[list[int]]:
    """Which rows ``fn`` sees together."""
    seen: list[list[int]] = []

    def record(logits: Tensor, index: Tensor) -> Tensor:
        seen.append(index.tolist())
        assert len(logits) == len(index)
        return logits.sum(-1)

    row_sum(record, [(torch.zeros(count, 1), Head(torch.zeros(vocab, 1)), None)], [torch.arange(count)], groups)
    return seen


def test_chunk_rows_holds_inside_its_block_and_nests() -> None:
    assert chunks(5) == [[0, 1, 2, 3, 4]]
    with chunk_rows(2):
        assert chunks(5) == [[0, 1], [2, 3], [4]]
        with chunk_rows(3):
            assert chunks(5) == [[0, 1, 2], [3, 4]]
            with chunk_rows(None):
                assert chunks(5) == [[0, 1, 2, 3, 4]]
        assert chunks(4) == [[0, 1], [2, 3]]
        with pytest.raises(RuntimeError, match="inside"), chunk_rows(1):
            raise RuntimeError("inside")
        assert chunks(3) == [[0, 1], [2]]
    assert chunks(3) == [[0, 1, 2]]


def test_the_default_chunk_is_bounded_by_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("kdflow.ops.row_sum")
    assert module._DEFAULT_ELEMENTS * 4 <= 2**28  # bytes in fp32
    monkeypatch.setattr(module, "_DEFAULT_ELEMENTS", 12)
    assert chunks(5, vocab=4) == [[0, 1, 2], [3, 4]]
    assert chunks(2, vocab=100) == [[0], [1]]


@pytest.mark.parametrize("rows", [0, -1])
def test_a_chunk_has_a_row_at_least(rows: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 row, not {rows}"), chunk_rows(rows):
        pass


@quick
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), chunk=st.integers(1, 9), first=st.integers(0, 3))
def test_groups_never_straddle_chunks(sizes: list[int], chunk: int, first: int) -> None:
    groups = torch.tensor([first + 2 * number for number, size in enumerate(sizes) for _ in range(size)])
    with chunk_rows(chunk):
        seen = chunks(len(groups), groups)
    assert [row for rows in seen for row in rows] == list(range(len(groups)))
    held = [set(groups[rows].tolist()) for rows in seen]
    assert all(one.isdisjoint(other) for one, other in pairwise(held))
    assert all(len(rows) <= chunk or len(those) == 1 for rows, those in zip(seen, held, strict=True))
    # And no chunk could have held the group that follows it.
    for (rows, _), (_, following) in pairwise(zip(seen, held, strict=True)):
        assert len(rows) + int((groups == min(following)).sum()) > chunk


def test_sums_over_groups_equal_the_unchunked_ones() -> None:
    """A function that mixes the rows of a group, as merged spans do."""
    groups = torch.tensor([0, 0, 0, 1, 2, 2, 4])
    rows, weight = random(7, 3).requires_grad_(), random(5, 3, seed=1).requires_grad_()

    def centred(logits: Tensor, group: Tensor) -> Tensor:
        mates = (group[:, None] == group).to(logits.dtype)
        return (logits - mates @ logits / mates.sum(-1, keepdim=True)).square().sum(-1) + logits.logsumexp(-1)

    expected = torch.autograd.grad(centred(rows @ weight.T, groups).sum(), (rows, weight))
    for chunk in (1, 2, 3, 4, 7):
        with chunk_rows(chunk):
            value = row_sum(centred, [(rows, Head(weight), None)], [groups], groups)
        same(torch.autograd.grad(value, (rows, weight)), expected)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_no_rows_give_zero_and_gradients_of_zero() -> None:
    rows, weight, bias, factor = (x.requires_grad_() for x in (random(0, 3), random(5, 3), random(5), random(0)))

    def scaled(logits: Tensor, factor: Tensor) -> Tensor:
        return factor * logits.logsumexp(-1)

    for groups in (None, torch.zeros(0, dtype=torch.long)):
        value = row_sum(scaled, [(rows, Head(weight, bias), None)], [factor], groups)
        assert value.shape == ()
        assert value == 0
        leaves = rows, weight, bias, factor
        for gradient, leaf in zip(torch.autograd.grad(value, leaves), leaves, strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


def test_a_tuple_is_summed_and_its_first_differentiated() -> None:
    rows, weight = random(5, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()

    def several(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return logits.logsumexp(-1), logits.square().sum(-1), (logits.argmax(-1) == 0).float()

    with chunk_rows(2):
        value, squares, hits = row_sum(several, [(rows, Head(weight), None)])
    logits = rows @ weight.T
    same((value, squares.double()), (logits.logsumexp(-1).sum(), logits.square().sum()))
    assert hits == (logits.argmax(-1) == 0).sum()
    assert value.requires_grad
    assert not squares.requires_grad
    assert not hits.requires_grad
    expected = torch.autograd.grad(logits.logsumexp(-1).sum(), (rows, weight))
    same(torch.autograd.grad(value, (rows, weight)), expected)


def test_without_gradients_none_are_computed() -> None:
    rows, weight = random(5, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    seen: list[bool] = []

    def watched(logits: Tensor) -> Tensor:
        seen.append(logits.requires_grad or torch.is_grad_enabled())
        return logits.logsumexp(-1)

    with torch.no_grad():
        value = row_sum(watched, [(rows, Head(weight), None)])
        same(value, (rows @ weight.T).logsumexp(-1).sum())
    assert not value.requires_grad
    assert seen == [False]
    value = row_sum(watched, [(rows.detach(), Head(weight.detach()), None)])
    assert not value.requires_grad
    assert seen == [False, False]


def test_only_what_requires_a_gradient_gets_one() -> None:
    rows, weight, bias = random(5, 3), random(4, 3, seed=1), random(4, seed=2).requires_grad_()
    value = row_sum(lambda logits: logits.logsumexp(-1), [(rows, Head(weight, bias), None)])
    value.backward()
    assert rows.grad is None
    assert weight.grad is None
    assert bias.grad is not None
    same(bias.grad, (rows @ weight.T + bias).softmax(-1).sum(0).detach())


def test_an_operand_that_the_function_ignores_gets_zeros() -> None:
    rows, weight, other = random(5, 3).requires_grad_(), random(4, 3, seed=1), random(5, 3, seed=2).requires_grad_()
    value = row_sum(lambda one, two: one.logsumexp(-1), [(rows, Head(weight), None), (other, Head(weight), None)])
    assert torch.equal(torch.autograd.grad(value, other, materialize_grads=True)[0], torch.zeros_like(other))


def test_a_head_that_both_operands_share_gets_both_gradients() -> None:
    rows, others, weight = random(5, 3), random(5, 3, seed=1), random(4, 3, seed=2).requires_grad_()
    operands: list[Operand] = [(rows, Head(weight), None), (others, Head(weight), slice(0, 2))]

    def product(one: Tensor, two: Tensor) -> Tensor:
        return one.logsumexp(-1) * two.sum(-1)

    with chunk_rows(2):
        value = row_sum(product, operands)
    same(torch.autograd.grad(value, weight), torch.autograd.grad(plain_sum(product, operands), weight))


@pytest.mark.parametrize("factor", [0.5, -3.0, 1 / 3, 0.0])
def test_a_factor_on_the_loss_is_a_factor_on_gradients(factor: float) -> None:
    rows, weight = random(5, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()

    def value() -> Tensor:
        with chunk_rows(2):
            result: Tensor = row_sum(lambda logits: logits.logsumexp(-1), [(rows, Head(weight), None)])
        return result

    whole = torch.autograd.grad(value(), (rows, weight))
    same(torch.autograd.grad(value() * factor, (rows, weight)), tuple(gradient * factor for gradient in whole))


@pytest.mark.parametrize("factor", [1.0, 1 / 3, 1 / 3001])
def test_bfloat16_is_as_good_as_plain_autograd(factor: float) -> None:
    rows, weight = random(256, 32).bfloat16().requires_grad_(), random(500, 32, seed=1).bfloat16().requires_grad_()
    labels = torch.arange(256)

    def nll(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def gradients(value: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(value * factor, (rows, weight))
        assert all(gradient.dtype == torch.bfloat16 for gradient in found)
        return found

    precise = [x.detach().double().requires_grad_() for x in (rows, weight)]
    exact = torch.autograd.grad(nll(precise[0] @ precise[1].T, labels).sum() * factor, precise)
    plain = gradients(nll((rows @ weight.T).float(), labels).sum())
    for chunk in (1, 7, 64, 256):
        with chunk_rows(chunk):
            value = row_sum(nll, [(rows, Head(weight), None)], [labels])
        assert value.dtype == torch.float32
        for ours, theirs, truth in zip(gradients(value), plain, exact, strict=True):
            # One rounding more than autograd's, but all of it noise: no factor that is off for every element.
            assert (ours - truth).norm() <= 1.15 * (theirs - truth).norm()
            assert abs((ours.double() * truth).sum() / truth.square().sum() - 1) < 5e-4


def test_sums_over_many_chunks_are_kept_in_fp32() -> None:
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    with chunk_rows(1):
        value = row_sum(lambda logits: logits.sum(-1), [(torch.ones(512, 1, dtype=torch.bfloat16), Head(weight), None)])
    assert torch.autograd.grad(value, weight)[0].flatten().tolist() == [512.0, 512.0]  # bf16 sums of 1 stop at 256


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    rows = random(5, 3).requires_grad_()
    value = row_sum(lambda logits: logits.logsumexp(-1), [(rows, Head(random(4, 3)), None)])
    with pytest.raises(RuntimeError, match="can be differentiated once, and create_graph=True asks for more"):
        torch.autograd.grad(value, rows, create_graph=True)
    assert torch.autograd.grad(value, rows)[0].abs().sum() > 0


@pytest.mark.parametrize("chunk", [1, 256])
def test_autocast_changes_neither_the_sum_nor_its_gradients(chunk: int) -> None:
    rows, weight = (x.float().requires_grad_() for x in (random(256, 8), random(50, 8, seed=1)))

    def found() -> tuple[Tensor, ...]:
        with chunk_rows(chunk):
            value = row_sum(lambda logits: logits.logsumexp(-1), [(rows, Head(weight), None)])
        return value.detach(), *torch.autograd.grad(value, (rows, weight))

    with torch.autocast("cpu", torch.bfloat16):
        inside = found()
    for actual, expected in zip(inside, found(), strict=True):
        assert torch.equal(actual, expected)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_nothing_of_the_size_of_all_logits_is_ever_made() -> None:
    count, vocab, hidden, chunk = 2048, 5000, 16, 64
    rows, weight = random(count, hidden, dtype=torch.float32), random(vocab, hidden, seed=1, dtype=torch.float32)
    leaves = trainable(rows, weight)
    labels = torch.arange(count)
    with Sizes() as sizes, chunk_rows(chunk):
        value = row_sum(
            lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
            [(rows, Head(weight), None)],
            [labels],
        )
        torch.autograd.grad(value / count, leaves)
    wide = [shape for shape in sizes.shapes if vocab in shape]
    assert torch.Size((chunk, vocab)) in wide
    assert torch.Size((vocab, hidden)) in wide
    assert max(shape.numel() for shape in sizes.shapes) <= chunk * vocab


# --- wrong inputs -----------------------------------------------------------------------------------------------------


def test_numbers_of_rows_must_agree() -> None:
    head = Head(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"same number of rows, not \[5, 4\] and \[\]"):
        row_sum(lambda one, two: one.sum(-1), [(torch.zeros(5, 3), head, None), (torch.zeros(4, 3), head, None)])
    with pytest.raises(ValueError, match=r"same number of rows, not \[5\] and \[6\]"):
        row_sum(lambda one, arg: one.sum(-1), [(torch.zeros(5, 3), head, None)], [torch.zeros(6)])
    with pytest.raises(ValueError, match=r"group of each of 5 rows, not have the shape \[4\]"):
        row_sum(lambda one: one.sum(-1), [(torch.zeros(5, 3), head, None)], groups=torch.zeros(4))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_function_on_which_the_compiler_fails_is_computed_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, backward: bool
) -> None:
    tries = []

    def fail(*_: Any) -> Any:
        raise InternalTorchDynamoError("PassManager::run failed")

    def compiled(fn: Any, heads: Any, columns: Any, tensors: list[Tensor]) -> Tensor:
        tries.append(fn)
        values = tensors[0].sum(-1) if backward else fail()
        values.register_hook(fail)
        return values

    module = importlib.import_module("kdflow.ops.row_sum")
    monkeypatch.setattr(module, "_compiled_values", lambda: compiled)
    monkeypatch.setattr(module, "_failures", [])
    rows = torch.arange(12.0).view(4, 3).requires_grad_()
    operand = (rows, Head(torch.eye(3)), None)
    with chunk_rows(2), caplog.at_level("WARNING", "kdflow"):
        for _ in range(2):
            rows.grad = None
            total = row_sum(lambda logits: logits.square().sum(-1), [operand], compiled=True)
            total.backward()
            assert total == rows.square().sum()
            assert torch.equal(rows.grad, 2 * rows)
    assert len(tries) == len(caplog.records) == 1
    assert "PassManager::run failed" in caplog.text


def test_without_the_compiler_chunks_are_as_small_as_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled chunk keeps one copy of its logits where a plain one keeps many."""

    def fails(*_: Any) -> Any:
        raise InternalTorchDynamoError("PassManager::run failed")

    module, taken = importlib.import_module("kdflow.ops.row_sum"), []

    def squares(logits: Tensor) -> Tensor:
        taken.append(len(logits))
        return logits.square().sum(-1)

    monkeypatch.setattr(module, "_compiled_values", lambda: fails)
    monkeypatch.setattr(module, "_failures", [])
    monkeypatch.setattr(module, "_DEFAULT_ELEMENTS", 6)
    row_sum(squares, [(torch.ones(5, 3), Head(torch.eye(3)), None)], compiled=True)
    assert taken == [2, 2, 1]
