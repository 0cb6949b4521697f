"""What holds for every divergence, whatever the logits, and what each option does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kdflow
from kdflow import Head, KdflowError, plugins
from tests.support import reference
from tests.support.draw import logit_pairs, masks, quick

BETAS = (0.0, 1e-6, 0.1, 0.5, 0.9, 1.0)
DIVERGENCES: list[tuple[str, dict[str, Any]]] = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    *(("jsd", {"beta": beta}) for beta in BETAS),
    *((name, {"skew": skew}) for name in ("skew_kl", "skew_reverse_kl") for skew in (0.0, 0.1, 0.9)),
    *(("adaptive_kl", {"mu": mu}) for mu in (0.0, 0.5, 1.0)),
    ("tvd", {}),
    ("sorted_l1", {}),
]
NAMES = sorted({name for name, _ in DIVERGENCES})
every_divergence = pytest.mark.parametrize(
    ("name", "options"),
    DIVERGENCES,
    ids=["-".join(map(str, (name, *options.values()))) for name, options in DIVERGENCES],
)
temperatures = st.sampled_from((0.5, 1.0, 3.0))


def evaluate(name: str, student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Values and their gradient for the student's logits."""
    leaf = student.clone().requires_grad_()
    values = kdflow.get_divergence(name, **options)(leaf, teacher)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def same(actual: Tensor, expected: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def test_these_are_the_divergences() -> None:
    assert {entry.name for entry in plugins.load().of_kind("divergence")} >= set(NAMES)
    assert set(NAMES) == set(reference.FORMULAS)
    assert all(entry.cls.paper for entry in plugins.load().of_kind("divergence"))


# --- properties -------------------------------------------------------------------------------------------------------


@every_divergence
@quick
@given(pair=logit_pairs(), temperature=temperatures)
def test_equals_its_formula(
    name: str, options: dict[str, Any], pair: tuple[Tensor, Tensor], temperature: float
) -> None:
    given = options | {"temperature": temperature}
    values, gradient = evaluate(name, *pair, **given)
    same(values, reference.divergence(name, *(x.numpy() for x in pair), **given), rtol=1e-8, atol=1e-12)
    same(gradient, reference.gradient(name, *(x.numpy() for x in pair), **given), rtol=1e-5, atol=1e-7)


@every_divergence
@quick
@given(pair=logit_pairs(scales=(0.01, 1.0, 30.0, 1e3, 1e4)), temperature=temperatures, dtype=st.sampled_from("hbsd"))
def test_is_finite_and_non_negative(
    name: str, options: dict[str, Any], pair: tuple[Tensor, Tensor], temperature: float, dtype: str
) -> None:
    kind = {"h": torch.float16, "b": torch.bfloat16, "s": torch.float32, "d": torch.float64}[dtype]
    student, teacher = (x.clamp(-1e4, 1e4).to(kind) for x in pair)
    values, gradient = evaluate(name, student, teacher, temperature=temperature, **options)
    assert values.shape == (len(student),)
    assert values.dtype == (torch.float64 if dtype == "d" else torch.float32)
    assert values.isfinite().all()
    assert (values >= 0).all()
    assert gradient.isfinite().all()


@every_divergence
@quick
@given(pair=logit_pairs(scales=(0.01, 1.0, 30.0, 1e4)), temperature=temperatures, data=st.data())
def test_is_zero_with_zero_gradient_where_student_is_teacher(
    name: str, options: dict[str, Any], pair: tuple[Tensor, Tensor], temperature: float, data: st.DataObject
) -> None:
    teacher = pair[1].masked_fill(data.draw(masks(pair[1])), -math.inf)
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        values, gradient = evaluate(name, teacher.to(dtype), teacher.to(dtype), temperature=temperature, **options)
        assert values.abs().max() <= bound
        assert gradient.abs().max() <= bound


@every_divergence
@quick
@given(pair=logit_pairs(), data=st.data())
def test_columns_masked_on_both_sides_count_nothing(
    name: str, options: dict[str, Any], pair: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    mask = data.draw(masks(pair[0]))
    values, gradient = evaluate(name, *(x.masked_fill(mask, -math.inf) for x in pair), **options)
    kept, kept_gradient = evaluate(name, *(x[:, ~mask] for x in pair), **options)
    same(values, kept)
    same(gradient[:, ~mask], kept_gradient)
    assert (gradient[:, mask] == 0).all()


@every_divergence
@quick
@given(pair=logit_pairs(smallest=2), data=st.data())
def test_columns_masked_on_one_side_give_infinity_or_a_number_but_never_nan(
    name: str, options: dict[str, Any], pair: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    student, teacher = (x.masked_fill(data.draw(masks(x)), -math.inf) for x in pair)
    values, gradient = evaluate(name, student, teacher, **options)
    assert (values >= 0).all()
    assert gradient.isfinite().all()
    expected = reference.divergence(name, student.numpy(), teacher.numpy(), **options)
    same(values, expected, rtol=1e-8)
    slopes = torch.from_numpy(reference.gradient(name, student.numpy(), teacher.numpy(), **options))
    finite = values.isfinite()
    same(gradient[finite], slopes[finite], rtol=1e-5, atol=1e-7)


@every_divergence
def test_a_vocabulary_of_one_gives_zero(name: str, options: dict[str, Any]) -> None:
    values, gradient = evaluate(name, torch.tensor([[3.0], [-1e4]]), torch.tensor([[-2.0], [1e4]]), **options)
    same(values, [0.0, 0.0], atol=1e-6)
    same(gradient, [[0.0], [0.0]], atol=1e-6)


@every_divergence
@quick
@given(pair=logit_pairs(), shifts=st.tuples(*[st.floats(-100, 100)] * 2))
def test_shifted_logits_are_the_same(
    name: str, options: dict[str, Any], pair: tuple[Tensor, Tensor], shifts: tuple[float, float]
) -> None:
    values, gradient = evaluate(name, *pair, **options)
    shifted, shifted_gradient = evaluate(name, pair[0] + shifts[0], pair[1] + shifts[1], **options)
    same(shifted, values, rtol=1e-8, atol=1e-10)
    same(shifted_gradient, gradient, rtol=1e-8, atol=1e-10)


@quick
@given(pair=logit_pairs(scales=(1.0, 30.0, 1e4)), weight=st.floats(0.01, 0.99))
def test_bounds(pair: tuple[Tensor, Tensor], weight: float) -> None:
    entropy = -weight * math.log(weight) - (1 - weight) * math.log(1 - weight)
    assert (kdflow.get_divergence("tvd")(*pair) <= 1 + 1e-12).all()
    assert (kdflow.get_divergence("jsd")(*pair) <= math.log(2) + 1e-12).all()
    assert (kdflow.get_divergence("jsd", beta=weight)(*pair) <= entropy + 1e-12).all()
    for name in ("skew_kl", "skew_reverse_kl"):
        assert (kdflow.get_divergence(name, skew=weight)(*pair) <= -math.log(weight) + 1e-12).all()


@every_divergence
def test_bounds_are_reached_by_distributions_that_share_nothing(name: str, options: dict[str, Any]) -> None:
    student = torch.tensor([[1e4, -1e4, -1e4]], dtype=torch.float64)
    teacher = student.flip(-1)
    gap = 2e4
    expected = {
        "jsd": lambda beta: gap if beta in (0, 1) else -beta * math.log(beta) - (1 - beta) * math.log1p(-beta),
        "skew_kl": lambda skew: -math.log(skew) if skew else gap,
        "skew_reverse_kl": lambda skew: -math.log(skew) if skew else gap,
        "tvd": lambda: 1.0,
        "sorted_l1": lambda: 0.0,  # it looks at sorted probabilities alone
    }.get(name, lambda **_: gap)(**options)
    same(evaluate(name, student, teacher, **options)[0], [expected], rtol=1e-12)


@every_divergence
def test_gradients(name: str, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    divergence = kdflow.get_divergence(name, temperature=1.5, **options)
    if name == "adaptive_kl":  # differentiable but for its ratios, which test_equals_its_formula holds still
        student.grad = teacher.grad = None
        divergence(student, teacher).sum().backward()
        assert student.grad is not None
        assert student.grad.abs().sum() > 0
        return
    assert torch.autograd.gradcheck(divergence, (student, teacher))


@every_divergence
@quick
@given(pair=logit_pairs(scales=(1.0, 8.0), vocab=64))
def test_autocast_changes_nothing(name: str, options: dict[str, Any], pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = (x.float() for x in pair)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(name, student, teacher, **options)
    for actual, expected in zip(found, evaluate(name, student, teacher, **options), strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


@every_divergence
@quick
@given(pair=logit_pairs(scales=(0.01, 1.0, 8.0), vocab=64), dtype=st.sampled_from((torch.bfloat16, torch.float16)))
def test_half_precision_logits_are_computed_in_fp32(
    name: str, options: dict[str, Any], pair: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    halves = [x.to(dtype) for x in pair]
    values = kdflow.get_divergence(name, temperature=0.7, **options)(*halves)
    exact = kdflow.get_divergence(name, temperature=0.7, **options)(*(x.double() for x in halves))
    assert values.dtype == torch.float32
    assert (values >= 0).all()
    same(values.double(), exact, rtol=2e-5, atol=2e-6)


def test_logits_may_have_more_dimensions() -> None:
    student, teacher = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    for name in NAMES:
        divergence = kdflow.get_divergence(name)
        same(divergence(student, teacher).flatten(), divergence(student.flatten(0, 1), teacher.flatten(0, 1)))


# --- jsd between its ends ---------------------------------------------------------------------------------------------


@quick
@given(pair=logit_pairs(), temperature=temperatures)
def test_the_ends_of_jsd_are_forward_and_reverse_kl(pair: tuple[Tensor, Tensor], temperature: float) -> None:
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        end = evaluate("jsd", *pair, beta=beta, temperature=temperature)
        plain = evaluate(name, *pair, temperature=temperature)
        assert all(torch.equal(one, other) for one, other in zip(end, plain, strict=True))


@pytest.mark.parametrize("beta", BETAS[1:-1])
def test_jsd_weighs_the_teacher_by_beta_and_mirrors(beta: float) -> None:
    student, teacher = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    values, _ = evaluate("jsd", student, teacher, beta=beta)
    same(evaluate("jsd", teacher, student, beta=1 - beta)[0], values, atol=1e-14)
    if beta != 0.5:
        assert not torch.allclose(evaluate("jsd", teacher, student, beta=beta)[0], values, rtol=1e-6)


def test_jsd_near_its_ends_is_small_but_trains() -> None:
    student, teacher = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for beta, name in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        for near, limit in zip(
            evaluate("jsd", student, teacher, beta=beta), evaluate(name, student, teacher), strict=True
        ):
            same(near * 1e6, limit, rtol=1e-4, atol=1e-6)


def test_adaptive_kl_with_all_the_teachers_mass_in_the_head_is_forward_kl() -> None:
    student, teacher = torch.randn(2, 16, 5000, generator=torch.Generator().manual_seed(7)) * 4
    for adaptive, forward in zip(
        evaluate("adaptive_kl", student, teacher, mu=1.0), evaluate("forward_kl", student, teacher), strict=True
    ):
        same(adaptive, forward, rtol=1e-5, atol=1e-8)


def test_adaptive_kl_does_not_depend_on_the_order_of_tokens_that_tie() -> None:
    teacher, student = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]]), torch.tensor([[2.0, -1.0, 0.5, 0.0, 1.0]])
    for order in ([0, 1, 2, 3, 4], [1, 2, 0, 4, 3], [2, 0, 1, 3, 4]):
        values, gradient = evaluate("adaptive_kl", student[:, order].double(), teacher[:, order].double())
        # One of three that tie is inside: e/(3e + 2) = 0.27, two of them 0.53.
        share = reference.head_share(*(reference.softmax(x.double().numpy()) for x in (student, teacher)))
        same(values, reference.divergence("adaptive_kl", student.double().numpy(), teacher.double().numpy()), rtol=1e-8)
        assert 0 < share[0] < 1
        same(gradient[:, torch.tensor(order).argsort()], evaluate("adaptive_kl", student.double(), teacher.double())[1])


def test_adaptive_kl_leaves_out_an_infinite_part_that_has_no_weight() -> None:
    teacher, student = torch.tensor([[[0.5, 0.25, 0.25]], [[0.5, 0.5, 0.0]]], dtype=torch.float64).log()
    values, gradient = evaluate("adaptive_kl", student, teacher)  # they agree on the head: 0 · inf + 1 · KL(S‖T)
    same(values, [0.5 * math.log(2)])
    assert gradient.isfinite().all()
    values, gradient = evaluate("adaptive_kl", student, teacher, mu=1.0)
    assert values.tolist() == [math.inf]
    assert gradient.isfinite().all()


# --- options ----------------------------------------------------------------------------------------------------------

EFFECTS: dict[str, list[dict[str, Any]]] = {
    "temperature": [{"temperature": 0.5}, {"temperature": 4.0}],
    "scale_by_temperature_squared": [{"scale_by_temperature_squared": True, "temperature": 3.0}],
    "beta": [{"beta": 0.0}, {"beta": 0.2}, {"beta": 1.0}],
    "skew": [{"skew": 0.0}, {"skew": 0.4}],
    "mu": [{"mu": 0.0}, {"mu": 0.9}],
    "ce_weight": [{"ce_weight": 0.25, "temperature": 2.0}, {"ce_weight": 1.0}],
    "label_smoothing": [{"label_smoothing": 0.1}],
}
ALGORITHMS = (*NAMES, "sft")


def fields(name: str) -> dict[str, Any]:
    return dict(kdflow.get_algorithm(name).Options.model_fields)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_option_has_an_effect_that_is_its_formulas(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(0, 8, (6,), generator=generator)

    def expected(options: dict[str, Any]) -> float:
        own = dict(options)
        ce = reference.cross_entropy(student.numpy(), labels.numpy()).sum()
        if name == "sft":
            smoothing = own.get("label_smoothing", 0.0)
            return (1 - smoothing) * ce - smoothing * np.log(reference.softmax(student.numpy())).mean(-1).sum()
        weight = own.pop("ce_weight", 0.0)
        return (1 - weight) * reference.divergence(name, student.numpy(), teacher.numpy(), **own).sum() + weight * ce

    def actual(options: dict[str, Any]) -> Tensor:
        sides = {"logits": student, "labels": labels}, None if name == "sft" else {"logits": teacher}
        return kdflow.testing.loss(name, options, *sides).value

    same(actual({}), expected({}))
    for option in fields(name):
        assert option in EFFECTS, f"no test sees the effect of {name}'s {option}"
        for options in EFFECTS[option]:
            same(actual(options), expected(options))
            without = {key: value for key, value in options.items() if key != option}
            assert not torch.allclose(actual(options), actual(without), rtol=1e-3), f"{option} has no effect"


def test_the_published_defaults() -> None:
    defaults = {name: {key: info.default for key, info in fields(name).items()} for name in ALGORITHMS}
    common = {"temperature": 1.0, "scale_by_temperature_squared": False, "ce_weight": 0.0}
    own = {"jsd": {"beta": 0.5}, "skew_kl": {"skew": 0.1}, "skew_reverse_kl": {"skew": 0.1}, "adaptive_kl": {"mu": 0.5}}
    assert defaults == {name: common | own.get(name, {}) for name in NAMES} | {"sft": {"label_smoothing": 0.0}}


def test_an_infinite_divergence_does_not_spoil_the_cross_entropy() -> None:
    student, teacher = torch.tensor([[0.0, -math.inf, 1.0]]), torch.zeros(1, 3)
    sides = {"logits": student, "labels": torch.tensor([2])}, {"logits": teacher}
    assert kdflow.testing.loss("forward_kl", {}, *sides).value == math.inf
    assert kdflow.testing.loss("forward_kl", {"ce_weight": 0.5}, *sides).value == math.inf
    same(kdflow.testing.loss("forward_kl", {"ce_weight": 1.0}, *sides).value, math.log1p(math.exp(-1)), rtol=1e-6)


def test_numbers_may_be_written_as_text() -> None:
    assert kdflow.get_divergence("jsd", beta="1e-3").options.beta == 1e-3


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("jsd", {"beta": 1.5}, ("'jsd'", "beta", "less than or equal to 1", "1.5")),
        ("jsd", {"beta": -0.1}, ("beta", "greater than or equal to 0", "-0.1")),
        ("jsd", {"beta": math.nan}, ("beta", "finite")),
        ("jsd", {"beta": True}, ("beta: must be a number, not true",)),
        ("jsd", {"beta": "half"}, ("beta", "valid number", "'half'")),
        ("jsd", {"betta": 0.1}, ("betta", "unknown key", "did you mean 'beta'?")),
        ("jsd", {"skew": 0.1}, ("skew", "unknown key", "known keys: ", "beta", "temperature")),
        ("skew_kl", {"skew": 1.0}, ("skew", "less than 1", "1.0")),
        ("skew_reverse_kl", {"skew": -1}, ("skew", "greater than or equal to 0", "-1")),
        ("adaptive_kl", {"mu": 2}, ("mu", "less than or equal to 1", "2")),
        ("forward_kl", {"temperature": 0}, ("temperature", "greater than or equal to 0.000001", "0")),
        ("tvd", {"temperature": 1e-45}, ("temperature", "greater than or equal to 0.000001", "1e-45")),
        ("forward_kl", {"temperature": math.inf}, ("temperature", "finite")),
        ("forward_kl", {"scale_by_temperature_squared": "maybe"}, ("scale_by_temperature_squared", "valid boolean")),
        ("tvd", {"temprature": 2.0}, ("temprature", "did you mean 'temperature'?")),
    ],
)  # fmt: skip
def test_a_wrong_option_is_an_error_that_helps(name: str, options: dict[str, Any], words: tuple[str, ...]) -> None:
    sides = {"logits": torch.zeros(1, 2)}, {"logits": torch.zeros(1, 2)}
    for use in (lambda: kdflow.get_divergence(name, **options), lambda: kdflow.testing.loss(name, options, *sides)):
        with pytest.raises(KdflowError) as error:
            use()
        assert all(word in str(error.value) for word in (name, *words)), str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("jsd", {"ce_weight": 1.1}, ("ce_weight", "less than or equal to 1", "1.1")),
        ("tvd", {"ce_weight": -1}, ("ce_weight", "greater than or equal to 0")),
        ("sft", {"label_smoothing": 1}, ("label_smoothing", "less than 1")),
        ("sft", {"label_smoothing": -0.1}, ("label_smoothing", "greater than or equal to 0")),
        ("sft", {"temperature": 2.0}, ("temperature", "unknown key", "known keys: label_smoothing")),
        ("sft", {"ce_weight": 0.5}, ("ce_weight", "unknown key")),
    ],
)
def test_a_wrong_option_of_training_is_an_error_that_helps(
    name: str, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(KdflowError) as error:
        kdflow.testing.loss(name, options, {"logits": torch.zeros(1, 2)}, {"logits": torch.zeros(1, 2)})
    assert all(word in str(error.value) for word in (name, *words)), str(error.value)


def test_a_divergence_alone_has_no_cross_entropy() -> None:
    with pytest.raises(KdflowError, match="ce_weight: unknown key"):
        kdflow.get_divergence("jsd", ce_weight=0.5)


@pytest.mark.parametrize(("wrong", "right"), [("skewkl", "skew_kl"), ("jds", "jsd"), ("reverse-kl", "reverse_kl")])
def test_an_unknown_name_is_an_error_with_the_nearest_one(wrong: str, right: str) -> None:
    for use in (kdflow.get_divergence, kdflow.get_algorithm, lambda name: kdflow.testing.loss(name, {}, {})):
        with pytest.raises(
            KdflowError, match=rf"'{wrong}' is not registered; did you mean '{right}'\? Installed: .*tvd"
        ):
            use(wrong)


# --- supervised fine-tuning -------------------------------------------------------------------------------------------


def sft(smoothing: float, student: dict[str, Any]) -> Tensor:
    return kdflow.testing.loss("sft", {"label_smoothing": smoothing}, student).value


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_sft_leaves_padding_of_the_vocabulary_out(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(10, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 8, (7,), generator=generator)
    padded = sft(smoothing, {"hidden": hidden, "head": Head(weight, valid_vocab=8), "labels": labels})
    logits = hidden @ weight[:8].T
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    same(padded, expected)
    for actual, plain in zip(
        torch.autograd.grad(padded, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        same(actual, plain)


def test_sft_needs_no_teacher() -> None:
    assert kdflow.get_algorithm("sft").needs == frozenset()
    assert all(kdflow.get_algorithm(name).needs == {"teacher", "same_vocabulary"} for name in NAMES)


def test_sft_of_bfloat16_is_computed_in_fp32() -> None:
    hidden, weight = (torch.randn(size, 4, generator=torch.Generator().manual_seed(6)).bfloat16() for size in (5, 9))
    value = sft(0.1, {"hidden": hidden, "head": weight, "labels": torch.arange(5)})
    logits = (hidden @ weight.T).double()
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(5), label_smoothing=0.1, reduction="sum")
    assert value.dtype == torch.float32
    same(value.double(), expected, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [-100, 9])
def test_sft_refuses_a_label_that_is_no_id_of_the_head(smoothing: float, label: int) -> None:
    student = {"hidden": torch.zeros(2, 4), "head": torch.zeros(9, 4), "labels": torch.tensor([3, label])}
    with pytest.raises(ValueError, match="targets are ids of the student's head, 0 to 8"):
        sft(smoothing, student)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sft_of_no_rows_is_zero_with_a_graph(smoothing: float) -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    value = sft(smoothing, {"hidden": torch.zeros(0, 3), "head": weight, "labels": torch.zeros(0, dtype=torch.long)})
    assert value == 0
    assert torch.equal(torch.autograd.grad(value, weight)[0], torch.zeros(4, 3))
