"""Prompts: what a record asks, and the ids up to where a model answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kdflow.contracts import Sample
from kdflow.data.formats import Chat, ChatOptions, PromptResponse
from kdflow.data.prompts import read_prompt
from kdflow.data.rendering import SideTokenizer
from tests.support.models import TEMPLATE, make_foreign_tokenizer, make_tokenizer

USER, ASSISTANT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Emma."}


def test_the_assistants_last_turn_is_left_out_and_earlier_ones_are_kept() -> None:
    once = read_prompt({"messages": [USER, ASSISTANT]})
    assert [(turn.role, turn.content) for turn in once.sample.messages] == [("user", "Who?")]
    twice = read_prompt({"messages": [USER, ASSISTANT, USER]})
    assert [turn.role for turn in twice.sample.messages] == ["user", "assistant", "user"]


def test_an_answered_record_is_one_that_the_formats_read_with_other_fields_carried_over() -> None:
    chat = read_prompt({"messages": [USER, ASSISTANT], "topic": "novels"}).answered("Anne.")
    assert chat == {"messages": [USER, {"role": "assistant", "content": "Anne."}], "topic": "novels"}
    assert Chat(ChatOptions()).read(chat).messages[-1].content == "Anne."
    plain = read_prompt({"prompt": "Who?", "response": "Emma.", "answer": 3}).answered(" Anne.")
    assert plain == {"prompt": "Who?", "response": " Anne.", "answer": 3}
    assert PromptResponse().read(plain) == Sample(prompt="Who?", response=" Anne.")


@pytest.mark.parametrize("learnt", [
    {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]},
    {"prompt": "Who?", "response": "Emma."},
])  # fmt: skip
def test_the_teacher_is_asked_what_it_sees_in_training_before_the_response(learnt: dict[str, Any]) -> None:
    side, record = SideTokenizer(make_tokenizer(), "teacher"), {**learnt, "teacher_prompt": "She is Emma. Who?"}
    reader = Chat(ChatOptions()) if "messages" in learnt else PromptResponse()
    tokens = side.tokens(side.render(reader.read(record).for_teacher()))
    asked = replace(read_prompt(record).sample, teacher_prompt=record["teacher_prompt"])
    assert side.prompt(asked.for_teacher()) == tokens.ids[: tokens.targets[0] + 1].tolist()
    prompt = read_prompt(record)
    assert side.prompt(prompt.sample) == side.prompt(read_prompt(learnt).sample)
    assert prompt.answered("Anne.") == {**read_prompt(learnt).answered("Anne."), "teacher_prompt": "She is Emma. Who?"}


@pytest.mark.parametrize("learnt", [{"messages": [USER, ASSISTANT]}, {"prompt": "Who?", "response": "Emma."}])
@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_has_the_ids_that_training_puts_before_the_response(learnt: dict[str, Any], bos: bool) -> None:
    side = SideTokenizer(make_tokenizer(bos=bos), "teacher")
    reader = Chat(ChatOptions()) if "messages" in learnt else PromptResponse()
    tokens = side.tokens(side.render(reader.read(learnt)))
    found = side.prompt(read_prompt(learnt).sample)
    assert found
    assert found == tokens.ids[: tokens.targets[0] + 1].tolist()


TRIMS = TEMPLATE.replace("message['content']", "message['content'] | trim")
# As Llama 2 does, with a space before answers that is not in the prompt.
SPACE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]{% else %} "
    "{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# As Zephyr does, which begins turns with plain text.
HEADERS = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("make", [make_tokenizer, make_foreign_tokenizer])
@pytest.mark.parametrize("template", [TEMPLATE, TRIMS, SPACE, HEADERS], ids=["chatml", "trims", "space", "headers"])
@pytest.mark.parametrize("answer", ["Emma.", "\nEmma."])
def test_whatever_the_template_a_prompt_is_what_training_puts_before_the_response(
    make: Callable[..., Any], template: str, answer: str
) -> None:
    side = SideTokenizer(make(template=template), "student")
    record = {"messages": [USER, {"role": "assistant", "content": answer}]}
    tokens = side.tokens(side.render(Chat(ChatOptions()).read(record)))
    assert side.prompt(read_prompt(record).sample) == tokens.ids[: tokens.targets[0] + 1].tolist()


@pytest.mark.parametrize("make", [make_tokenizer, make_foreign_tokenizer])
def test_turns_between_two_answers_have_the_ids_of_the_prompt(make: Callable[..., Any]) -> None:
    side = SideTokenizer(make(template=HEADERS), "student")
    record = {"messages": [USER, ASSISTANT, USER, ASSISTANT]}
    tokens = side.tokens(side.render(Chat(ChatOptions()).read(record)))
    first, second = (int(tokens.targets[tokens.response == number][0]) + 1 for number in (0, 1))
    answered = tokens.ids[first:second].tolist()
    between = answered[answered.index(side.eos) :]
    assert side.prompt(read_prompt(record).sample)[-len(between) :] == between


def test_what_ends_a_response_is_what_training_ends_it_with() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # the template ends turns with <|im_end|>
    side = SideTokenizer(tokenizer, "student")
    assert side.stop_ids(read_prompt({"messages": [USER]}).sample) == (0, 2)
    assert side.stop_ids(read_prompt({"prompt": "Who?"}).sample) == (0,)


@pytest.mark.parametrize(("answer", "expected"), [
    (None, None), (42, "42"), (0.5, "0.5"), (-2.0, "-2.0"), (0.00005, "0.00005"), (1e22, "1" + "0" * 22),
    ("5e-05", "5e-05"), ("Paris", "Paris"),
])  # fmt: skip
def test_answers(answer: object, expected: str | None) -> None:
    assert read_prompt({"prompt": "x", "answer": answer}).answer == expected


@pytest.mark.parametrize(("record", "message"), [
    ({"text": "x"}, "a prompt needs the field 'messages' or 'prompt'; the record has text"),
    ({}, "the record has no fields"),
    ({"prompt": " "}, "'prompt' must be text that is not empty, not ' '"),
    ({"prompt": 3}, "'prompt' must be text that is not empty, not 3"),
    ({"messages": []}, "'messages' has no turn for the assistant to answer"),
    ({"messages": [ASSISTANT]}, "'messages' has no turn for the assistant to answer"),
    ({"messages": "Who?"}, "'messages' must be a list"),
    ({"messages": ["Who?"]}, "message 1 must be an object with 'role' and 'content', not 'Who\\?'"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "message 1: the role must be one of"),
    ({"prompt": "x", "answer": True}, "'answer' must be text or a number, not True"),
    ({"prompt": "x", "answer": ""}, "'answer' must be text or a number, not ''"),
    ({"prompt": "x", "answer": ["y"]}, r"'answer' must be text or a number, not \['y'\]"),
])  # fmt: skip
def test_records_that_ask_nothing_are_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompt(record)
