"""The algorithms between tokenizers against what the code of their authors gave on the same inputs."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import kdflow
from kdflow.algorithms import dskd, min_edit, overlap
from kdflow.contracts import ModelSpec, TargetAlignment
from kdflow.tokenizers.nearest import nearest
from tests.support.vectors import DIRECTORY, Case, cases

PRECISE = {"rtol": 1e-8, "atol": 1e-10}


@cache
def raw(method: str) -> dict[str, dict[str, Any]]:
    """The cases of a method as they are written, by id."""
    found = json.loads((DIRECTORY / method / "cases.json").read_text(encoding="utf-8"))["cases"]
    return {case["id"]: case for case in found}


def same(actual: Any, expected: Any, **bounds: float) -> None:
    actual, expected = (
        x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in (actual, expected)
    )
    torch.testing.assert_close(torch.as_tensor(actual).double(), torch.as_tensor(expected).double(),
                               **(bounds or PRECISE))  # fmt: skip


def by_id(method: str, *without: str) -> Any:
    chosen = [case for case in cases(method) if case.id not in without]
    return pytest.mark.parametrize("case", chosen, ids=str)


# --- universal logit distillation -------------------------------------------------------------------------------------


def answer(labels: Tensor) -> tuple[int, int]:
    """Where the logits begin that predict a row's answer, and how many there are; labels stand at their own token."""
    found = (labels != -100).nonzero().flatten()
    return (max(int(found[0]) - 1, 0), len(found)) if len(found) else (0, 0)


@by_id("uld_original", "uld_original.one_row_all_masked")  # a mean over no tokens is NaN there
def test_uld_is_its_authors(case: Case) -> None:
    given = case.params
    student, teacher = case.inputs["student_logits"].clone().requires_grad_(), case.inputs["teacher_logits"]
    options = {name: given[name] for name in ("student_temperature", "teacher_temperature")}
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(student)):
        (start, count), (teacher_start, teacher_count) = (
            answer(case.inputs[f"{side}_labels_unshifted"][row]) for side in ("student", "teacher")
        )
        count, teacher_count = count - given["skip_student_eos"], teacher_count - given["skip_teacher_eos"]
        found = kdflow.testing.loss(
            "uld", {**options, "aligner": "identity"}, {"logits": student[row, start : start + count]},
            {"logits": teacher[row, teacher_start : teacher_start + teacher_count]},
        )  # fmt: skip
        total = total + found.value / min(count, teacher_count) / len(student)
    total = total * given["distillation_weight"]
    same(total, case.expected["distillation_loss"])
    (gradient,) = torch.autograd.grad(total, student)
    same(gradient, case.expected["grad_student_logits_distillation"])


@by_id("uld_dskd", *(name for name, case in raw("uld_dskd").items() if case.get("raises")))
def test_uld_is_dskds(case: Case) -> None:
    student, teacher = case.inputs["student_logits"].clone().requires_grad_(), case.inputs["teacher_logits"]
    labels, teacher_labels = case.inputs["student_labels_shifted"], case.inputs["teacher_labels_shifted"]
    ours, theirs = (side != -100 for side in (labels, teacher_labels))
    spans: list[list[int]] = [[], []]
    for row in range(len(student)):  # position i after the first labelled one, where both sides have a label
        first, teacher_first = int(ours[row].int().argmax()), int(theirs[row].int().argmax())
        length = student.shape[1]
        both = [i for i in range(length) if ours[row].roll(-first)[i] and theirs[row].roll(-teacher_first)[i]]
        number = {i: row * length + i for i in both}
        for side, mask, start in ((spans[0], ours[row], first), (spans[1], theirs[row], teacher_first)):
            side += [number.get((at - start) % length, -1) for at in mask.nonzero().flatten().tolist()]
    compact = {number: at for at, number in enumerate(sorted({n for side in spans for n in side if n >= 0}))}
    alignment = TargetAlignment(*(np.array([compact.get(n, -1) for n in side], np.int64) for side in spans))
    rate = case.params.get("kd_rate", 1.0)
    found = kdflow.testing.loss(
        "uld", {"aligner": "identity", "ce_weight": 1 - rate}, {"logits": student[ours], "labels": labels[ours]},
        {"logits": teacher[theirs], "labels": teacher_labels[theirs]}, alignment=alignment,
    )  # fmt: skip
    total = found.value / case.params.get("batch_denom", 1.0)
    same(total, case.expected["loss"])
    (gradient,) = torch.autograd.grad(total, student)
    same(gradient, case.expected["grad_student_logits"])


def groups(ends: list[int], teacher_ends: list[int]) -> tuple[list[int], list[int]]:
    """GOLD's: both sides are cut where both end at the same byte; what is left over on both is one more group."""
    sides: tuple[list[int], list[int]] = ([-1] * len(ends), [-1] * len(teacher_ends))
    i = j = a = b = number = 0
    while i < len(ends) and j < len(teacher_ends):
        e, f = ends[i], teacher_ends[j]
        i, j = i + (e <= f), j + (f <= e)
        if e == f:
            sides[0][a:i], sides[1][b:j] = [number] * (i - a), [number] * (j - b)
            a, b, number = i, j, number + 1
    if a < len(ends) and b < len(teacher_ends):
        sides[0][a:], sides[1][b:] = [number] * (len(ends) - a), [number] * (len(teacher_ends) - b)
    return sides


def is_bayesian(case: Case) -> bool:
    """With logits that predict, as ours; "observed" takes those at the tokens, and the hybrid loss is another one."""
    given = case.params
    return given.get("uld_token_merge_strategy") == "bayesian" and not given["uld_use_hybrid_loss"]


GOLD = [case for case in cases("uld_gold") if is_bayesian(case)]


@pytest.mark.parametrize("case", GOLD, ids=str)
def test_merged_spans_are_golds(case: Case) -> None:
    given, inputs = case.params, case.inputs
    student = inputs["student_logits"].clone().requires_grad_()
    losses = []
    for row in range(len(student)):
        at = []
        for side in ("student", "teacher"):
            positions = (inputs[f"{side}_labels_unshifted"][row] != -100).nonzero().flatten()
            at.append((int(positions[0]), len(positions) - given[f"uld_skip_{side}_eos"]))
        ends = [
            inputs[f"{side}_byte_offsets"][row, start : start + count, 1].tolist()
            for side, (start, count) in zip(("student", "teacher"), at, strict=True)
        ]
        numbers = groups(*ends) if given["use_extended_uld"] else tuple(
            [n if n < min(len(e) for e in ends) else -1 for n in range(len(end))] for end in ends
        )  # fmt: skip
        if 0 in (start for start, _ in at):  # nothing predicts the first token: its group is left out
            numbers = tuple([n - 1 if n > 0 else -1 for n in side] for side in numbers)
        sides: list[dict[str, Tensor]] = []
        spans = []
        for side, tensor, (start, _), of_side in zip(
            ("student", "teacher"), (student, inputs["teacher_logits"]), at, numbers, strict=True
        ):
            chosen = [start + i for i, number in enumerate(of_side) if number >= 0]
            sides.append(
                {"logits": tensor[row, [i - 1 for i in chosen]], "labels": inputs[f"{side}_input_ids"][row, chosen]}
            )
            spans.append(np.array([number for number in of_side if number >= 0], np.int64))
        options = {f"{side}_temperature": given[f"uld_{side}_temperature"] for side in ("student", "teacher")}
        found = kdflow.testing.loss("uld", options, *sides, alignment=TargetAlignment(*spans))
        losses.append(found.value / max(1, max(spans[0], default=-1) + 1))
    total = given["uld_distillation_weight"] * torch.stack(losses).mean()
    if given["uld_crossentropy_weight"]:
        labels = inputs["student_labels_unshifted"][:, 1:]
        total = total + given["uld_crossentropy_weight"] * cross_entropy(
            student[:, :-1].flatten(0, 1), labels.flatten()
        )
    same(total, case.expected["loss"])
    (gradient,) = torch.autograd.grad(total, student)
    same(gradient, case.expected["grad_student_logits"])


def test_gold_cases_are_compared() -> None:
    assert len(GOLD) >= 9


# --- minimum edit -----------------------------------------------------------------------------------------------------


def spelt(token: str) -> bytes:
    """The text of a token of the toy vocabularies, with a space for either word mark."""
    return token.replace("Ġ", " ").replace("▁", " ").encode()


def pairs_of(student: list[str], teacher: list[str]) -> tuple[list[int], list[int]]:
    path = kdflow.get_aligner("min_edit").align([*map(spelt, student)], [*map(spelt, teacher)]).path
    assert path is not None
    alignment = TargetAlignment(np.zeros(len(student), int), np.zeros(len(teacher), int), np.array(path))
    ours, theirs = min_edit.partners(alignment)
    return ours.tolist(), theirs.tolist()


def test_the_vocabulary_map_is_fusellms() -> None:
    (case,) = raw("mined_vocab_mapping").values()
    given, expected = case["json_inputs"], case["alignment"]["blending_to_base"]
    student, teacher = given["student_vocab_in_order"], given["teacher_vocab_in_order"]
    found = nearest([*map(spelt, teacher)], [*map(spelt, student)])
    assert [student[at] for at in found] == [expected[token.replace("Ġ", "▁")] for token in teacher]


TRANSFORMED = [
    (method, name) for method in ("mined_transform_topk", "mined_transform_toy") for name, case in raw(method).items()
    # GPT-NeoX has a rule of its own for the first token; byte-map letters are compared with characters outside ASCII.
    if "special_case" not in name and not case.get("raises") and "emoji" not in name and "mixed" not in name
]  # fmt: skip


@pytest.mark.parametrize(("method", "name"), TRANSFORMED)
def test_top_logits_are_moved_as_fusellms(method: str, name: str) -> None:
    case = raw(method)[name]
    given, soft = case["json_inputs"], case["params"]["vocab_align_type"] == "soft"
    marks = case["params"].get("teacher_boundary", "Ġ"), case["params"].get("student_boundary", "▁")
    if "teacher_vocab_in_order" in given:
        names = dict(enumerate(given["teacher_vocab_in_order"]))
        known = {token: at for at, token in enumerate(given["student_vocab_in_order"])}
    else:
        names = {int(at): token for at, token in given["teacher_id_to_token"].items()}
        known = given["student_vocab_subset"]
    tokens = {at: token for token, at in known.items()}
    swapped = {at: token.replace(*marks) for at, token in names.items()}
    if soft:
        swapped = {at: given["blending_to_base"][token] for at, token in swapped.items()}
    ids = torch.tensor([known.get(swapped.get(at, ""), -1) for at in range(max(names) + 1)])
    student, teacher = ([tokens[at] for at in given["student_input_ids"]],
                        [names[at] for at in given["teacher_input_ids"]])  # fmt: skip
    ours, theirs = pairs_of([t.replace(marks[1], " ") for t in student], [t.replace(marks[0], " ") for t in teacher])
    partner = dict(zip(ours, theirs, strict=True))
    compared = 0
    for at, token in enumerate(student):
        expected = case["alignment"]["aligned_ids"][at]
        mate = partner.get(at)
        if mate is None or ids[given["teacher_input_ids"][mate]] != known[token]:
            assert expected == [known[token]]  # the reference token, where there is no partner
            continue
        top = torch.tensor([given["teacher_per_step_ids"][mate]])
        columns, dropped = min_edit.moved_ids(top, ids)
        assert columns[~dropped].tolist() == expected
        logits = torch.tensor([given["teacher_per_step_logits"][mate]], dtype=torch.float64)
        same(logits[~dropped], case["alignment"]["aligned_logits"][at])
        compared += 1
    assert compared or method == "mined_transform_toy"


@by_id("mined_dskd")
def test_min_edit_is_dskds_forward_kl(case: Case) -> None:
    given, words = case.params, raw("mined_dskd")[case.id]["json_inputs"]
    student, teacher = case.inputs["student_logits"].clone().requires_grad_(), case.inputs["teacher_logits"]
    names, teacher_names = words["student_vocab_in_order"], words["teacher_vocab_in_order"]
    ids = torch.full((len(teacher_names),), -1)
    for ours, theirs in words["student_to_teacher_id"].items():
        ids[theirs] = int(ours)
    temperature, total, nll = given["kd_temperature"], 0.0, 0.0
    divergence = kdflow.get_divergence("forward_kl")
    for row in range(len(student)):
        at, teacher_at = (
            (case.inputs[f"{side}_labels_shifted"][row] != -100).nonzero().flatten() for side in ("student", "teacher")
        )
        inputs, teacher_inputs = (
            case.inputs["student_input_ids"][row, at],
            case.inputs["teacher_input_ids"][row, teacher_at],
        )
        partner = dict(
            zip(*pairs_of([names[i] for i in inputs], [teacher_names[i] for i in teacher_inputs]), strict=True)
        )
        labels = case.inputs["student_labels_shifted"][row, at]
        for place, (position, label) in enumerate(zip(at.tolist(), labels.tolist(), strict=True)):
            logits = student[row, position][None] / temperature
            mate = partner.get(place)
            if mate is not None and words["teacher_to_student_id"][teacher_inputs[mate]] == inputs[place]:
                # What the original's map back does not reach has no probability there, also none as the rest.
                known = teacher[row, teacher_at[mate]].masked_fill(ids < 0, -torch.inf)[None] / temperature
                total = total + min_edit.moved_divergence(logits, known, ids, len(ids), divergence).sum()
            else:
                total = total + cross_entropy(logits, torch.tensor([label]))
        nll = nll + cross_entropy(student[row, at], labels, reduction="sum")
    same(total / given["batch_denom"], case.expected["kd_loss_over_denom"])
    whole = ((1 - given["kd_rate"]) * nll + given["kd_rate"] * total) / given["batch_denom"]
    same(whole, case.expected["loss"])
    same(torch.autograd.grad(whole, student)[0], case.expected["grad_student_logits"])


@by_id("mined_fusellm_loss")
def test_the_loss_on_moved_logits_is_fusellms_to_its_rounding(case: Case) -> None:
    """Their targets are rounded to bf16; ours, for all positions with targets of their own, agree as far as that."""
    given, rows = case.params, raw("mined_fusellm_loss")[case.id]["json_inputs"]["rows"]
    logits, mask = case.inputs["student_logits_unshifted"], case.inputs["attention_mask"]
    forward_kl, width = kdflow.get_divergence("forward_kl"), logits.shape[-1]
    total = 0.0
    for number, row in enumerate(rows):
        for at in mask[number].nonzero().flatten().tolist():
            if at >= len(row["input_ids"]):
                values, ids = [0.0], [given["pad_id"]]
            elif row["aligned_ids"][at]:
                values, ids = row["aligned_logits"][at], row["aligned_ids"][at]
            else:
                values, ids = row["base_logits"][at], row["base_ids"][at]
            target = torch.full((1, width), -torch.inf, dtype=torch.float64)
            target[0, ids] = torch.tensor(values, dtype=torch.float64) / given["distill_teacher_temperature"]
            kd = min_edit.moved_divergence(logits[number, at][None], target, torch.arange(width), width, forward_kl)
            probabilities = target.softmax(-1)
            entropy = (
                -torch.special.xlogy(probabilities, probabilities).sum() if given["distill_loss_type"] == "ce" else 0
            )
            total = total + kd.sum() + entropy
    weight = given["lm_loss_weight"]
    same(
        weight * case.expected["lm_loss"] + (1 - weight) * total / mask.sum(), case.expected["loss"], rtol=2e-3, atol=0
    )


# --- dual space -------------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "forward_kl": "forward_kl", "reverse_kl": "reverse_kl", "js_divergence": "jsd", "skewed_forward_kl": "skew_kl",
    "skewed_reverse_kl": "skew_reverse_kl",
}  # fmt: skip


def projectors(case: Case, *, attention: bool) -> dskd.Projectors:
    sizes = [case.inputs[f"{side}_hidden"].shape[-1] for side in ("student", "teacher")]
    specs = [
        ModelSpec(size, len(case.inputs[f"{side}_lm_head"]))
        for side, size in zip(("student", "teacher"), sizes, strict=True)
    ]
    found = dskd.Projectors(*specs, attention, torch.arange(specs[1].vocab_size)).double()
    for name, parameter in found.named_parameters():
        parameter.data.copy_(case.inputs[name.replace(".", "_")])
    return found


def dskd_options(case: Case, alignment: str) -> dict[str, Any]:
    given = case.params
    return {
        "alignment": alignment, "divergence": OBJECTIVES[given["kd_objective"]], "ce_weight": 1 - given["kd_rate"],
        "temperature": given["kd_temperature"], "teacher_temperature": given.get("teacher_temperature", 1.0),
    }  # fmt: skip


def compare_dskd(case: Case, found: Any, module: torch.nn.Module, leaves: dict[str, Tensor], **bounds: float) -> None:
    denominator = case.params["batch_denom"]
    total = found.value / denominator
    same(total, case.expected["loss"], **bounds)
    for name in ("t2s_ce", "t2s_kd", "s2t_kd"):
        same(found.metrics[name][0] / denominator, case.expected[f"{name}_loss_over_denom"], **bounds)
    if "ce" in found.metrics:
        same(found.metrics["ce"][0] / denominator, case.expected["nll_loss_over_denom"], **bounds)
    same(found.metrics["t2s_accuracy"][0] / denominator, case.expected["t2s_acc_over_denom"])
    wanted = {**leaves, **{name.replace(".", "_"): p for name, p in module.named_parameters()}}
    gradients = torch.autograd.grad(total, tuple(wanted.values()), allow_unused=True)
    for name, gradient in zip(wanted, gradients, strict=True):
        assert gradient is not None
        same(gradient, case.expected[f"grad_{name}"], **bounds)


@by_id("dskd_same_vocab")
def test_dskd_of_one_vocabulary_is_its_authors(case: Case) -> None:
    if case.params["kd_objective"] == "adaptive_kl":
        pytest.skip("head and tail are cut from below, so the token on the boundary changes sides")
    mask = case.inputs["labels_shifted"] != -100
    leaves = {name: case.inputs[name].clone().requires_grad_() for name in ("student_hidden", "student_lm_head")}
    module, labels = projectors(case, attention=False), case.inputs["labels_shifted"][mask]
    found = kdflow.testing.loss(
        "dskd", dskd_options(case, "same"),
        {"hidden": leaves["student_hidden"][mask], "head": leaves["student_lm_head"], "labels": labels},
        {"hidden": case.inputs["teacher_hidden"][mask], "head": case.inputs["teacher_lm_head"], "labels": labels},
        module=module,
    )  # fmt: skip
    bounds = {"rtol": 1e-6, "atol": 1e-7} if case.params["kd_objective"] == "js_divergence" else {}
    compare_dskd(case, found, module, leaves, **bounds)


# 2: adaptive KL, cut from below there; 3: the projectors alone are trained there.
@by_id("dskd_cma", "dskd_cma.2", "dskd_cma.3")
def test_cross_model_attention_is_its_authors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = {side: case.inputs[f"{side}_labels_shifted"] != -100 for side in ("student", "teacher")}
    leaves = {name: case.inputs[name].clone().requires_grad_() for name in ("student_hidden", "student_lm_head")}
    sides = {}
    for side, mask in masks.items():
        table = case.inputs[f"{side}_embed_tokens"]
        sides[side] = {
            "hidden": (leaves["student_hidden"] if side == "student" else case.inputs["teacher_hidden"])[mask],
            "head": leaves["student_lm_head"] if side == "student" else case.inputs["teacher_lm_head"],
            "labels": case.inputs[f"{side}_labels_shifted"][mask], "inputs": case.inputs[f"{side}_input_ids"][mask],
            "response": mask.nonzero()[:, 0], "embed": table.__getitem__,
        }  # fmt: skip
    # Their standard deviations are over the whole padded tensor: index embeddings, states, target embeddings.
    table, mask = case.inputs["teacher_embed_tokens"], masks["teacher"]
    targets = table[case.inputs["teacher_labels_shifted"].where(mask, 0)]
    index = torch.cat([table[case.inputs["teacher_input_ids"].where(mask, 0)], targets], -1)
    theirs = iter([index.std(), case.inputs["teacher_hidden"].std(), targets.std()])
    monkeypatch.setattr(dskd, "deviation", lambda values, response: next(theirs))
    module = projectors(case, attention=True)
    found = kdflow.testing.loss("dskd", dskd_options(case, "cma"), sides["student"], sides["teacher"], module=module)
    compare_dskd(case, found, module, leaves)


# --- overlap ----------------------------------------------------------------------------------------------------------

CTKD = [case for case in raw("kdflow_simple_ctkd") if case.startswith("kdflow_ctkd")]


@pytest.mark.parametrize("name", CTKD)
def test_overlap_is_kdflows_at_the_positions_that_it_aligns(name: str) -> None:
    (case,) = (case for case in cases("kdflow_simple_ctkd") if case.id == name)
    words, given = raw("kdflow_simple_ctkd")[name]["json_inputs"], case.params
    vocabularies = [[t.replace("Ġ", "▁") for t in words[f"{side}_vocab_in_order"]] for side in ("student", "teacher")]
    columns = [[], []]
    for at, token in enumerate(vocabularies[0]):
        if token in vocabularies[1]:
            columns[0].append(at)
            columns[1].append(vocabularies[1].index(token))
    columns[0].append(words["student_vocab_in_order"].index(words["student_eos"]))
    columns[1].append(words["teacher_vocab_in_order"].index(words["teacher_eos"]))
    masks = [case.inputs[f"{side}_loss_mask"] > 0 for side in ("student", "teacher")]
    labels = [
        case.inputs[f"{side}_input_ids"].roll(-1, 1)[m] for side, m in zip(("student", "teacher"), masks, strict=True)
    ]
    tokens = [[v[i] for i in of_side] for v, of_side in zip(vocabularies, labels, strict=True)]
    ours, theirs = kdflow_alignment(tokens, [words["student_eos"], words["teacher_eos"]])
    spans = [np.full(len(side), -1) for side in tokens]
    spans[0][ours], spans[1][theirs] = np.arange(len(ours)), np.arange(len(theirs))
    leaves = {key: case.inputs[key].clone().requires_grad_() for key in ("student_hidden", "student_lm_head")}
    module = overlap.SharedColumns(ModelSpec(1, 1), ModelSpec(1, 1))
    module.student, module.teacher = (torch.tensor(side) for side in columns)
    weight = 1 - given["kd_ratio"]
    names = {"kl": "forward_kl", "rkl": "reverse_kl", "tvd": "tvd", "skl": "skew_kl", "srkl": "skew_reverse_kl"}
    divergence = names.get(given["kd_loss_fn"]) or {"name": "jsd", "beta": 1 - given["jsd_beta"]}
    found = kdflow.testing.loss(
        "overlap", {"divergence": divergence, "temperature": given["kd_temperature"], "ce_weight": weight},
        {"hidden": leaves["student_hidden"][masks[0]], "head": leaves["student_lm_head"], "labels": labels[0]},
        {"hidden": case.inputs["teacher_hiddens_at_loss_positions"], "head": case.inputs["teacher_lm_head"]},
        module=module, alignment=TargetAlignment(*spans),
    )  # fmt: skip
    total = found.value / given["avg_micro_batch_token_num"]
    same(total, case.expected["loss"])
    for key, leaf in leaves.items():
        same(torch.autograd.grad(total, leaf, retain_graph=True)[0], case.expected[f"grad_{key}"])


@pytest.mark.parametrize("case", raw("kdflow_token_alignment").values(), ids=lambda case: case["id"])
def test_the_positions_are_those_that_kdflow_aligns(case: dict[str, Any]) -> None:
    tokens, ends = ([source[f"{side}_{key}"] for side in ("student", "teacher")]
                    for key, source in (("tokens", case["json_inputs"]), ("eos", case["params"])))  # fmt: skip
    expected = case["alignment"]["simple_ctkd"]
    assert kdflow_alignment(tokens, ends) == (expected["student_idx"], expected["teacher_idx"])


def kdflow_alignment(tokens: list[list[str]], ends: list[str]) -> tuple[list[int], list[int]]:
    """KDFlow's: it walks both sides while the texts so far are equal, and gives up after the first that differs."""
    student, teacher = ([token.replace("▁", "").replace("Ġ", "") for token in side] for side in tokens)
    if student == teacher:
        return list(range(len(student))), list(range(len(student)))
    i = k = 0
    past, teacher_past, found = "", "", ([], [])
    while k < len(student) and i < len(teacher):
        equal = student[k] == teacher[i] or [student[k], teacher[i]] == ends
        if past == teacher_past and equal:
            found[0].append(k)
            found[1].append(i)
        if len(teacher_past) > len(past):
            past, k = past + student[k], k + 1
        elif len(teacher_past) < len(past):
            teacher_past, i = teacher_past + teacher[i], i + 1
        else:
            past, teacher_past = (past + teacher[i], teacher_past + teacher[i]) if equal and past == teacher_past else (
                past + student[k], teacher_past + teacher[i])  # fmt: skip
            k, i = k + 1, i + 1
    return found
