"""The share of multiple-choice questions whose right choice is the likeliest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kdflow.contracts import EvaluatedModel, Evaluator, Message, Sample, SampleError
from kdflow.data.prompts import read_prompt
from kdflow.hookspecs import hookimpl


class MultipleChoice(Evaluator):
    """Whether the right one of the record's ``choices`` is the likeliest continuation.

    Records have ``messages`` or ``prompt``, ``choices``, and ``answer``: a choice, or its number from 0. ``accuracy``
    compares log-likelihoods, ``accuracy_per_byte`` those divided by the choices' UTF-8 bytes.
    """

    name = "multiple_choice"

    def evaluate(self, records: Sequence[Mapping[str, Any]], model: EvaluatedModel) -> Mapping[str, tuple[float, int]]:
        """Both accuracies."""
        items = [_item(record, number) for number, record in enumerate(records, start=1)]
        try:
            scores = iter(model.log_likelihoods([sample for samples, _, _ in items for sample in samples]))
        except SampleError as error:
            places = [(number, choice) for number, item in enumerate(items, 1) for choice in range(1, len(item[0]) + 1)]
            record, choice = places[error.number]
            raise ValueError(f"record {record}: 'choices', number {choice}: {error.reason}") from None
        right = right_per_byte = 0
        for samples, sizes, answer in items:
            likelihoods = [next(scores) for _ in samples]
            per_byte = [value / size for value, size in zip(likelihoods, sizes, strict=True)]
            right += likelihoods.index(max(likelihoods)) == answer
            right_per_byte += per_byte.index(max(per_byte)) == answer
        return {"accuracy": (right, len(items)), "accuracy_per_byte": (right_per_byte, len(items))}


def _item(record: Mapping[str, Any], number: int) -> tuple[list[Sample], list[int], int]:
    """A sample for each choice, the choices' bytes, and the number of the right one."""
    try:
        prompt = read_prompt({**record, "answer": None}).sample
    except ValueError as error:
        raise ValueError(f"record {number}: {error}") from None
    choices, answer = record.get("choices"), record.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(
            f"record {number}: 'choices' must be a list of at least two texts, and none blank, not {choices!r}"
        )
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"record {number}: 'answer' must be one of the choices, or its number from 0, not {answer!r}")
    samples = [_answered(prompt, choice) for choice in choices]
    return samples, [len(choice.encode()) for choice in choices], answer


def _answered(prompt: Sample, choice: str) -> Sample:
    if prompt.messages:
        return replace(prompt, messages=(*prompt.messages, Message("assistant", choice, learn=True)))
    return replace(prompt, response=choice)


@hookimpl
def kdflow_evaluators() -> Iterable[type[Evaluator]]:
    """The evaluator of this module."""
    return [MultipleChoice]
