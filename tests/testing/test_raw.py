"""Algorithms on raw tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdflow
from kdflow import Head, KdflowError
from kdflow.contracts import LossSum
from kdflow.testing import loss, side
from tests.support import reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_side_of_hidden_states_and_a_weight() -> None:
    hidden, weight, labels = random(4, 3), random(6, 3, seed=1), torch.tensor([5, 0, 2, 1])
    made = side({"hidden": hidden, "head": weight, "labels": labels})
    assert made.rows is hidden
    assert made.head == Head(weight)
    assert made.tokens.labels.tolist() == labels.tolist()
    assert made.tokens.targets.tolist() == [0, 1, 2, 3]
    assert made.tokens.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert made.tokens.cu_seqlens.tolist() == [0, 5]
    assert made.tokens.longest == 5
    assert made.response_of_row.tolist() == made.tokens.response_of_target.tolist() == [0, 0, 0, 0]
    assert made.embed is None


def test_a_side_of_logits_is_differentiated_as_they_are() -> None:
    logits = random(4, 6).requires_grad_()
    made = side({"logits": logits})
    assert made.head.vocab_size == 6
    assert made.head.parameters() == ()
    assert torch.equal(made.head.logits(made.rows), logits)
    assert torch.equal(made.head.logits(made.rows, slice(1, 3)), logits[:, 1:3])
    assert torch.equal(made.head.logits(made.rows, torch.tensor([4, 0])), logits[:, [4, 0]])
    assert made.head.logits(made.rows.bfloat16()).dtype == torch.float32
    assert made.tokens.labels.tolist() == [0, 0, 0, 0]


def test_a_side_keeps_its_head_its_responses_and_its_embeddings() -> None:
    head = Head(random(6, 3), random(6), scale=2.0, softcap=5.0, valid_vocab=5)

    def embed(ids: Tensor) -> Tensor:
        return head.weight[ids]

    made = side({"hidden": random(3, 3), "head": head, "response": torch.tensor([0, 0, 1]), "embed": embed})
    assert made.head is head
    assert made.response_of_row.tolist() == made.tokens.response_of_target.tolist() == [0, 0, 1]
    assert made.embed is embed
    assert side(made) is made


def test_the_digest_is_of_the_labels() -> None:
    one, two, three = (
        side({"logits": random(2, 6), "labels": torch.tensor(labels)}) for labels in ([1, 2], [1, 2], [2, 1])
    )
    assert one.tokens.digest == two.tokens.digest != three.tokens.digest


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"logits": torch.zeros(2, 3), "hidden": torch.zeros(2, 3), "head": torch.zeros(4, 3)},
        {"logits": torch.zeros(2, 3), "labls": torch.zeros(2)},
        {"labels": torch.zeros(2)},
        {"hidden": torch.zeros(2, 3)},
        {"logits": torch.zeros(2, 3), "head": torch.zeros(4, 3)},
        {"logits": torch.zeros(2, 3), "labels": torch.zeros(3)},
        {"logits": torch.zeros(2, 3), "response": torch.zeros(1)},
    ],
    ids=lambda raw: "+".join(raw),
)
def test_a_wrong_side_is_an_error_that_says_what_to_give(raw: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give 'hidden' and 'head', or 'logits'|need one entry for each of 2 rows"):
        side(raw)


def test_a_loss_is_the_sum_of_its_formula() -> None:
    student, teacher = random(5, 7), random(5, 7, seed=1)
    leaf = student.clone().requires_grad_()
    options = {"beta": 0.3, "temperature": 2.0}
    result = loss("jsd", options, {"logits": leaf}, {"logits": teacher})
    expected = reference.divergence("jsd", student.numpy(), teacher.numpy(), **options).sum()
    np.testing.assert_allclose(result.value.detach(), expected, rtol=1e-10)
    (gradient,) = torch.autograd.grad(result.value, leaf)
    np.testing.assert_allclose(
        gradient, reference.gradient("jsd", student.numpy(), teacher.numpy(), **options), atol=1e-8
    )


def test_logits_and_hidden_states_give_the_same_loss() -> None:
    student, teacher = (random(5, 3), random(8, 3, seed=1)), (random(5, 4, seed=2), random(8, 4, seed=3))
    labels = torch.arange(5)
    options = {"ce_weight": 0.5}
    plain = loss("reverse_kl", options, *({"logits": x @ w.T, "labels": labels} for x, w in (student, teacher)))
    whole = loss("reverse_kl", options, *({"hidden": x, "head": w, "labels": labels} for x, w in (student, teacher)))
    torch.testing.assert_close(plain.value, whole.value, rtol=1e-12, atol=1e-12)


def test_gradients_reach_what_requires_them() -> None:
    hidden, weight, bias = (
        random(5, 3).requires_grad_(),
        random(8, 3, seed=1).requires_grad_(),
        random(8).requires_grad_(),
    )
    result = loss("jsd", None, {"hidden": hidden, "head": Head(weight, bias)}, {"logits": random(5, 8)})
    result.value.backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in (hidden, weight, bias))


def test_options_may_be_left_out() -> None:
    sides = {"logits": random(2, 3)}, {"logits": random(2, 3, seed=1)}
    assert loss("jsd", None, *sides).value == loss("jsd", {}, *sides).value == loss("jsd", {"beta": 0.5}, *sides).value


def test_what_an_algorithm_needs_is_asked_for() -> None:
    with pytest.raises(ValueError, match="algorithm 'jsd' needs a teacher"):
        loss("jsd", {}, {"logits": random(2, 3)})
    with pytest.raises(KdflowError, match=r"algorithm 'jsdd' is not registered; did you mean 'jsd'\?"):
        loss("jsdd", {}, {"logits": random(2, 3)})


def test_an_algorithm_sees_what_it_needs_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(self: Any, *given: Any) -> LossSum:
        seen.append(given)
        return LossSum(given[0].rows.sum())

    one = {"hidden": random(2, 3), "head": random(5, 3), "embed": random(5, 3).__getitem__}
    for name in ("sft", "jsd", "dskd"):
        monkeypatch.setattr(kdflow.get_algorithm(name), "loss", look)
        loss(name, {}, one, one)
    told = [
        (teacher is not None, batch.teacher is not None, student.embed is not None) for student, teacher, batch in seen
    ]
    assert told == [(False, False, False), (True, True, False), (True, True, True)]
    assert [np.isnan(batch.sampled).tolist() for _, _, batch in seen] == [[True, True]] * 3


def test_embeddings_of_the_student_need_no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kdflow.get_algorithm("sft"), "needs", frozenset({"embeddings"}))
    one = {"hidden": random(2, 3), "head": random(5, 3), "embed": random(5, 3).__getitem__}
    assert loss("sft", {}, one, one).value == loss("sft", {}, one).value


def test_the_kits_are_where_the_documentation_says() -> None:
    assert {"check_algorithm", "check_divergence", "loss", "side"} <= set(dir(kdflow.testing))


@pytest.mark.parametrize("found", ["mean", "column", "none"])
def test_a_divergence_gives_a_number_for_each_row(found: str) -> None:
    class Wrong(kdflow.Divergence):
        name = "wrong"

        def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
            rows = (student_logits - teacher_logits).square().sum(-1)
            return {"mean": rows.mean(), "column": rows[:, None], "none": None}[found]  # type: ignore[return-value]

    shown = {"mean": r"the shape \[\]", "column": r"the shape \[4, 1\]", "none": "NoneType"}[found]
    with pytest.raises(KdflowError, match=f"'wrong': per_token must give a value for each row, .* gives {shown}"):
        Wrong()(random(4, 5), random(4, 5))


def test_what_attends_by_embeddings_says_that_it_needs_them() -> None:
    sides = [{"hidden": random(4, 6), "head": random(9, 6)} for _ in range(2)]
    with pytest.raises(ValueError, match="'dskd' needs 'hidden', 'head' and 'embed' of both sides"):
        kdflow.testing.loss("dskd", {}, *sides)
