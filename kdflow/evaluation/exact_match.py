"""The share of questions that are answered right, greedily."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pydantic

from kdflow.contracts import EvaluatedModel, Evaluator, Message, Options, Sample, SampleError
from kdflow.data.prompts import Prompt, read_prompt
from kdflow.evaluation.answers import is_correct
from kdflow.hookspecs import hookimpl


class ExactMatchOptions(Options):
    """Options of :class:`ExactMatch`."""

    shots: int = pydantic.Field(default=0, ge=0)
    """Solved questions before each: the first ones of the file, which are not asked then."""
    max_new_tokens: int = pydantic.Field(default=256, ge=1)
    """Tokens of the longest answer."""


class ExactMatch(Evaluator):
    """Whether the final answer of the model's greedy response is the record's ``answer``.

    Records have ``messages`` or ``prompt``, and ``answer``; what counts as a final answer, see
    :mod:`kdflow.evaluation.answers`.
    """

    name = "exact_match"
    Options = ExactMatchOptions

    def evaluate(self, records: Sequence[Mapping[str, Any]], model: EvaluatedModel) -> Mapping[str, tuple[float, int]]:
        """The accuracy."""
        prompts = _prompts(records)
        shots, asked = prompts[: self.options.shots], prompts[self.options.shots :]
        if not asked:
            raise ValueError(
                f"each of the {len(records)} records is a shot, and none is left to ask; give a longer file, or shots "
                f"below {len(records)}"
            )
        try:
            texts = model.respond([_with_shots(shots, prompt) for prompt in asked], self.options.max_new_tokens)
        except SampleError as error:
            raise ValueError(f"record {len(shots) + error.number + 1}: {error.reason}") from None
        if shots and not asked[0].sample.messages:  # a base model goes on with a question of its own
            texts = [text.partition("\n\n")[0] for text in texts]
        right = sum(is_correct(text, str(prompt.answer)) for text, prompt in zip(texts, asked, strict=True))
        return {"accuracy": (right, len(asked))}


def _prompts(records: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """Prompts of one kind, that of the first: shots stand before questions of theirs, and end as they do."""
    prompts: list[Prompt] = []
    for number, record in enumerate(records, start=1):
        prompts.append(_prompt(record, number))
        chat = bool(prompts[0].sample.messages)
        if bool(prompts[-1].sample.messages) != chat:
            here, first = ("'prompt'", "'messages'") if chat else ("'messages'", "'prompt'")
            raise ValueError(
                f"record {number}: the record has {here}, and the first one {first}: they are asked as two files"
            )
    return prompts


def _prompt(record: Mapping[str, Any], number: int) -> Prompt:
    try:
        prompt = read_prompt(record)
    except ValueError as error:
        raise ValueError(f"record {number}: {error}") from None
    if prompt.answer is None:
        raise ValueError(f"record {number}: the field 'answer' is missing; the record has {', '.join(sorted(record))}")
    return prompt


def _with_shots(shots: Sequence[Prompt], prompt: Prompt) -> Sample:
    """Shots as earlier turns of the conversation, or as text above, each with its answer and an empty line.

    A conversation has one system prompt, the question's own: many templates refuse another in its middle.
    """
    sample = prompt.sample
    if not sample.messages:
        solved = "".join(f"{shot.sample.prompt}{shot.answer}\n\n" for shot in shots)
        return replace(sample, prompt=solved + sample.prompt)
    system, question = _system_apart(sample)
    turns: list[Message] = []
    for shot in shots:
        turns += [*_system_apart(shot.sample)[1], Message("assistant", str(shot.answer))]
    return replace(sample, messages=(*system, *turns, *question))


def _system_apart(sample: Sample) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The system prompt that a conversation may begin with, and the other turns."""
    first = int(sample.messages[0].role == "system")
    return sample.messages[:first], sample.messages[first:]


@hookimpl
def kdflow_evaluators() -> Iterable[type[Evaluator]]:
    """The evaluator of this module."""
    return [ExactMatch]
