"""Every divergence against what the code of its authors, and of others, gave on the same inputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdflow
from kdflow import Head, ops
from kdflow.ops.logspace import log_probabilities
from tests.support import reference
from tests.support.vectors import Case, cases

DIVERGENCES = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "jsd": "jsd",
    "skew_kl": "skew_kl",
    "skew_rkl": "skew_reverse_kl",
    "adaptive_kl": "adaptive_kl",
    "tvd": "tvd",
}

# Method -> cases, values compared (a tensor is one), values excluded. A case that is skipped by accident changes them.
COUNTS = {
    "forward_kl": (77, 321, 3),
    "reverse_kl": (72, 310, 3),
    "jsd": (82, 364, 3),
    "skew_kl": (58, 191, 2),
    "skew_rkl": (58, 191, 2),
    "adaptive_kl": (48, 45, 129),
    "tvd": (37, 135, 2),
    "gkd_compute_loss": (6, 12, 0),
    "kdflow_vanilla_kd": (4, 14, 4),
    "dskd_full_criterion": (14, 31, 39),
    "liger_fused_linear_jsd": (6, 27, 4),
}

ASCENDING = "head and tail are cut from below, so the token on the boundary changes sides; we follow the AKL authors"
REWRITTEN = "the original's cross-entropy writes 0 over the student's infinite logits before the divergence sees them"
ZERO_PADDED = "where the teacher's vocabulary is larger, the original pads the student's logits with 0 instead of -inf"
DROPPED = "the original drops the infinite term of a column that only the teacher masks"


def excluded(method: str, case: Case, dtype: torch.dtype = torch.float64) -> dict[str, str]:
    """The values of a case that are not compared, each with its reason."""
    if method == "adaptive_kl" and case.impl in ("dskd", "kdflow"):
        return dict.fromkeys(case.expected, ASCENDING)
    if method == "kdflow_vanilla_kd" and case.params["kd_loss_fn"] == "akl":
        return dict.fromkeys(case.expected, ASCENDING)
    if method == "liger_fused_linear_jsd" and case.id == "liger_fused.3":
        return dict.fromkeys(set(case.expected) - {"hard_loss"}, ZERO_PADDED)
    if method == "dskd_full_criterion":
        found = {"student_logits_after": "what the original leaves in its input, no result"}
        divergence = ("loss", "kd_loss_over_denom", "grad_student_logits")
        if case.params["objective"] == "adaptive_kl":
            found |= dict.fromkeys(divergence, ASCENDING)
        elif case.id.endswith("neginf_teacher"):
            found |= dict.fromkeys(divergence, DROPPED)
        elif "neginf" in case.id:
            found |= dict.fromkeys((*divergence, "nll_loss_over_denom"), REWRITTEN)
        return found
    if method in DIVERGENCES and not used(case).any():
        means = [name for name, value in case.expected.items() if value.ndim == 0 and value.isnan()]
        return dict.fromkeys(means, "a mean of no tokens")
    ratios = ("head_ratio", "tail_ratio")
    if not case.expected.get("head_ratio", torch.zeros(1)).isfinite().all():
        return dict.fromkeys(ratios, "0/0 in the original, where student and teacher are equal")
    if case.id == "adaptive_kl.akl_original.neginf_student.mu0.5":
        return dict.fromkeys(ratios, "the original writes 0 over infinite logits, for the ratios alone")
    if case.id == "adaptive_kl.akl_original.peaked_agree.mu0.5" and dtype == torch.float32:
        return dict.fromkeys(ratios, "student and teacher differ by less than fp32 resolves")
    return {}


def tolerance(method: str, case: Case, dtype: torch.dtype) -> tuple[float, float]:
    rtol, atol = case.tolerance.get("rtol", 1e-8), case.tolerance.get("atol", 1e-10)
    if method == "jsd" and case.impl == "dskd":
        rtol, atol = 1e-6, 1e-7  # the original adds 1e-9 inside every logarithm
    return (rtol, atol) if dtype == torch.float64 else (max(rtol, 2e-4), max(atol, 1e-5))


def close(method: str, case: Case, name: str, actual: Tensor, expected: Tensor, *bounds: float) -> None:
    rtol, atol = (max(pair) for pair in zip(tolerance(method, case, actual.dtype), bounds or (0, 0), strict=True))
    torch.testing.assert_close(
        actual.detach().double(), expected, rtol=rtol, atol=atol, msg=lambda text: f"{case.id}: {name}: {text}"
    )


# --- the divergences --------------------------------------------------------------------------------------------------


def options(method: str, case: Case) -> dict[str, Any]:
    """The original's parameters under our names."""
    given = case.params
    found = {"temperature": given["temperature"]} | {name: given[name] for name in ("skew", "mu") if name in given}
    if method == "jsd":  # whatever an original calls beta or lambda
        found["beta"] = 1.0 - given.get("student_weight_in_mixture", 0.5)
    if case.impl == "distillkit":
        found["scale_by_temperature_squared"] = True
    return found


def logits(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = (case.inputs[f"{side}_logits"].to(dtype) for side in ("student", "teacher"))
    if case.params.get("use_tea_temp"):
        teacher = teacher / case.params["teacher_temperature"]
    return student.requires_grad_(), teacher


def used(case: Case) -> Tensor:
    return case.inputs["labels"] != -100


def reductions(method: str, case: Case) -> dict[str, tuple[bool, float]]:
    """Each loss that the original returns: are masked positions in it, and what is the sum divided by?"""
    positions, width = used(case), case.inputs["student_logits"].shape[-1]
    count = int(positions.sum())
    mean = count or math.nan
    if case.impl == "dskd":
        return {"loss": (False, 1)}
    if case.impl == "kdflow":
        return {"loss": (False, 1), "loss_mean": (False, mean * width if method == "forward_kl" else mean)}
    if case.impl.startswith("trl"):
        return {
            "loss": (False, max(1, count)),
            "loss_sum": (False, 1),
            "loss_mean": (False, mean * width),
            "loss_batchmean_no_labels": (True, len(positions)),
            "loss_num_items_7": (False, 7),
        }
    if case.impl == "liger_ref" and method == "tvd":
        count = max(1, count)
        return {"loss": (False, count), "loss_sum": (False, 1), "loss_mean": (False, count * width)}
    if case.impl == "liger_ref":
        return {"loss": (False, max(1, count)), "loss_no_labels": (True, positions.numel())}
    return {"loss": (False, mean)}


def expectations(method: str, case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], bool]:
    """What ours must give, and whether its gradient comes from finite differences."""
    omitted = excluded(method, case, dtype)
    values = {name: value for name, value in case.expected.items() if name not in omitted}
    if not values:
        return {}, False
    divide = reductions(method, case)

    def reduce(per_token: Tensor) -> dict[str, Tensor]:
        sums = {whole: per_token[used(case) | whole].sum() for whole in (False, True)}
        return {name: sums[whole] / divisor for name, (whole, divisor) in divide.items()}

    if case.impl == "distillm" and method in ("forward_kl", "skew_kl"):  # its values leave the teacher's entropy out
        entropy = torch.from_numpy(reference.entropy(case.inputs["teacher_logits"].numpy()))
        values["per_token"] = values["per_token"] - entropy
        if "loss" in values:
            values["loss"] = values["loss"] - reduce(entropy)["loss"]
    numeric = False
    if case.formula is not None:
        theirs = values.get("per_token", case.formula)
        agrees = torch.allclose(theirs, case.formula, rtol=1e-8) or not theirs.isfinite().all()
        numeric = not (agrees and case.expected["grad_student_logits"].isfinite().all())
        sums = {name: value for name, value in reduce(case.formula).items() if name in values}
        values |= {"per_token": case.formula, **sums}
    if numeric:
        student, teacher = (x.detach().numpy() for x in logits(case, torch.float64))
        rows = torch.from_numpy(reference.gradient(DIVERGENCES[method], student, teacher, **options(method, case)))
        divisor = divide["loss"][1] if used(case).any() else 1
        values["grad_student_logits"] = torch.where(used(case)[..., None], rows, 0.0) / divisor
    return values, numeric


def ours(method: str, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """All that an original may give, by kdflow."""
    name, given, positions = DIVERGENCES[method], options(method, case), used(case)
    student, teacher = logits(case, dtype)
    divergence = kdflow.get_divergence(name, **given)
    values = {"per_token": divergence(student.flatten(0, 1), teacher.flatten(0, 1)).view(positions.shape)}
    for loss, (whole, divisor) in reductions(method, case).items():
        chosen = positions | whole
        total = kdflow.testing.loss(name, given, {"logits": student[chosen]}, {"logits": teacher[chosen]}).value
        values[loss] = total / divisor
        if loss == "loss":
            (gradient,) = torch.autograd.grad(total, student)
            values["grad_student_logits"] = gradient / (divisor if positions.any() else 1)
    if name == "adaptive_kl":
        head, tail = divergence.ratios(*log_probabilities(student.flatten(0, 1), teacher.flatten(0, 1)))
        values |= {"head_ratio": head.view(positions.shape), "tail_ratio": tail.view(positions.shape)}
    return values


def compare_divergence(method: str, case: Case, dtype: torch.dtype) -> int:
    """Compare all that a case expects, and return how many values that is."""
    actual = ours(method, case, dtype)
    expected, numeric = expectations(method, case, dtype)
    compared = 0
    for name, value in expected.items():
        found, bounds = actual[name], ()
        if name == "grad_student_logits" and numeric:
            infinite = value.isnan()  # an infinite row has no gradient to compare with
            found, value, bounds = found.masked_fill(infinite, 0), value.masked_fill(infinite, 0), (2e-5, 2e-7)
        close(method, case, name, found, value, *bounds)
        compared += 1
    assert (actual["per_token"] >= 0).all()
    assert actual["grad_student_logits"].isfinite().all()
    if case.formula is not None:  # also of excluded cases: what is infinite or zero is so by any definition
        assert torch.equal(actual["per_token"].isinf(), case.formula.isinf())
        assert (actual["per_token"][case.formula == 0].abs() < 1e-6).all()
    return compared


# --- whole criterions -------------------------------------------------------------------------------------------------


def compare(method: str, case: Case, actual: dict[str, Tensor]) -> int:
    names = set(case.expected) - set(excluded(method, case))
    for name in names:
        close(method, case, name, actual[name], case.expected[name])
    assert not any(value.isnan().any() for value in actual.values())
    return len(names)


def gkd_compute_loss(method: str, case: Case, dtype: torch.dtype) -> int:
    student = case.inputs["student_logits_unshifted"].to(dtype).requires_grad_()
    labels = case.inputs["labels_unshifted"][:, 1:]
    chosen = labels != -100
    given = {
        "beta": case.params["beta"],
        "temperature": case.params["temperature"] if case.params["temperature_used"] else 1.0,
    }
    teacher = case.inputs["teacher_logits_unshifted"].to(dtype)[:, :-1][chosen]
    total = kdflow.testing.loss("jsd", given, {"logits": student[:, :-1][chosen]}, {"logits": teacher}).value
    loss = total / (case.params["num_items_in_batch"] or max(1, int(chosen.sum())))
    (gradient,) = torch.autograd.grad(loss, student)
    return compare(method, case, {"loss": loss, "grad_student_logits": gradient})


def kdflow_vanilla_kd(method: str, case: Case, dtype: torch.dtype) -> int:
    given, inputs = case.params, {name: x.to(dtype) for name, x in case.inputs.items() if x.is_floating_point()}
    name = {"kl": "forward_kl", "rkl": "reverse_kl", "jsd": "jsd", "akl": "adaptive_kl"}[given["kd_loss_fn"]]
    own = {"beta": 1.0 - given["jsd_beta"]} if name == "jsd" else {}
    hidden, weight = inputs["student_hidden"].requires_grad_(), inputs["student_lm_head"].requires_grad_()
    chosen = case.inputs["loss_mask"] > 0
    width = min(len(weight), len(inputs["teacher_lm_head"]))
    student = {
        "hidden": hidden[chosen],
        "head": Head(weight, valid_vocab=width),
        "labels": case.inputs["input_ids"].roll(-1, 1)[chosen],
    }
    teacher = {"hidden": inputs["teacher_hiddens_at_loss_positions"], "head": inputs["teacher_lm_head"]}

    def loss(ce_weight: float) -> Tensor:
        options = own | {"temperature": given["temperature"], "ce_weight": ce_weight}
        return kdflow.testing.loss(name, options, student, teacher).value / given["avg_micro_batch_token_num"]

    total = loss(1.0 - given["kd_ratio"])
    gradients = torch.autograd.grad(total, (hidden, weight))
    actual = dict(zip(("grad_student_hidden", "grad_student_lm_head"), gradients, strict=True))
    return compare(method, case, actual | {"loss": total, "kd_loss": loss(0.0), "ce_loss": loss(1.0)})


def dskd_full_criterion(method: str, case: Case, dtype: torch.dtype) -> int:
    given, chosen = case.params, used(case)
    own = {"skew_kl": {"skew": given["skew"]}, "adaptive_kl": {"mu": 1.0 - given["alpha"]}}
    name = {"skewed_forward_kl": "skew_kl"}.get(given["objective"], given["objective"])
    student, teacher = logits(case, dtype)

    def loss(ce_weight: float) -> Tensor:
        options = own.get(name, {}) | {"temperature": given["temperature"], "ce_weight": ce_weight}
        sides = {"logits": student[chosen], "labels": case.inputs["labels"][chosen]}, {"logits": teacher[chosen]}
        return kdflow.testing.loss(name, options, *sides).value / given["batch_denom"]

    total = loss(1.0 - given["kd_rate"])
    (gradient,) = torch.autograd.grad(total, student)
    actual = {"loss": total, "kd_loss_over_denom": loss(0.0), "nll_loss_over_denom": loss(1.0)}
    return compare(method, case, actual | {"grad_student_logits": gradient})


def liger_fused_linear_jsd(method: str, case: Case, dtype: torch.dtype) -> int:
    given = case.params
    inputs = {name: x.to(dtype).requires_grad_() for name, x in case.inputs.items() if x.is_floating_point()}
    chosen = case.inputs["labels"] != -100
    heads = [Head(inputs[f"{side}_lm_head"], inputs.get(f"{side}_bias")) for side in ("student", "teacher")]
    rows = [inputs[f"{side}_hidden"][chosen] for side in ("student", "teacher")]
    divergence = kdflow.get_divergence("jsd", beta=given["beta"], temperature=given["temperature"])
    assert given["weight_hard_loss"] + given["weight_soft_loss"] == 1

    def loss(ce_weight: float) -> Tensor:
        with ops.chunk_rows(2):
            total = ops.divergence_sum(
                rows[0], heads[0], rows[1], heads[1], divergence,
                targets=case.inputs["labels"][chosen], ce_weight=ce_weight,
            )  # fmt: skip
        return total / max(1, int(chosen.sum()))

    total = loss(given["weight_hard_loss"])
    actual = {"loss": total, "soft_loss": loss(0.0), "hard_loss": loss(1.0)}
    for name in case.expected:
        if name.startswith("grad_"):
            (actual[name],) = torch.autograd.grad(total, inputs[name.removeprefix("grad_")], retain_graph=True)
    return compare(method, case, actual)


# --- the tests --------------------------------------------------------------------------------------------------------

COMPARE: dict[str, Callable[[str, Case, torch.dtype], int]] = {
    **dict.fromkeys(DIVERGENCES, compare_divergence),
    "gkd_compute_loss": gkd_compute_loss,
    "kdflow_vanilla_kd": kdflow_vanilla_kd,
    "dskd_full_criterion": dskd_full_criterion,
    "liger_fused_linear_jsd": liger_fused_linear_jsd,
}
CASES = [(method, case) for method in COMPARE for case in cases(method)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("method", "case"), CASES, ids=[case.id for _, case in CASES])
def test_case(method: str, case: Case, dtype: torch.dtype) -> None:
    COMPARE[method](method, case, dtype)


def test_no_case_is_skipped_in_silence() -> None:
    counts = dict.fromkeys(COUNTS, (0, 0, 0))
    for method, case in CASES:
        number, compared, omitted = counts[method]
        reasons = excluded(method, case)
        assert all(reasons.values())
        counts[method] = (number + 1, compared + COMPARE[method](method, case, torch.float64), omitted + len(reasons))
    assert counts == COUNTS


def test_infinite_formulas_are_among_the_cases() -> None:
    formulas = [(method, case.formula) for method, case in CASES if case.formula is not None]
    infinite = Counter(method for method, formula in formulas if formula.isinf().any())
    assert infinite == {"forward_kl": 4, "reverse_kl": 5, "adaptive_kl": 5}
