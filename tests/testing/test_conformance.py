"""The kits pass what is built in, and name what is wrong with broken plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kdflow
from kdflow import Divergence, Options, plugins
from kdflow.testing import check_algorithm, check_divergence, loss
from tests.support.commands import site
from tests.support.distributions import MIMIC, SQUARED, plugin

__all__ = ["site"]

BUILT_IN: list[tuple[str, dict[str, Any]]] = [
    ("forward_kl", {}),
    ("forward_kl", {"temperature": 2.0, "scale_by_temperature_squared": True}),
    ("reverse_kl", {}),
    *(("jsd", {"beta": beta}) for beta in (0.0, 0.1, 0.5, 1.0)),
    ("skew_kl", {}),
    ("skew_kl", {"skew": 0.0}),
    ("skew_reverse_kl", {}),
    *(("adaptive_kl", {"mu": mu}) for mu in (0.0, 0.5, 1.0)),
    ("tvd", {}),
    ("sorted_l1", {}),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [("sft", {}), ("gkd", {})]
ACROSS_TOKENIZERS: list[tuple[str, dict[str, Any]]] = [
    ("uld", {}),
    ("uld", {"merge": "skip", "aligner": "identity", "ce_weight": 0.5}),
    ("min_edit", {"top_k": 3}),
    ("min_edit", {"divergence": {"name": "jsd", "beta": 0.3}, "ce_weight": 1.0}),
    ("overlap", {"divergence": "reverse_kl", "temperature": 2.0}),
    *(("dskd", {"alignment": alignment, "ce_weight": 0.5}) for alignment in ("same", "cma", "eta")),
    ("dskd", {"initialise": "random"}),
]


@pytest.mark.parametrize(("name", "options"), BUILT_IN, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_built_in_divergences_pass(name: str, options: dict[str, Any], seed: int) -> None:
    check_divergence(kdflow.get_divergence(name, **options), seed=seed, vocab_size=9 + 50 * seed)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *BUILT_IN,
        *ACROSS_TOKENIZERS,
        *OTHERS,
        ("jsd", {"ce_weight": 0.3}),
        ("sft", {"label_smoothing": 0.1}),
        ("gkd", {"divergence": {"name": "skew_kl", "skew": 0.3}, "temperature": 2.0}),
    ],
    ids=str,
)
def test_the_built_in_algorithms_pass(name: str, options: dict[str, Any]) -> None:
    check_algorithm(name, options)


@pytest.mark.parametrize(("kind", "tried"), [("divergence", BUILT_IN), ("algorithm", [*ACROSS_TOKENIZERS, *OTHERS])])
def test_every_built_in_plugin_is_among_them(kind: str, tried: list[tuple[str, dict[str, Any]]]) -> None:
    own = {entry.name for entry in plugins.load().of_kind(kind) if entry.plugin.distribution == "kdflow"}
    assert own == {name for name, _ in tried}


# --- broken divergences -----------------------------------------------------------------------------------------------


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)


def divergence(function: Callable[[Tensor, Tensor], Tensor]) -> Divergence:
    class Given(Divergence):
        name = "given"
        Options = Options

        def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
            return function(student_logits, teacher_logits)

    return Given()


def test_a_sound_divergence_passes() -> None:
    check_divergence(divergence(total_variation))


def forward_kl_with_nan(student: Tensor, teacher: Tensor) -> Tensor:
    return (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)


def nan_at_equality(student: Tensor, teacher: Tensor) -> Tensor:
    gap = total_variation(student, teacher)
    return gap * gap / gap if student.shape[-1] > 1 else gap


def uneven(student: Tensor, teacher: Tensor) -> Tensor:
    return total_variation(student, teacher) * student.nan_to_num(neginf=0).abs().amax(-1).detach()


def shared_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    values = total_variation(student, teacher)
    return values.detach() + (values - values.detach()) / len(values)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda s, t: total_variation(s, t) - 0.5, "negative values"),
        (lambda s, t: -total_variation(s, t), "negative values"),
        (lambda s, t: total_variation(s, t) + 0.1, "not 0"),
        (lambda s, t: total_variation(s, t) + (s - s.detach()).nan_to_num().sum(-1), "the gradient is not 0"),
        (nan_at_equality, "equal logits .*not finite"),
        (lambda s, t: total_variation(s, t).sqrt(), "gradients are not finite"),
        (forward_kl_with_nan, "-inf on both sides .*not finite"),
        (lambda s, t: total_variation(s, t) * (s - t).exp().sum(-1), "not finite"),
        (uneven, "changes when logits are shifted"),
        (lambda s, t: total_variation(s, t).mean(), "the shape"),
        (lambda s, t: total_variation(s, t).mean().expand(len(s)), "a row's value depends on the other rows"),
        (shared_gradient, "a row's gradient depends on the other rows"),
        (lambda s, t: (s.softmax(-1) - t.softmax(-1)).abs(), "the shape"),
        (lambda s, t: total_variation(s, t).detach(), "carry no gradient"),
        (
            lambda s, t: torch.stack([total_variation(a, b) for a, b in zip(s, t, strict=True)]),
            r"logits \[0, 17\]: .*stack",
        ),
    ],
)
def test_a_broken_divergence_fails(function: Callable[[Tensor, Tensor], Tensor], complaint: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)given.*({complaint})"):
        check_divergence(divergence(function))


# --- third-party plugins ----------------------------------------------------------------------------------------------


def assert_found(complaint: str) -> None:
    """The algorithm 'broken' fails the check with this complaint, or passes where there is none."""
    if not complaint:
        check_algorithm("broken")
        return
    with pytest.raises(AssertionError, match=rf"(?s)^broken.*{complaint}"):
        check_algorithm("broken")


BROKEN = """
import kdflow
import torch
from kdflow.contracts import LossSum

class Broken(kdflow.Algorithm):
    name = "broken"
    def loss(self, student, teacher, batch):
        student_logits = student.head.logits(student.rows)
        gap = (student_logits.softmax(-1) - teacher.head.logits(teacher.rows).softmax(-1)).square().sum(-1)
        count = len(gap)
        return LossSum({value}, {metrics})

@kdflow.hookimpl
def kdflow_algorithms():
    return [Broken]
"""


@pytest.fixture
def install(site: Path) -> Iterator[Callable[[str, str], None]]:
    """Installs a plugin for one test."""

    def put(module: str, source: str) -> None:
        plugin(module, source).install(site)
        plugins.load.cache_clear()  # type: ignore[attr-defined]

    yield put
    plugins.load.cache_clear()  # type: ignore[attr-defined]


def test_a_third_partys_divergence_passes_both_kits(install: Callable[[str, str], None]) -> None:
    install("kdflow_squared", SQUARED)
    check_divergence(kdflow.get_divergence("squared", factor=2.0))
    check_algorithm("squared", {"factor": 2.0, "ce_weight": 0.1})


def test_an_algorithm_with_a_module_of_its_own_passes(install: Callable[[str, str], None]) -> None:
    install("kdflow_mimic", MIMIC)
    for dtype in (torch.float64, torch.bfloat16):  # what build makes follows the rows
        assert loss("mimic", {}, *[{"logits": torch.ones(2, 3, dtype=dtype)}] * 2).value > 0
    check_algorithm("mimic")
    check_algorithm("mimic", {"weight": 3.0}, module=torch.nn.Linear(8, 12, bias=False))


@pytest.mark.parametrize(
    ("value", "metrics", "complaint"),
    [
        ("gap.sum()", "{}", ""),
        ("gap.mean() if count else gap.sum()", "{}", "not a sum"),
        ("gap.sum() / max(1, count)", "{}", "not a sum"),
        ("gap.mean()", "{}", "no rows give a loss of nan"),
        ("gap.sum() if count else torch.tensor(0.0)", "{}", "the loss of 0 rows has no graph"),
        ("gap.sum() if count else student.head.weight.sum() * 0", "{}", "reach .*'head', 'hidden'.* but with"),
        ("gap.detach().sum() + (gap - gap.detach()).sum() / max(1, count)", "{}", "the gradient of hidden .* not a"),
        ("gap.sum() + 1", "{}", "no rows give a loss of 1.0, not 0"),
        ("gap", "{}", r"value is a scalar tensor, but its value is a Tensor of the shape \[4\]|\[9\]"),
        ("gap.sum().to(torch.complex64)", "{}", "the loss is of torch.complex64, not of real numbers"),
        ("gap.detach().sum()", "{}", "has no graph"),
        ("gap.detach().sum() + student.head.weight.sum() * 0", "{}", "the hidden states get no gradient"),
        ("gap.sum()", "{'gap': (gap.sum(), count)} if count else {}", r"metrics are \['gap'\], but with other .*\[\]"),
        ("gap.sum()", "{'gap': gap.sum()}", r"metrics map names to pairs of a sum, .* but 'gap' maps to a Tensor"),
        ("gap.sum()", "{'gap': (gap, count)}", r"but 'gap' maps to \(tensor\("),
        ("gap.sum()", "{'gap': (float(gap.detach().sum()), count)}", r"but 'gap' maps to \("),
        ("gap.sum()", "{'aligned_spanning': (gap.sum(), count)}", "metrics aligned_spanning have names of a step's"),
        ("gap.sum()", "None", "but they are None"),
        ("student.embed(student.tokens.labels).sum()", "{}", r"fails, given .* \(same_vocabulary, teacher\): Type"),
        ("float(gap.detach().sum())", "{}", "value is a scalar tensor, but its value is "),
    ],
)  # fmt: skip
def test_a_broken_algorithm_fails(
    install: Callable[[str, str], None], value: str, metrics: str, complaint: str
) -> None:
    install("kdflow_broken", BROKEN.replace("{value}", value).replace("{metrics}", metrics))
    assert_found(complaint)


def test_a_loss_that_is_no_loss_sum_fails(install: Callable[[str, str], None]) -> None:
    install("kdflow_broken", BROKEN.replace("LossSum({value}, {metrics})", "gap.sum()"))
    with pytest.raises(AssertionError, match=r"broken: .*loss must return a .*LossSum .*, but returned a Tensor of"):
        check_algorithm("broken")


@pytest.mark.parametrize(("needs", "complaint"), [
    ("{}", r"fails, given what its needs name \(nothing\): AttributeError"),
    ("{'rollouts', 'same_vocabulary'}", r"\(rollouts, same_vocabulary\): AttributeError"),
    ("{'teacher', 'same_vocabulary'}", ""),
])  # fmt: skip
def test_a_teacher_that_is_used_is_named(install: Callable[[str, str], None], needs: str, complaint: str) -> None:
    source = BROKEN.replace("{value}", "gap.sum()").replace("{metrics}", "{}")
    install("kdflow_broken", source.replace('"broken"', f'"broken"\n    needs = frozenset({needs})'))
    if not complaint:
        check_algorithm("broken")
        return
    with pytest.raises(AssertionError, match=complaint):
        check_algorithm("broken")


def test_what_builds_on_a_teacher_names_it(install: Callable[[str, str], None]) -> None:
    install("kdflow_mimic", MIMIC.replace('frozenset({"teacher", "same_vocabulary"})', "frozenset()"))
    with pytest.raises(AssertionError, match=r"mimic fails, given what its needs name \(nothing\)"):
        check_algorithm("mimic")


def test_what_the_student_drew_is_known_of_every_target(install: Callable[[str, str], None]) -> None:
    drawn = "(gap * torch.from_numpy(1.0 + (batch.sampled == batch.sampled))).sum()"
    install("kdflow_broken", BROKEN.replace("{value}", drawn).replace("{metrics}", "{}"))
    check_algorithm("broken")


# --- what a run does before the loss ----------------------------------------------------------------------------------

BESIDE = """
import kdflow
import torch
from kdflow.contracts import LossSum
from torch.nn import Linear, Module, Parameter

class Scalar(Module):
    def __init__(self):
        super().__init__()
        self.factor = Parameter(torch.ones(()))

class Broken(kdflow.Algorithm):
    name = "broken"
    needs = frozenset({"teacher", "same_vocabulary"})
    {body}
    def loss(self, student, teacher, batch):
        return LossSum({loss})

@kdflow.hookimpl
def kdflow_algorithms():
    return [Broken]
"""
ROWS = "student.rows.square().sum()"
BY_ROW = "(student.head.logits(student.rows) - teacher.head.logits(teacher.rows)).square().sum()"
ALIGNED = "student.rows[torch.from_numpy(batch.alignment.one_to_one()[0])].square().sum() + teacher.rows.sum() * 0"
PATH = "student.rows[torch.from_numpy(batch.alignment.path[:, 0])].square().sum()"
OTHERS_ROWS = "needs = frozenset({'teacher', 'aligner'})"
EVERY_SECOND = "pair.with_teacher_targets(pair.alignment.teacher % 2 == 0)"
UNALIGNED = "kdflow.contracts.Pair(pair.id, pair.student, pair.teacher)"
FROM_HEADS = """def build(self, student, teacher):
        made = Linear(8, 12, bias=False)
        made.weight.data.copy_((torch.linalg.pinv(student.head.weight) @ teacher.head.weight).T)
        return made"""


@pytest.mark.parametrize(("body", "loss", "complaint"), [
    (OTHERS_ROWS, ALIGNED, ""),
    (OTHERS_ROWS, BY_ROW, r"fails, given .* \(aligner, teacher\): RuntimeError"),
    ("needs = frozenset({'teacher'})", BY_ROW, r"fails, given .* \(teacher\): RuntimeError"),
    (OTHERS_ROWS, PATH, "'NoneType' object is not subscriptable"),
    (f"{OTHERS_ROWS}\n    aligner = {{'name': 'min_edit'}}", PATH, ""),
    (f"{OTHERS_ROWS}\n    aligner = {{'name': 'byte_spam'}}", ALIGNED, "aligner 'byte_spam' is not registered"),
    (f"{OTHERS_ROWS}\n    aligner = 'byte_span'", ALIGNED, "fails, given .*: TypeError"),
    (f"{OTHERS_ROWS}\n    def prepare(self, pair): return {EVERY_SECOND}", ALIGNED, ""),
    (f"{OTHERS_ROWS}\n    def prepare(self, pair): return None", ALIGNED, "prepare must return .*, but returned None"),
    (f"{OTHERS_ROWS}\n    def prepare(self, pair): return pair.nothing", ALIGNED, "fails, given .*: AttributeError"),
    (f"{OTHERS_ROWS}\n    def prepare(self, pair): return {UNALIGNED}", ALIGNED,
     ": prepare must leave targets that the teacher has, aligned: use pair.with_teacher_targets"),
    (f"def prepare(self, pair): return {EVERY_SECOND}", ROWS, "'NoneType' object has no attribute 'teacher'"),
    ("def build(self, student, teacher): return Scalar()", f"{ROWS} * self.module.factor",
     r"the parameter module.factor is a scalar, which FSDP cannot shard: give it the shape \[1\]"),
    ("def build(self, student, teacher): return [Linear(8, 12)]", ROWS, "build must return a torch.nn.Module"),
    (FROM_HEADS, "(self.module(student.rows) - teacher.rows).square().sum()", ""),
    ("def __init__(self, options=None): raise RuntimeError('no way')", ROWS, "fails, when it is made: .*no way"),
])  # fmt: skip
def test_what_a_run_does_before_the_loss_is_tried(
    install: Callable[[str, str], None], body: str, loss: str, complaint: str
) -> None:
    install("kdflow_broken", BESIDE.replace("{body}", body).replace("{loss}", loss))
    assert_found(complaint)
