"""Evaluators: what they ask, and how they count; the model is an oracle that knows what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kdflow.contracts import EvaluatedModel, Message, Sample
from kdflow.evaluation.exact_match import ExactMatch
from kdflow.evaluation.multiple_choice import MultipleChoice


class Oracle(EvaluatedModel):
    """Answers by a function, and remembers what it was asked."""

    def __init__(self, answer: Callable[[Sample], Any]) -> None:
        self.answer, self.asked, self.max_new_tokens = answer, list[Sample](), 0

    def respond(self, prompts: Sequence[Sample], max_new_tokens: int) -> list[str]:
        self.asked, self.max_new_tokens = list(prompts), max_new_tokens
        return [self.answer(prompt) for prompt in prompts]

    def log_likelihoods(self, responses: Sequence[Sample]) -> list[float]:
        self.asked = list(responses)
        return [self.answer(response) for response in responses]


def chat(question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "answer": answer}


PLAIN = [{"prompt": f"{n} + 1 = ", "answer": str(n + 1)} for n in range(6)]
CHAT = [chat(f"{n} + 1?", str(n + 1)) for n in range(6)]


def test_right_answers_are_counted() -> None:
    oracle = Oracle(lambda prompt: f"The answer is {int(prompt.prompt[0]) + (2 if prompt.prompt[0] == '3' else 1)}.")
    assert ExactMatch().evaluate(PLAIN, oracle) == {"accuracy": (5, 6)}
    assert oracle.max_new_tokens == 256
    ExactMatch(ExactMatch.Options(max_new_tokens=9)).evaluate(PLAIN, oracle)
    assert oracle.max_new_tokens == 9


def test_the_answer_is_no_part_of_the_question() -> None:
    oracle = Oracle(lambda prompt: "7")
    ExactMatch().evaluate(CHAT, oracle)
    assert oracle.asked[2] == Sample(messages=(Message("user", "2 + 1?"),))


def test_shots_stand_before_each_question_and_are_not_asked() -> None:
    oracle = Oracle(lambda prompt: "5\n\n4 + 1 = 6")
    counted = ExactMatch(ExactMatch.Options(shots=2)).evaluate(PLAIN, oracle)
    assert counted == {"accuracy": (1, 4)}, "what a base model goes on to ask is not its answer"
    assert [sample.prompt for sample in oracle.asked[:1]] == ["0 + 1 = 1\n\n1 + 1 = 2\n\n2 + 1 = "]
    ExactMatch(ExactMatch.Options(shots=1)).evaluate(CHAT, oracle)
    turns = [(message.role, message.content) for message in oracle.asked[0].messages]
    assert turns == [("user", "0 + 1?"), ("assistant", "1"), ("user", "1 + 1?")]


def test_a_conversation_with_shots_keeps_the_system_prompt_of_its_question_alone() -> None:
    records = [chat(f"{n} + 1?", str(n + 1)) for n in range(4)]
    for n in (0, 1, 3):
        records[n]["messages"].insert(0, {"role": "system", "content": f"Be brief, {n}."})
    oracle = Oracle(lambda prompt: "4")
    assert ExactMatch(ExactMatch.Options(shots=2)).evaluate(records, oracle) == {"accuracy": (1, 2)}
    shots = [("user", "0 + 1?"), ("assistant", "1"), ("user", "1 + 1?"), ("assistant", "2")]
    assert [[(message.role, message.content) for message in sample.messages] for sample in oracle.asked] == [
        [*shots, ("user", "2 + 1?")],
        [("system", "Be brief, 3."), *shots, ("user", "3 + 1?")],
    ]


@pytest.mark.parametrize(("records", "message"), [
    ([PLAIN[0], {"prompt": "a"}], r"^record 2: the field 'answer' is missing; the record has prompt$"),
    ([{"answer": "1"}], r"^record 1: a prompt needs the field 'messages' or 'prompt'"),
    (PLAIN[:2], r"^each of the 2 records is a shot, and none is left to ask; give a longer file, or shots below 2$"),
    ([*PLAIN[:3], CHAT[3]], r"^record 4: the record has 'messages', and the first one 'prompt': they are"),
    ([CHAT[0], PLAIN[1], *CHAT[2:]], r"^record 2: the record has 'prompt', and the first one 'messages': "),
])  # fmt: skip
def test_questions_that_cannot_be_asked(records: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExactMatch(ExactMatch.Options(shots=2)).evaluate(records, Oracle(lambda prompt: "1"))


CHOICES = ["no", "yes, of course"]


def test_the_likeliest_choice_is_the_answer() -> None:
    oracle = Oracle(lambda sample: {"no": -2.0, "yes, of course": -5.0}[sample.response])
    records = [{"prompt": "?", "choices": CHOICES, "answer": answer} for answer in (0, 1, "no")]
    # -2 over 2 bytes is less than -5 over 14.
    assert MultipleChoice().evaluate(records, oracle) == {"accuracy": (2, 3), "accuracy_per_byte": (1, 3)}
    assert oracle.asked[:2] == [Sample(prompt="?", response=choice) for choice in CHOICES]


def test_choices_are_the_assistants_turn_of_a_conversation() -> None:
    oracle = Oracle(lambda sample: -float(len(sample.messages[-1].content)))
    record = {"messages": [{"role": "user", "content": "?"}], "choices": CHOICES, "answer": 1}
    assert MultipleChoice().evaluate([record], oracle)["accuracy"] == (0, 1)
    assert oracle.asked[1].messages == (Message("user", "?"), Message("assistant", CHOICES[1], learn=True))


@pytest.mark.parametrize(("fields", "message"), [
    ({"choices": ["a"], "answer": 0}, "record 1: 'choices' must be a list of at least two texts"),
    ({"choices": ["a", ""], "answer": 0}, "record 1: 'choices' must be a list of at least two texts"),
    ({"choices": ["a", " \n"], "answer": 0}, r"record 1: 'choices' must be .*, and none blank, not \['a', ' \\n'\]"),
    ({"choices": ["a", "b"], "answer": 2}, "'answer' must be one of the choices, or its number from 0, not 2"),
    ({"choices": ["a", "b"], "answer": "c"}, "'answer' must be one of the choices"),
    ({"choices": ["a", "b"], "answer": True}, "'answer' must be one of the choices"),
    ({"choices": ["a", "b"]}, "'answer' must be one of the choices"),
])  # fmt: skip
def test_choices_that_cannot_be_compared(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultipleChoice().evaluate([{"prompt": "?", **fields}], Oracle(lambda sample: 0.0))
