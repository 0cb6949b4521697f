"""The algorithms between tokenizers: memory, what their options do, and rows that say nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import kdflow
from kdflow import Head, ops
from kdflow.algorithms import dskd
from kdflow.algorithms.overlap import SharedColumns
from kdflow.contracts import ModelSpec, Pair, TargetAlignment, Tokens
from kdflow.files import replacing
from kdflow.testing.raw import make
from kdflow.tokenizers.huggingface import from_transformers
from kdflow.tokenizers.nearest import nearest_ids
from kdflow.tokenizers.vocabulary import shared_ids
from tests.support.heads import Sizes

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("uld", {"ce_weight": 0.5}),
    ("min_edit", {}),
    ("overlap", {}),
    ("dskd", {"alignment": "cma", "initialise": "random"}),
    ("dskd", {"alignment": "eta", "initialise": "random"}),
]


@pytest.mark.parametrize(("name", "options"), METHODS, ids=str)
def test_no_logits_of_all_rows_are_ever_held(name: str, options: dict[str, Any]) -> None:
    vocabulary, rows, chunk = 151_936, 24, 2
    generator = torch.Generator().manual_seed(0)
    sides = []
    for hidden in (4, 6):
        head = torch.randn(vocabulary, hidden, generator=generator)
        labels, inputs = torch.randint(0, vocabulary, (2, rows), generator=generator)
        states = torch.randn(rows, hidden, generator=generator)
        sides.append({"hidden": states, "head": head, "labels": labels, "inputs": inputs, "embed": head.__getitem__})
    for tensor in ("hidden", "head"):
        sides[0][tensor].requires_grad_()
    spans = np.concatenate([np.arange(8), 8 + np.arange(rows - 8) // 2])  # of one token and of two
    alignment = TargetAlignment(spans, spans, np.stack([np.arange(rows)] * 2, axis=1))
    with ops.chunk_rows(chunk), Sizes() as seen:
        kdflow.testing.loss(name, options, *sides, alignment=alignment).value.backward()
    heads = {torch.Size([vocabulary, width]) for width in (4, 6)} | {
        torch.Size([width, vocabulary]) for width in (4, 6)
    }
    assert max(shape.numel() for shape in seen.shapes - heads) == chunk * vocabulary
    assert sides[0]["head"].grad is not None


def test_dskd_in_bf16_gives_what_fp64_gives() -> None:
    """Its divergence in the teacher's space goes through the kernel, with a head that learns nothing."""
    generator, results = torch.Generator().manual_seed(3), []
    drawn = [[torch.randn(*shape, generator=generator).bfloat16() for shape in ((24, hidden), (997, hidden))]
             for hidden in (16, 32)]  # fmt: skip
    labels = torch.randint(0, 997, (24,), generator=generator)
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(0)  # of the projectors
        sides = [{"hidden": rows.to(dtype), "head": head.to(dtype), "labels": labels} for rows, head in drawn]
        leaves = [sides[0][name].requires_grad_() for name in ("hidden", "head")]
        options = {"alignment": "same", "initialise": "random"}
        loss = kdflow.testing.loss("dskd", options, *sides).value
        results.append([x.double() for x in (loss.detach(), *torch.autograd.grad(loss, leaves))])
    for found, exact in zip(*results, strict=True):
        assert (found - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given", ["hidden", "logits"])
def test_overlap_sees_the_shared_tokens_alone(dtype: torch.dtype, given: str) -> None:
    """In bf16 through the kernel, over those columns of the heads; the gradient of all others is zero."""
    generator = torch.Generator().manual_seed(2)
    rows, heads = zip(
        *((torch.randn(6, width, generator=generator), torch.randn(size, width, generator=generator))
          for size, width in ((40, 8), (50, 12))), strict=True,
    )  # fmt: skip
    shared = torch.tensor([3, 1, 30]), torch.tensor([0, 45, 7])
    leaves = [x.to(dtype).requires_grad_() for x in (rows[0], heads[0])]
    others = [x.to(dtype) for x in (rows[1], heads[1])]
    given_rows = [{"hidden": r, "head": h} if given == "hidden" else {"logits": r @ h.T} for r, h in (leaves, others)]
    module = SharedColumns(ModelSpec(8, 40), ModelSpec(12, 50))
    module.student, module.teacher = shared
    found = kdflow.testing.loss("overlap", {}, *given_rows, module=module).value
    exact = [x.detach().double().requires_grad_() for x in leaves]
    ours, theirs = exact[0] @ exact[1].T, (others[0].double() @ others[1].double().T)
    expected = kdflow.get_divergence("forward_kl")(ours[:, shared[0]], theirs[:, shared[1]]).sum()
    pairs = zip([found, *torch.autograd.grad(found, leaves)], [expected, *torch.autograd.grad(expected, exact)],
                strict=True)  # fmt: skip
    for one, other in pairs:
        assert (one.double() - other).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-12) * other.norm()


def test_padding_is_no_shared_token() -> None:
    ours, theirs = shared_ids(ModelSpec(1, 9, Head(torch.ones(9, 1), valid_vocab=6)), ModelSpec(1, 8))
    assert ours.tolist() == theirs.tolist() == list(range(6))
    specs = ModelSpec(1, 9, Head(torch.ones(9, 1), valid_vocab=6)), ModelSpec(1, 8)
    assert nearest_ids(*specs).tolist() == [*range(6), -1, -1]


def test_a_map_that_is_kept_is_whole_and_others_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "map.npy"
    with replacing(path) as file:
        np.save(file, np.arange(3))
    (tmp_path / "plain").touch()
    assert np.load(path).tolist() == [0, 1, 2]
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(file.name for file in tmp_path.iterdir()) == ["map.npy", "plain"]


def test_overlap_of_vocabularies_that_share_nothing_says_what_to_use() -> None:
    specs = []
    for letters in ("ab", "xyz"):
        backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
        backend.decoder = decoders.ByteLevel()
        tokenizer = from_transformers(PreTrainedTokenizerFast(tokenizer_object=backend))
        specs.append(ModelSpec(4, len(letters), tokenizer=tokenizer))
    with pytest.raises(kdflow.KdflowError, match="these share none; use uld, or dskd with alignment: cma"):
        SharedColumns(*specs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0])
def test_min_edit_keeps_the_teachers_rest_however_small(dtype: torch.dtype, gap: float) -> None:
    """Of a teacher that is sure of a token, the rest is far less than what a sum of all can tell from 1."""
    teacher = torch.zeros(1, 50, dtype=dtype)
    teacher[0, 1] = gap
    student, label = torch.linspace(-1, 1, 50, dtype=dtype)[None], torch.tensor([1])
    sides = ({"logits": one, "labels": label} for one in (student, teacher))
    found = kdflow.testing.loss("min_edit", {"divergence": "reverse_kl", "top_k": 10}, *sides).value
    ours, theirs = (one.double().log_softmax(-1)[0] for one in (student, teacher))
    kept = teacher[0].topk(10).indices.tolist()
    rest = [i for i in range(50) if i not in kept]
    expected = (ours[kept].exp() * (ours[kept] - theirs[kept])).sum()
    expected += ours[rest].exp().sum() * (ours[rest].logsumexp(0) - theirs[rest].logsumexp(0))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["min_edit", "overlap"])
def test_the_chosen_divergence_is_scaled_where_it_says_so(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    sides = [{"logits": torch.randn(3, 9, generator=generator), "labels": torch.arange(3)} for _ in range(2)]
    plain, scaled = (
        kdflow.testing.loss(
            name, {"temperature": 2.0, "divergence": {"name": "jsd", "scale_by_temperature_squared": squared}}, *sides
        ).value
        for squared in (False, True)
    )
    torch.testing.assert_close(scaled, 4 * plain)


def test_sorted_probabilities_are_never_closer_than_equal() -> None:
    student = torch.randn(500, 9, generator=torch.Generator().manual_seed(6))
    teacher = torch.cat([student, torch.full((500, 4), -200.0)], dim=1)
    assert (kdflow.get_divergence("sorted_l1")(student, teacher) >= 0).all()


def test_merged_spans_take_part_unless_they_are_skipped() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(3, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    sides = (
        {"logits": student, "labels": torch.tensor([1, 2, 3])},
        {"logits": teacher[:2], "labels": torch.tensor([4, 5])},
    )
    alignment = TargetAlignment(np.array([0, 0, 1]), np.array([0, 1]))
    p, q = student.softmax(-1), teacher.softmax(-1)

    def distance(one: Tensor, other: Tensor) -> Tensor:
        return (one.sort().values - other.sort().values).abs().sum()

    single = distance(p[2], q[1])
    merged = distance(p[0, 1] * p[1], q[0])
    found = kdflow.testing.loss("uld", {}, *sides, alignment=alignment).value
    torch.testing.assert_close(found, single + merged)
    skipped = kdflow.testing.loss("uld", {"merge": "skip"}, *sides, alignment=alignment).value
    torch.testing.assert_close(skipped, single)


def test_spans_that_are_left_out_leave_no_gap_in_a_chunk() -> None:
    """Numbers of the spans that are left run on, though a chunk holds the first and the last span alone."""
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    spans = np.array([0, 1, 1, 2, 2, 3, 3, 4])
    side = {"logits": logits, "labels": torch.zeros(8, dtype=torch.long)}
    ends = {"logits": logits.flip(1)[[0, 7]], "labels": torch.zeros(2, dtype=torch.long)}
    found = kdflow.testing.loss(
        "uld", {"merge": "skip"}, side, ends, alignment=TargetAlignment(spans, np.array([0, 4]))
    )
    torch.testing.assert_close(found.value, torch.zeros((), dtype=torch.float64))


def test_the_tail_beyond_the_top_is_one_more_outcome() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(4)
    found = kdflow.testing.loss("min_edit", {"top_k": 2}, {"logits": student, "labels": labels},
                                {"logits": teacher, "labels": labels}).value  # fmt: skip
    expected = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student.softmax(-1), teacher.softmax(-1), strict=True):
        top = t.topk(2).indices
        p, q = (torch.cat([side[top], (1 - side[top].sum())[None]]) for side in (t, s))
        expected += (p * (p / q).log()).sum()
    torch.testing.assert_close(found, expected)


def test_an_unaligned_position_learns_its_reference_token_with_min_edit_and_nothing_with_overlap() -> None:
    logits, labels = torch.randn(2, 5, dtype=torch.float64), torch.tensor([3, 1])
    nothing = TargetAlignment(np.array([-1, -1]), np.array([-1, -1]), np.zeros((0, 2), np.int64))
    sides = {"logits": logits, "labels": labels}, {"logits": torch.randn(2, 5, dtype=torch.float64)}
    found = kdflow.testing.loss("min_edit", {}, *sides, alignment=nothing).value
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    assert kdflow.testing.loss("overlap", {}, *sides, alignment=nothing).value == 0
    assert kdflow.testing.loss("uld", {}, *sides, alignment=nothing).value == 0


@pytest.mark.parametrize(
    ("name", "options"), [("overlap", {}), ("dskd", {"alignment": "eta", "initialise": "random"})], ids=str
)
def test_rows_of_the_teacher_that_are_not_aligned_one_to_one_are_left_out_and_change_nothing(
    name: str, options: dict[str, Any]
) -> None:
    spans = np.array([0, 1, 2, 2, 3]), np.array([0, 1, 1, 2, 3, -1])
    pair = Pair("x", *(Tokens(np.arange(len(side) + 1), np.arange(len(side)), 0 * side) for side in spans),
                TargetAlignment(*spans))  # fmt: skip
    kept = make(name, options).prepare(pair)
    assert kept.teacher is not None
    assert kept.teacher.targets.tolist() == [0, 4]
    generator, results = torch.Generator().manual_seed(8), []
    hidden, head, of_teacher, its_head = (torch.randn(size, generator=generator) for size in
                                          ((5, 8), (23, 8), (6, 12), (23, 12)))  # fmt: skip
    for one in (pair, kept):
        assert one.teacher is not None
        torch.manual_seed(0)  # of the projectors
        student = {"hidden": hidden.clone().requires_grad_(), "head": head.clone().requires_grad_()}
        teacher = {"hidden": of_teacher[one.teacher.targets], "head": its_head}
        found = kdflow.testing.loss(name, options, student, teacher, alignment=one.alignment)
        found.value.backward()
        results.append([found.value, student["hidden"].grad, student["head"].grad, dict(found.metrics)])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert results[0][1].any()
    assert make("dskd", {"alignment": "cma"}).prepare(pair) is pair


def test_min_edits_kd_is_of_the_taught_positions_alone() -> None:
    """The third position has no partner, and the second one whose token is another."""
    student, teacher = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    path = TargetAlignment(np.array([0, 1, -1]), np.array([0, 1, -1]), np.array([[0, 0], [1, 1]]))
    labels = torch.tensor([2, 3, 4])
    for theirs, fit in (([2, 5, 0], 1), ([1, 5, 0], 0)):
        sides = {"logits": student, "labels": labels}, {"logits": teacher, "labels": torch.tensor(theirs)}
        found = kdflow.testing.loss("min_edit", {"top_k": 7, "ce_weight": 0.25}, *sides, alignment=path)
        ce = torch.nn.functional.cross_entropy(student, labels, reduction="none")
        kd = kdflow.get_divergence("forward_kl")(student[:fit], teacher[:fit]).sum()
        torch.testing.assert_close(found.value, 0.75 * (kd + ce[fit:].sum()) + 0.25 * ce.sum())
        expected = {"kd": (kd, float(fit)), "taught": (torch.tensor(fit).double(), 3.0), "ce": (ce.sum(), 3.0)}
        torch.testing.assert_close(dict(found.metrics), expected)


def test_deviations_are_of_a_response_alone() -> None:
    values = torch.randn(5, 3, dtype=torch.float64)
    found = dskd.deviation(values, torch.tensor([4, 4, 7, 7, 7]))
    torch.testing.assert_close(found[:, 0], torch.stack([values[:2].std()] * 2 + [values[2:].std()] * 3))


def test_the_best_map_takes_one_head_to_the_other() -> None:
    """Where a map between the spaces exists under which logits agree, it is found."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    exact = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    source = target @ exact.T  # logits of h through source are those of h @ exact through target
    torch.testing.assert_close(dskd.best_map(source, target), exact)


def test_the_best_map_counts_the_scales_of_the_heads() -> None:
    """Granite divides its logits, and Cohere multiplies them."""
    generator = torch.Generator().manual_seed(4)
    weight, more, states = (torch.randn(size, generator=generator) for size in ((50, 4), (50, 2), (3, 4)))
    teacher, student = Head(weight, scale=1 / 8), Head(torch.cat([weight, more], 1), scale=0.25)
    projectors = make("dskd", {}).build(ModelSpec(6, 50, student), ModelSpec(4, 50, teacher))
    assert projectors is not None
    torch.testing.assert_close(student.logits(projectors.t2s(states)), teacher.logits(states), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("options", "message"), [
    ({"alignment": "cmaa"}, "'same', 'cma' or 'eta'"), ({"divergence": "forward_k"}, "did you mean 'forward_kl'"),
    ({"projector_learning_rate": 0}, "greater than 0"), ({"divergence": {"name": "jsd", "bet": 1}}, "bet"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(kdflow.KdflowError, match=message):
        kdflow.testing.loss("dskd", options, {"logits": torch.zeros(1, 2)}, {"logits": torch.zeros(1, 2)})
