"""Held-out figures against the same figures from whole logits in fp64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdflow
from kdflow import ops
from kdflow.contracts import Head, Side
from kdflow.evaluation.held_out import Evaluation, measure, summarise
from kdflow.runtime.export import export
from kdflow.testing import side
from tests.support.models import make_model, make_tokenizer, write_jsonl
from tests.support.reference import cross_entropy, kl, softmax

Array = NDArray[np.float64]
RunFile = Callable[..., dict[str, Any]]


def figures(
    student: Array, teacher: Array | None, labels: NDArray[np.int64], text_bytes: int, shared: int
) -> dict[str, Any]:
    """From logits ``[N, V]`` without padding; student and teacher meet in the first ``shared`` ids."""
    ce = cross_entropy(student, labels)
    result: dict[str, Any] = {
        "cross_entropy": ce.mean(), "perplexity": np.exp(ce.mean()), "bits_per_byte": ce.sum() / np.log(2) / text_bytes,
        "divergence": None, "agreement": None, "target_tokens": len(labels),
    }  # fmt: skip
    if teacher is not None:
        ours, theirs = student[:, :shared], teacher[:, :shared]
        result["divergence"] = kl(softmax(theirs), softmax(ours)).mean()
        result["agreement"] = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    return result


def close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (None if value is None else pytest.approx(value, rel=tolerance)), name


# --- from rows and heads ----------------------------------------------------------------------------------------------

ROWS, STUDENT, TEACHER = 11, 5, 7


def random_side(hidden: int, columns: int, valid: int | None, labels: torch.Tensor, seed: int, **head: Any) -> Side:
    generator = torch.Generator().manual_seed(seed)
    rows, weight = (torch.randn(n, hidden, generator=generator, dtype=torch.float64) for n in (ROWS, columns))
    return side({"hidden": rows, "head": Head(weight, valid_vocab=valid, **head), "labels": labels})


VOCABULARIES = {
    "the same": (20, None, 20, None, 20),
    "padded": (24, 20, 32, 20, 20),
    "a longer teacher": (24, 20, 32, 27, 20),
    "a longer student": (32, 27, 24, 20, 20),
    "a teacher with less padding": (32, 20, 20, None, 20),
}


@pytest.mark.parametrize(("columns", "valid", "teacher_columns", "teacher_valid", "shared"), VOCABULARIES.values(),
                         ids=VOCABULARIES)  # fmt: skip
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_figures_are_those_of_whole_logits(
    columns: int, valid: int | None, teacher_columns: int, teacher_valid: int | None, shared: int, chunk: int | None
) -> None:
    labels = torch.arange(ROWS) * 7 % shared
    student = random_side(STUDENT, columns, valid, labels, seed=1, bias=torch.linspace(-1, 1, columns).double())
    teacher = random_side(TEACHER, teacher_columns, teacher_valid, labels, seed=2, scale=0.5, softcap=3.0)
    with ops.chunk_rows(chunk):
        sums = [float(value) for value in measure(student, teacher)]
        alone = [float(value) for value in measure(student, None)]
    assert student.head.bias is not None
    logits = (student.rows @ student.head.weight.T + student.head.bias)[:, : valid or columns].numpy()
    theirs = (3.0 * torch.tanh(teacher.rows @ teacher.head.weight.T * 0.5 / 3.0))[:, : teacher_valid or teacher_columns]
    expected = figures(logits, theirs.numpy(), labels.numpy(), 30, shared)
    close(vars(summarise(sums, ROWS, 30)), expected, 1e-12)
    close(vars(summarise(alone, ROWS, 30)), expected | {"divergence": None, "agreement": None}, 1e-12)


def test_the_divergence_is_of_the_teacher_from_the_student_and_not_the_reverse() -> None:
    logits = [
        torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64),
        torch.tensor([[2.0, 0.0, 0.5]], dtype=torch.float64),
    ]
    student, teacher = ({"logits": x, "labels": torch.tensor([1])} for x in logits)
    p, q = (softmax(x.numpy()) for x in reversed(logits))
    assert float(measure(side(student), side(teacher))[1]) == pytest.approx(float(kl(p, q)[0]), rel=1e-12)
    assert float(kl(p, q)[0]) != pytest.approx(float(kl(q, p)[0]), rel=1e-2)


def test_a_student_that_is_the_teacher_agrees_without_divergence() -> None:
    same = random_side(STUDENT, 20, None, torch.zeros(ROWS, dtype=torch.long), seed=1)
    _, divergence, agreement = (float(value) for value in measure(same, same))
    assert (divergence, agreement) == (0.0, ROWS)


def test_a_micro_batch_without_targets_adds_nothing() -> None:
    nothing = side({"hidden": torch.zeros(0, 4), "head": torch.zeros(9, 4)})
    assert [float(value) for value in measure(nothing, nothing)] == [0.0] * 3
    assert [float(value) for value in measure(nothing, None)] == [0.0]


def test_figures_that_cannot_be_given_are_none_or_infinite() -> None:
    assert summarise([20.0], 10, 0) == Evaluation(None, 2.0, math.exp(2.0), None, None, 10)
    assert summarise([1e4, 1.0, 5.0], 10, 4).perplexity == math.inf
    assert summarise([1e4, 1.0, 5.0], 10, 4).agreement == 0.5


# --- in a run ---------------------------------------------------------------------------------------------------------


def plain_figures(student: str, teacher: str | None, file: str, max_length: int) -> dict[str, Any]:
    """With transformers alone: a text at a time, whole logits, its own attention."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
        for path in (student, teacher)
        if path is not None
    ]
    logits: list[list[Array]] = [[] for _ in models]
    labels, text_bytes = [], 0
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        ids = [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_token_id][:max_length]
        labels += ids[1:]
        text_bytes += len(tokenizer.decode(ids[1:], skip_special_tokens=True).encode())
        for model, rows in zip(models, logits, strict=True):
            with torch.no_grad():
                rows.append(model(input_ids=torch.tensor([ids])).logits[0, :-1, : len(tokenizer)].numpy())
    ours, theirs = np.concatenate(logits[0]), np.concatenate(logits[1]) if teacher is not None else None
    return figures(ours, theirs, np.array(labels), text_bytes, len(tokenizer))


@pytest.mark.parametrize("student", ["student", "untied"])
def test_figures_of_a_run_are_those_of_transformers_before_and_after(
    student: str, tiny: dict[str, str], run_file: RunFile, tmp_path: Path
) -> None:
    found = {}
    for max_tokens in (128, 512):
        run = run_file(student={"model": tiny[student]}, data={"max_tokens": max_tokens},
                       training={"steps": 2}, output=str(tmp_path / str(max_tokens)))  # fmt: skip
        found[max_tokens] = kdflow.train(run).evaluation
    expected = plain_figures(tiny[student], tiny["teacher"], tiny["eval"], 128)
    assert expected["divergence"] > 0.1  # random models, far apart
    for evaluation in found.values():
        close(evaluation["before"], expected, 1e-5)
    close(found[128]["before"], found[512]["before"], 1e-6)

    export(tmp_path / "512", tmp_path / "exported")
    expected = plain_figures(str(tmp_path / "exported"), tiny["teacher"], tiny["eval"], 128)
    close(found[512]["after"], expected, 1e-5)
    assert found[512]["after"]["divergence"] < found[512]["before"]["divergence"]


def test_the_divergence_is_forward_kl_at_temperature_one_whatever_is_trained(
    tiny: dict[str, str], run_file: RunFile
) -> None:
    algorithm = {"name": "reverse_kl", "temperature": 3.0, "ce_weight": 0.5}
    found = kdflow.train(run_file(algorithm=algorithm, training={"steps": 1})).evaluation["before"]
    close(found, plain_figures(tiny["student"], tiny["teacher"], tiny["eval"], 128), 1e-5)


def test_without_a_teacher_there_is_neither_divergence_nor_agreement(tiny: dict[str, str], run_file: RunFile) -> None:
    found = kdflow.train(run_file(algorithm={"name": "sft"}, teacher=None, training={"steps": 1})).evaluation["before"]
    assert (found["divergence"], found["agreement"]) == (None, None)
    close(found, plain_figures(tiny["student"], None, tiny["eval"], 128), 1e-5)


def test_a_teacher_of_another_vocabulary_gives_neither(tiny: dict[str, str], run_file: RunFile, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", tokenizer=make_tokenizer(300, corpus=["an other text"]))
    run = run_file(algorithm={"name": "sft"}, teacher={"model": other}, training={"steps": 1})
    found = kdflow.train(run).evaluation["before"]
    close(found, plain_figures(tiny["student"], None, tiny["eval"], 128), 1e-5)


def test_a_teacher_that_cuts_the_same_ids_otherwise_gives_neither(
    tiny: dict[str, str], run_file: RunFile, tmp_path: Path
) -> None:
    longer = make_model(tmp_path / "longer", tokenizer=make_tokenizer(400))
    algorithm = {"name": "uld"}
    found = kdflow.train(run_file(algorithm=algorithm, teacher={"model": longer}, training={"steps": 1})).evaluation
    close(found["before"], plain_figures(tiny["student"], None, tiny["eval"], 128), 1e-5)
    assert (found["before"]["divergence"], found["before"]["agreement"]) == (None, None)
    same = kdflow.train(run_file(algorithm=algorithm, training={"steps": 1}, output=str(tmp_path / "same"))).evaluation
    close(same["before"], plain_figures(tiny["student"], tiny["teacher"], tiny["eval"], 128), 1e-5)


def test_only_answers_count_and_bytes_are_those_of_answers(run_file: RunFile, tmp_path: Path) -> None:
    answers = ["Schön ☀", "ja", "é" * 5]
    chats = [
        {"messages": [{"role": "user", "content": "Frage?"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]
    file = write_jsonl(tmp_path / "chat.jsonl", chats)
    run = run_file(data={"eval": [{"path": file, "format": "chat"}]}, training={"steps": 1})
    found = kdflow.train(run).evaluation["before"]
    tokenizer = make_tokenizer()
    assert found["target_tokens"] == sum(len(tokenizer.encode(answer)) + 1 for answer in answers)
    text_bytes = len("".join(answers).encode())
    assert found["bits_per_byte"] == pytest.approx(
        found["cross_entropy"] * found["target_tokens"] / math.log(2) / text_bytes, rel=1e-12
    )
