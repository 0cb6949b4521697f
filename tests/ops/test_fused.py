"""The kernels against fp64, and the head around them: a CPU's, and Triton's, interpreted where there is no GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kdflow
from kdflow import Divergence, Head, ops
from kdflow.ops import cpu_kernel, forms, fused
from kdflow.ops.distillation import Distillation
from kdflow.ops.divergence_sum import divergence_parts, form_of
from kdflow.ops.tuning import Blocks
from tests.support.heads import plain_logits, relative_errors

CUDA, TRITON = torch.cuda.is_available(), importlib.util.find_spec("triton") is not None

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what the kernel then masks

DIVERGENCES: list[tuple[str, dict[str, Any]]] = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    *(("jsd", {"beta": beta}) for beta in (0.0, 1e-6, 0.3, 1.0)),
    *((name, {"skew": skew}) for name in ("skew_kl", "skew_reverse_kl") for skew in (0.0, 0.1, 0.9)),
    *(("adaptive_kl", {"mu": mu}) for mu in (0.0, 0.5, 0.95, 1.0)),
    ("tvd", {}),
]
every_divergence = pytest.mark.parametrize(
    ("name", "options"),
    DIVERGENCES,
    ids=["-".join(map(str, (name, *options.values()))) for name, options in DIVERGENCES],
)
VOCAB, ROWS = 77, 3


@pytest.fixture(autouse=True, params=["triton", "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernel under test runs; Triton's has blocks of 32 columns, so that there are whole ones and a part."""
    launch = cpu_kernel.launch
    if request.param == "triton":
        if not TRITON:
            pytest.skip("needs Triton")
        kernels = importlib.import_module("kdflow.ops.kernels")
        launch = functools.partial(kernels.launch, blocks=Blocks(4, 1))
    monkeypatch.setattr(fused, "kernel_of", lambda device: launch)
    return torch.device("cuda" if CUDA and request.param == "triton" else "cpu")


def draw(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    """Products as the kernel gets them, in bf16."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def kernel(
    s: Tensor, student: Head, t: Tensor, teacher: Head, divergence: Divergence, labels: Tensor | None, ce_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences, cross-entropies and the gradient of their weighted sum for the products ``s``."""
    launch = fused.kernel_of(torch.device("cpu"))  # the fixture's
    device = torch.device("cuda" if CUDA and launch is not cpu_kernel.launch else "cpu")
    products, others = (fused.matrix(*x.shape, x.to(device)).copy_(x) for x in (s, t))
    kd, ce = torch.full((len(s),), math.nan, device=device), torch.zeros(len(s), device=device)
    form = form_of(divergence)
    assert form is not None
    labels = None if labels is None else labels.to(device)
    work = Distillation(student, others, teacher, divergence, form, labels, ce_weight, differentiate=True)
    launch(products, others, labels, kd, ce, work, True)
    return (kd * work.numbers().factor).cpu(), ce.cpu(), products.cpu()


def exact(
    s: Tensor, student: Head, t: Tensor, teacher: Head, divergence: Divergence, labels: Tensor | None, ce_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in fp64, by autograd."""
    leaf = s.double().requires_grad_()
    # Products are rows of a head whose weight is the identity.
    logits, others = (
        plain_logits(x, Head(torch.eye(x.shape[1], dtype=torch.float64), None, head.scale, head.softcap))
        for x, head in ((leaf, student), (t.double(), teacher))
    )
    valid = student.valid_vocab or s.shape[1]
    shared = min(valid, teacher.valid_vocab or t.shape[1])
    kd = divergence(logits[:, :shared], others[:, :shared])
    ce = torch.zeros(len(s), dtype=torch.float64)
    if labels is not None:
        ce = torch.nn.functional.cross_entropy(logits[:, :valid], labels, reduction="none")
    loss = ce if ce_weight == 1.0 else (1 - ce_weight) * kd + ce_weight * ce
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return kd.detach(), ce.detach(), gradient


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_tokens_beyond_the_head_are_none(name: str) -> None:
    """A tokenizer may have ids that the head has no rows for, as where one was added and the head not resized."""
    s, t = (torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(2))
    heads = [Head(torch.empty(VOCAB, 0), valid_vocab=valid) for valid in (None, VOCAB + 3)]
    labels = torch.arange(5)
    plain, longer = (kernel(s, head, t, head, kdflow.get_divergence(name), labels, 0.5) for head in heads)
    for one, other in zip(plain, longer, strict=True):
        assert torch.equal(one, other)


def check(
    divergence: Divergence,
    s: Tensor,
    t: Tensor,
    student: Head | None = None,
    teacher: Head | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
) -> None:
    """The kernel's values within 1e-5, and its gradients within what bf16 keeps; on a GPU, tanh is off by 2^-11."""
    heads = [head or Head(torch.empty(x.shape[1], 0)) for head, x in ((student, s), (teacher, t))]
    arguments: Any = s, heads[0], t, heads[1], divergence, labels, ce_weight
    kd, ce, gradient = kernel(*arguments)
    expected_kd, expected_ce, expected_gradient = exact(*arguments)
    cap = max(head.softcap or 0.0 for head in heads)
    off = cap * 2**-10 if CUDA and fused.kernel_of(s.device) is not cpu_kernel.launch else 0.0
    torch.testing.assert_close(kd.double(), expected_kd, rtol=2e-5, atol=2e-6 + off)
    torch.testing.assert_close(ce.double(), expected_ce, rtol=1e-5, atol=1e-6 + off)
    most = float(expected_gradient.abs().max())
    bound = 2e-6 * max(1.0, 10.0 * most)
    bound += off * most
    if cap and divergence.name == "tvd":  # what it is made of is kept in fp16 between two passes
        bound += 2**-12 * most
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-7 + off, atol=bound)


def head(vocab: int, **options: Any) -> Head:
    return Head(torch.empty(vocab, 0), **options)


@every_divergence
def test_equals_fp64(name: str, options: dict[str, Any]) -> None:
    scales = torch.tensor([[0.01], [2.0], [20.0]])
    s, t = ((draw(ROWS, VOCAB, seed=seed, scale=1.0) * scales).bfloat16() for seed in (1, 2))
    check(kdflow.get_divergence(name, **options), s, t)


@every_divergence
def test_tokens_that_one_side_all_but_excludes(name: str, options: dict[str, Any]) -> None:
    """Their probabilities are below what fp32 holds."""
    s, t = draw(ROWS, VOCAB, seed=1), draw(ROWS, VOCAB, seed=2)
    s[:, 5], t[:, 5] = -150.0, 8.0
    s[:, 76], t[:, 76] = 9.0, -150.0
    s[:, 30], t[:, 30] = -150.0, -160.0
    check(kdflow.get_divergence(name, **options), s, t)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])  # all beyond are alike: no search among them
@pytest.mark.parametrize(("own", "other"), [(4.0, 3.0), (30.0, 31.0), (3.0, 60.0)])
def test_logits_far_beyond_the_cap(name: str, own: float, other: float) -> None:
    s, t = 40 * draw(ROWS, VOCAB, seed=3), 40 * draw(ROWS, VOCAB + 9, seed=4)
    s[:, 5], t[:, 7] = 1e30, -1e30
    s[1], t[2] = -1e30, -1e30  # as unlikely as can be, all of them
    labels = torch.tensor([0, 40, 69])
    check(
        kdflow.get_divergence(name), s, t, head(VOCAB, softcap=own), head(VOCAB + 9, softcap=other), labels, 0.3
    )  # fmt: skip


@every_divergence
def test_equals_fp64_with_everything_that_heads_and_losses_have(name: str, options: dict[str, Any]) -> None:
    divergence = kdflow.get_divergence(name, temperature=2.0, scale_by_temperature_squared=True, **options)
    labels = torch.tensor([0, 40, 69])
    for student, teacher, ce_weight in (
        (head(VOCAB, valid_vocab=70), head(VOCAB + 9), 0.3),
        (head(VOCAB, scale=0.5, softcap=4.0), head(VOCAB + 9, scale=2.0, softcap=3.0, valid_vocab=60), 0.3),
        (head(VOCAB, softcap=3.0, valid_vocab=70), head(VOCAB + 9), 0.3),
        (head(VOCAB, softcap=4.0), head(VOCAB + 9, softcap=70.0), 0.3),
        (head(VOCAB), head(VOCAB + 9, softcap=4.0), 0.0),
        (head(VOCAB), head(VOCAB + 9, valid_vocab=50), 1.0),
    ):
        s, t = draw(ROWS, VOCAB, seed=3), draw(ROWS, VOCAB + 9, seed=4)
        check(divergence, s, t, student, teacher, labels, ce_weight)
    check(divergence, draw(ROWS, VOCAB, seed=5), draw(ROWS, VOCAB - 20, seed=6))


@pytest.mark.parametrize("device", ["triton"], indirect=True)  # a CPU's is not given heads with a bias
@every_divergence
def test_minus_infinity_is_no_nan_and_counts_as_in_the_formula(name: str, options: dict[str, Any]) -> None:
    divergence = kdflow.get_divergence(name, **options)
    s, t = draw(ROWS, VOCAB, seed=7), draw(ROWS, VOCAB, seed=8)
    s[:, [3, 20, 76]] = -math.inf
    t[:, [3, 21, 76]] = -math.inf
    s[1, 20], t[2, 21] = 1.0, 1.0
    bias = torch.zeros(0)  # products of a head with a bias may be infinite
    arguments: Any = s, head(VOCAB, bias=bias), t, head(VOCAB, bias=bias), divergence, None, 0.0
    kd, _, gradient = kernel(*arguments)
    assert not kd.isnan().any()
    assert gradient.isfinite().all()
    leaf = s.double().requires_grad_()
    expected = divergence(leaf, t.double())
    torch.testing.assert_close(kd.double(), expected.detach(), rtol=2e-5, atol=2e-6)
    (slopes,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(gradient.double(), slopes, rtol=2**-7, atol=2e-6)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_one_row_is_no_other_layout_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's index on disk has no lock: of two layouts compiled at once one's code could be kept as the other's."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for rows in (1, 2, 5):
        s, t = (draw(rows, VOCAB, seed=seed) for seed in (1, 2))
        kernel(s, head(VOCAB), t, head(VOCAB), kdflow.get_divergence("forward_kl"), torch.zeros(rows).long(), 0.1)
    assert len(cpu_kernel._rows.signatures) == 1


@every_divergence
def test_the_same_products_give_zero(name: str, options: dict[str, Any]) -> None:
    s = draw(ROWS, VOCAB, seed=9, scale=5.0)
    kd, _, gradient = kernel(s, head(VOCAB), s, head(VOCAB), kdflow.get_divergence(name, **options), None, 0.0)
    assert kd.abs().max() < 2e-6
    assert gradient.abs().max() < 2e-6


@pytest.mark.parametrize("mu", [0.1, 0.5, 0.9])
def test_adaptive_kl_finds_the_head_among_ties_and_wide_and_peaked_rows(mu: float) -> None:
    divergence = kdflow.get_divergence("adaptive_kl", mu=mu)
    s = draw(7, VOCAB, seed=10)
    t = draw(7, VOCAB, seed=11)
    t[0] = (t[0] * 2).round() / 2  # many ties
    t[1] *= 1e-4  # nearly uniform, around zero, where bf16 has most numbers
    t[2, 5] = 20.0  # one token has all the mass
    t[3] -= 100.0
    t[4] = t[4].abs() + 3.0
    t[5, ::2] = t[5, 0]
    t[6] = t[6].sign() * 0.0  # zeros of both signs
    check(divergence, s, t)


@pytest.mark.parametrize(("mu", "softcap"), [(0.1, None), (0.5, None), (0.9, None), (0.5, 10.0)])
def test_adaptive_kl_finds_the_head_where_the_blocks_it_guesses_from_are_unlike_the_others(
    mu: float, softcap: float | None
) -> None:
    vocab = 32 * 17 + 13  # of 17 whole blocks the first, the ninth and the last make the guess
    s, t = draw(4, vocab, seed=16), draw(4, vocab, seed=17)
    for row, shift in enumerate((-6.0, -0.7, 0.7, 6.0)):
        for block in (0, 8, 16):
            t[row, 32 * block : 32 * (block + 1)] += shift
    both = head(vocab, softcap=softcap)
    check(kdflow.get_divergence("adaptive_kl", mu=mu), s, t, both, both)


@pytest.mark.parametrize("mu", [0.1, 0.5, 0.8, 0.9, 0.999])
def test_adaptive_kl_finds_the_head_where_most_products_lie_far_below_the_cap(mu: float) -> None:
    s, t = draw(ROWS, VOCAB, seed=14), -46 + draw(ROWS, VOCAB, seed=15)
    t[:, 3] = 9.0
    t[1] = -t[1]
    check(kdflow.get_divergence("adaptive_kl", mu=mu), s, t, head(VOCAB, softcap=3.0), head(VOCAB, softcap=3.0))


@pytest.mark.parametrize("device", ["triton"], indirect=True)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "skew_kl", "tvd", "adaptive_kl"])
def test_a_row_without_a_finite_logit_has_no_divergence(name: str) -> None:
    for side in (0, 1):
        rows = [draw(ROWS, VOCAB, seed=16), draw(ROWS, VOCAB, seed=17)]
        rows[side][1] = -math.inf
        bias = torch.zeros(0)
        s, t = rows
        kd, _, _ = kernel(s, head(VOCAB, bias=bias), t, head(VOCAB, bias=bias), kdflow.get_divergence(name), None, 0.0)
        assert kd.isnan().tolist() == [False, True, False]


def test_nan_stays_nan() -> None:
    s, t = draw(ROWS, VOCAB, seed=12), draw(ROWS, VOCAB, seed=13)
    s[1, 4] = math.nan
    kd, _, _ = kernel(s, head(VOCAB), t, head(VOCAB), kdflow.get_divergence("jsd"), None, 0.0)
    assert kd.isnan().tolist() == [False, True, False]


# --- the head around it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("ce_weight", [0.0, 0.25])
def test_the_fused_head_equals_the_reference(device: torch.device, chunk: int | None, ce_weight: float) -> None:
    rows, weight, bias = draw(7, 8, seed=1), draw(VOCAB, 8, seed=2, scale=0.5), draw(VOCAB, seed=3)
    others, other_weight, other_bias = (
        draw(7, 16, seed=4),
        draw(VOCAB + 4, 16, seed=5, scale=0.5),
        draw(VOCAB + 4, seed=6),
    )
    labels = torch.arange(7) * 9
    divergence = kdflow.get_divergence("skew_kl", skew=0.3, temperature=2.0)
    found, sums = [], []
    for dtype in (torch.bfloat16, torch.float64):
        where = {"device": device} if dtype == torch.bfloat16 else {}
        leaves = [x.to(dtype=dtype, **where).requires_grad_() for x in (rows, weight, bias)]
        fixed = [x.to(dtype=dtype, **where) for x in (others, other_weight, other_bias)]
        student, teacher = Head(*leaves[1:], valid_vocab=70), Head(*fixed[1:], scale=0.5)
        with ops.chunk_rows(chunk):
            if dtype == torch.bfloat16:
                given = labels.to(device) if ce_weight else None
                form = form_of(divergence)
                assert form is not None
                loss, kd, ce = fused.fused_parts(
                    leaves[0], student, fixed[0], teacher, divergence, form, given, ce_weight
                )
            else:
                loss, kd, ce = divergence_parts(
                    leaves[0], student, fixed[0], teacher, divergence, None, labels, ce_weight
                )
        found.append(torch.autograd.grad(loss * 0.5, leaves))
        sums.append([x.item() for x in (loss, kd, ce)])
        assert not kd.requires_grad
    assert sums[0] == pytest.approx(sums[1], rel=5e-3)
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.cpu().double() - theirs).norm() < 2e-2 * theirs.norm()


@pytest.mark.parametrize("device", ["cpu"], indirect=True)  # Triton's interpreter does not round to bf16, but cuts
@every_divergence
@pytest.mark.parametrize(
    ("temperature", "ce_weight", "head"),
    [(1.0, 0.0, {}), (2.0, 0.0, {}), (1.0, 0.1, {}), (1.0, 0.0, {"softcap": 5.0}), (1.0, 0.1, {"valid_vocab": 2900})],
)
def test_gradients_are_as_good_as_those_of_plain_torch(
    device: torch.device, name: str, options: dict[str, Any], temperature: float, ce_weight: float, head: dict[str, Any]
) -> None:
    scales = {(64, 32): 1.0, (3000, 32): 2 * 32**-0.5, (64, 48): 1.0, (3000, 48): 2 * 48**-0.5}
    tensors = [draw(*shape, seed=seed, scale=scale) for seed, (shape, scale) in enumerate(scales.items())]
    divergence = kdflow.get_divergence(name, temperature=temperature, **options)
    ours, plain = relative_errors(tensors, divergence, ce_weight, head)
    for error, bound in zip(ours[1:], plain[1:], strict=True):
        assert error < 1.01 * bound


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_what_memory_held_before_is_not_in_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with AMX, products of some tens of rows read what lies behind the rows of a matrix."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **kwargs: Any) -> Tensor:
        made = new_empty(self, *size, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    products = fused.matrix(33, 77, torch.zeros(1))
    assert not products.as_strided((33, products.stride(0)), products.stride())[:, 77:].any()
    rows, weight, others, other_weight = (draw(*shape, seed=18) for shape in ((33, 32), (77, 32), (33, 32), (77, 32)))
    leaves = [x.requires_grad_() for x in (rows, weight)]
    loss = ops.divergence_sum(rows, Head(weight), others, Head(other_weight), kdflow.get_divergence("forward_kl"))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves))


def test_gradients_are_those_of_every_backward_pass(device: torch.device) -> None:
    leaves = [
        draw(*shape, seed=seed, scale=1.0).to(device).requires_grad_()
        for seed, shape in enumerate(((9, 8), (VOCAB, 8)))
    ]
    others, weight = (draw(*shape, seed=seed).to(device) for seed, shape in ((2, (9, 4)), (3, (VOCAB, 4))))
    loss = ops.divergence_sum(leaves[0], Head(leaves[1]), others, Head(weight), kdflow.get_divergence("jsd"))
    once, half = (torch.autograd.grad(factor * loss, leaves, retain_graph=True) for factor in (1.0, 0.5))
    for whole, part in zip(once, half, strict=True):
        assert torch.equal(0.5 * whole, part)


def test_a_second_derivative_is_refused_and_not_wrong(device: torch.device) -> None:
    rows, weight = (draw(*shape, seed=1).to(device) for shape in ((9, 8), (VOCAB, 8)))
    leaf = rows.clone().requires_grad_()
    loss = ops.divergence_sum(leaf, Head(weight), rows, Head(weight), kdflow.get_divergence("jsd"))
    with pytest.raises(RuntimeError, match="can be differentiated once, and create_graph=True asks for more"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("chunk", [None, 3])
def test_autocast_changes_neither_the_loss_nor_its_gradients(device: torch.device, chunk: int | None) -> None:
    leaves = [draw(*shape, seed=1).to(device).requires_grad_() for shape in ((9, 8), (VOCAB, 8))]
    others, weight = (draw(*shape, seed=2).to(device) for shape in ((9, 4), (VOCAB, 4)))

    def found() -> tuple[Tensor, ...]:
        with ops.chunk_rows(chunk):
            loss = ops.divergence_sum(leaves[0], Head(leaves[1]), others, Head(weight), kdflow.get_divergence("jsd"))
        return loss.detach(), *torch.autograd.grad(loss / 3, leaves)

    with torch.autocast(device.type, torch.float16):
        inside = found()
    for actual, expected in zip(inside, found(), strict=True):
        assert torch.equal(actual, expected)


def test_what_needs_no_gradient_gets_none(device: torch.device) -> None:
    rows, weight, others, other_weight = (
        draw(*shape, seed=seed).to(device) for seed, shape in enumerate(((4, 8), (VOCAB, 8), (4, 8), (VOCAB, 8)))
    )
    divergence, form = kdflow.get_divergence("forward_kl"), forms.MixtureKL(1.0, 0.0, 0.0)

    def loss(rows: Tensor, weight: Tensor) -> Tensor:
        arguments: Any = rows, Head(weight), others, Head(other_weight), divergence, form, None, 0.0
        return fused.fused_parts(*arguments)[0]

    plain = loss(rows, weight)
    assert not plain.requires_grad
    rows.requires_grad_()
    (alone,) = torch.autograd.grad(loss(rows, weight), rows)
    weight.requires_grad_()
    both = torch.autograd.grad(loss(rows, weight), (rows, weight))
    assert torch.equal(alone, both[0])
    with torch.no_grad():
        assert loss(rows, weight) == plain


# --- which divergences have a form ------------------------------------------------------------------------------------


@every_divergence
def test_built_in_divergences_have_a_form(name: str, options: dict[str, Any]) -> None:
    assert form_of(kdflow.get_divergence(name, **options)) is not None


def test_a_subclass_that_computes_something_else_has_no_form() -> None:
    forward = type(kdflow.get_divergence("forward_kl"))

    class Other(forward):  # type: ignore[valid-type,misc]
        def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
            return 2.0 * super().per_token(student_logits, teacher_logits)

    class Renamed(forward):  # type: ignore[valid-type,misc]
        name = "renamed"

    assert form_of(Other()) is None
    assert form_of(Renamed()) == form_of(forward()) == forms.MixtureKL(1.0, 0.0, 0.0)
    assert form_of(kdflow.get_divergence("sorted_l1")) is None


# --- on a CPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd", "adaptive_kl"])
def test_rows_of_real_width_are_as_exact_on_every_thread(name: str) -> None:
    divergence, width = kdflow.get_divergence(name), 50_000
    s, t = draw(5, width, seed=1), draw(5, width, seed=2)
    leaf = s.double().requires_grad_()
    expected = divergence(leaf, t.double())
    (slopes,) = torch.autograd.grad(expected.sum(), leaf)
    known, found = torch.get_num_threads(), []
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        try:
            found.append(kernel(s, head(width), t, head(width), divergence, None, 0.0))
        finally:
            torch.set_num_threads(known)
    for kd, _, gradient in found:
        torch.testing.assert_close(kd.double(), expected.detach(), rtol=5e-6, atol=0)
        assert (gradient.double() - slopes).norm() < 3e-3 * slopes.norm()
        assert torch.equal(gradient, found[0][2])
        assert torch.equal(kd, found[0][0])


@pytest.mark.skipif(CUDA, reason="of a machine without a GPU")
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_the_kernel_is_taken_for_bf16_but_where_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    known = fused.fused_parts
    monkeypatch.setattr(fused, "fused_parts", lambda *arguments: calls.append("kernel") or known(*arguments))
    rows, weight = draw(4, 8, seed=1), draw(VOCAB, 8, seed=2)

    def taken(name: str = "jsd", bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> bool:
        calls.clear()
        side: Any = rows.to(dtype), Head(weight.to(dtype), bias)
        assert ops.divergence_sum(*side, *side, kdflow.get_divergence(name)) == pytest.approx(0, abs=1e-5)
        return bool(calls)

    assert taken()
    assert taken("adaptive_kl")
    assert not taken(bias=torch.zeros(VOCAB, dtype=torch.bfloat16))
    assert not taken(dtype=torch.float32)
