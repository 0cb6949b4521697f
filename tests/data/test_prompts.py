"""Prompts: what a record asks, and the ids up to where a model answers."""

from __future__ import annotations

from typing import Any

import pytest

from kdflow.contracts import Sample
from kdflow.data.formats import Chat, ChatOptions, PromptResponse
from kdflow.data.prompts import read_prompt
from kdflow.data.rendering import SideTokenizer
from tests.support.models import make_tokenizer

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


@pytest.mark.parametrize("learnt", [{"messages": [USER, ASSISTANT]}, {"prompt": "Who?", "response": "Emma."}])
@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_has_the_ids_that_training_puts_before_the_response(learnt: dict[str, Any], bos: bool) -> None:
    side = SideTokenizer(make_tokenizer(bos=bos), "teacher")
    reader = Chat(ChatOptions()) if "messages" in learnt else PromptResponse()
    tokens = side.tokens(side.render(reader.read(learnt)))
    found = side.prompt(read_prompt(learnt).sample)
    assert found
    assert found == tokens.ids[: tokens.targets[0] + 1].tolist()


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
