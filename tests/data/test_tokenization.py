"""Samples as text into ids and targets: what is learnt, with which tokens, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

import kdflow
from kdflow.contracts import KdflowError, Message, Sample, Tokens
from kdflow.data.formats import Chat, ChatOptions, PromptResponse
from kdflow.data.rendering import SideTokenizer
from kdflow.data.tokenization import PairTokenizer
from tests.support.draw import quick
from tests.support.models import TEMPLATE, make_foreign_tokenizer, make_tokenizer

END = "<|im_end|>"  # the end of sequence of the tokenizers made here
CHATML = make_tokenizer()
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
WEATHER = "Wie ist das Wetter?"
SUNNY = "Sonnig, 25 °C – schön! ☀"


def side(
    template: str | None = TEMPLATE, *, tokenizer: Any = None, owner: str = "student", **options: Any
) -> SideTokenizer:
    return SideTokenizer(tokenizer if tokenizer is not None else make_tokenizer(template=template, **options), owner)


def chat_turns(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def chat(*contents: str) -> Sample:
    """A conversation that begins with the user."""
    return Chat().read({"messages": chat_turns(*contents)})


def read(tokenizer: SideTokenizer, sample: Sample) -> Tokens:
    return tokenizer.tokens(tokenizer.render(sample))


def learnt(tokenizer: SideTokenizer, tokens: Tokens) -> list[str]:
    """The text that each response's targets spell, special tokens included."""
    ids = tokens.ids[tokens.targets + 1]
    numbers = sorted(set(tokens.response.tolist()))
    return [tokenizer.tokenizer.decode(ids[tokens.response == number].tolist()) for number in numbers]


def whole(tokenizer: SideTokenizer, tokens: Tokens) -> str:
    text: str = tokenizer.tokenizer.decode(tokens.ids.tolist())
    return text


def pairs(student: SideTokenizer, teacher: SideTokenizer | None = None, *, max_length: int = 4096,
          too_long: str = "truncate", same_targets: bool = True) -> PairTokenizer:  # fmt: skip
    return PairTokenizer(student, teacher, max_length=max_length, too_long=too_long, same_targets=same_targets)


# --- what is learnt ---------------------------------------------------------------------------------------------------


def test_of_a_conversation_the_assistants_turns_are_learnt_with_their_ends() -> None:
    tokenizer = side()
    tokens = read(tokenizer, chat(WEATHER, SUNNY, "Danke", "Gern"))
    assert learnt(tokenizer, tokens) == [SUNNY + END, "Gern" + END]
    assert whole(tokenizer, tokens) == (
        f"<|im_start|>user\n{WEATHER}{END}\n<|im_start|>assistant\n{SUNNY}{END}\n"
        f"<|im_start|>user\nDanke{END}\n<|im_start|>assistant\nGern{END}\n"
    )
    assert tokens.text_bytes == len(f"{SUNNY}Gern".encode())


def test_the_first_learnt_token_follows_the_header_and_the_last_is_the_end_of_the_turn() -> None:
    tokenizer = side()
    tokens = read(tokenizer, chat(WEATHER, SUNNY))
    newline = tokenizer.tokenizer.encode("\n")
    first, last = int(tokens.targets[0]), int(tokens.targets[-1])
    assert tokenizer.tokenizer.decode(tokens.ids[: first + 1].tolist()).endswith("<|im_start|>assistant\n")
    assert tokens.ids[last + 1] == tokenizer.eos
    assert tokens.ids[last + 2 :].tolist() == newline
    assert tokens.targets.tolist() == list(range(first, last + 1))


def test_system_and_tool_turns_are_read_but_not_learnt() -> None:
    tokenizer = side()
    roles = ["system", "user", "assistant", "tool", "assistant"]
    sample = Chat().read({"messages": [{"role": role, "content": f"{role}?"} for role in roles]})
    assert learnt(tokenizer, read(tokenizer, sample)) == [f"assistant?{END}"] * 2


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}({{ call.function.arguments | tojson }})"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
)


def test_calls_of_tools_are_learnt_as_the_template_writes_them() -> None:
    tokenizer = side(TOOLS)
    turns = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3.", "tool_calls": None},
    ]
    tokens = read(tokenizer, Chat().read({"messages": turns, "tools": [TOOL]}))
    assert learnt(tokenizer, tokens) == [f'<call>add({{"a": 1, "b": 2}}){END}', f"It is 3.{END}"]
    assert '{"type": "function", "function": {"name": "add", "parameters"' in whole(tokenizer, tokens)


EMPTY_THOUGHT = TEMPLATE.replace("\n{{", "\n<think>\n\n</think>\n\n{{")


@pytest.mark.parametrize("template", [TEMPLATE, EMPTY_THOUGHT], ids=["chatml", "empty thought"])
@pytest.mark.parametrize("more", [{"id": "7"}, {"tool_calls": []}])
def test_what_no_template_reads_of_a_turn_changes_nothing(template: str, more: dict[str, Any]) -> None:
    tokenizer = side(template)
    turns = chat_turns(WEATHER, f"a{END}b")
    noted = Chat().read({"messages": [turns[0], {**turns[1], **more}]})
    assert tokenizer.render(noted) == tokenizer.render(Chat().read({"messages": turns}))
    with pytest.raises(ValueError, match=r"2, the assistant's, is empty"):
        tokenizer.render(Chat().read({"messages": [turns[0], {"role": "assistant", "content": "", **more}]}))


def test_a_template_may_refuse_turns_that_are_empty_but_for_a_call() -> None:
    refuses = "{% if not message['content'] and not message['tool_calls'] %}{{ raise_exception('empty') }}{% endif %}"
    calls = "{% if message['tool_calls'] %}<tool_call>{{ message['tool_calls'][0]['name'] }}{% endif %}"
    tokenizer = side(TEMPLATE.replace("{{ message['content'] }}", refuses + "{{ message['content'] }}" + calls))
    turns = [*chat_turns(WEATHER), {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}]
    assert learnt(tokenizer, read(tokenizer, Chat().read({"messages": turns}))) == ["<tool_call>look" + END]


def test_a_first_turn_that_is_learnt_has_no_prompt() -> None:
    template = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|im_end|>{% endfor %}"
    tokenizer = side(template)
    turns = Chat(ChatOptions(learn=["user", "assistant"])).read({"messages": chat_turns(WEATHER, SUNNY)})
    assert learnt(tokenizer, read(tokenizer, turns)) == [WEATHER + END, SUNNY + END]


def test_what_a_tool_said_may_be_escaped_by_the_template() -> None:
    template = TEMPLATE.replace(  # as Llama 3.1 does
        "{{ message['content'] }}",
        "{{ message['content'] | tojson if message['role'] == 'tool' else message['content'] }}",
    )
    tokenizer = side(template)
    turns = [*chat_turns(WEATHER), {"role": "tool", "content": '{"temp": 25}'}, {"role": "assistant", "content": SUNNY}]
    tokens = read(tokenizer, Chat().read({"messages": turns}))
    assert learnt(tokenizer, tokens) == [SUNNY + END]
    assert r"temp\"" in whole(tokenizer, tokens)


def test_what_the_template_would_leave_out_is_refused() -> None:
    deaf = side(
        "{% for m in messages if m['role'] != 'tool' %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    )
    turns = [{"role": "user", "content": "?"}, {"role": "tool", "content": "37"}, {"role": "assistant", "content": "!"}]
    with pytest.raises(
        ValueError, match=r"the chat template of the student has no place for messages of the role 'tool'"
    ):
        deaf.render(Chat().read({"messages": turns}))
    with pytest.raises(ValueError, match="the chat template of the student has no place for 'tools'"):
        deaf.render(Chat().read({"messages": [turns[0], turns[2]], "tools": [TOOL]}))
    with pytest.raises(ValueError, match="'tools' must be a list of JSON schemas"):
        Chat().read({"messages": turns, "tools": "add"})


def test_a_system_prompt_is_put_before_conversations_that_have_none() -> None:
    reader, turns = Chat(Chat.Options(system="Be brief.")), chat_turns(WEATHER, SUNNY)
    assert reader.read({"messages": turns}).messages[0] == Message("system", "Be brief.")
    own = [{"role": "system", "content": "Be kind."}, *turns]
    assert reader.read({"messages": own}) == Chat().read({"messages": own})


def test_the_roles_that_are_learnt_can_be_chosen() -> None:
    tokenizer, turns = side(), chat_turns(WEATHER, SUNNY, "Danke", "Gern")
    both = Chat(Chat.Options(learn=["user", "assistant"])).read({"messages": turns})
    assert learnt(tokenizer, read(tokenizer, both)) == [text + END for text in (WEATHER, SUNNY, "Danke", "Gern")]
    with pytest.raises(ValueError, match="no turn has the role 'tool': there is nothing to learn"):
        Chat(Chat.Options(learn=["tool"])).read({"messages": turns})
    with pytest.raises(ValueError, match="roles are system, user, assistant, tool, not human"):
        Chat.Options(learn=["human"])


def test_of_a_template_that_rewrites_earlier_turns_the_last_can_be_learnt() -> None:
    tokenizer = side(FORGETFUL)
    turns = chat_turns("1?", "<think>hm</think>One", "2?", "<think>so</think>Two")
    with pytest.raises(ValueError, match=r"rewrites turn 4 .*learn the last turn alone \(turns: last\)"):
        tokenizer.render(Chat().read({"messages": turns}))
    tokens = read(tokenizer, Chat(Chat.Options(turns="last")).read({"messages": turns}))
    assert learnt(tokenizer, tokens) == [f"<think>so</think>Two{END}"]
    assert "hm" not in whole(tokenizer, tokens)


def test_what_follows_the_last_answer_is_left_out() -> None:
    tokenizer = side()
    tokens = read(tokenizer, chat(WEATHER, SUNNY, "and then?"))
    assert "and then?" not in whole(tokenizer, tokens)


def test_of_prompt_and_response_the_response_is_learnt() -> None:
    tokenizer = side(None)
    tokens = read(tokenizer, Sample(prompt=WEATHER, response=SUNNY))
    assert learnt(tokenizer, tokens) == [SUNNY + END]
    assert whole(tokenizer, tokens) == WEATHER + SUNNY + END
    assert tokens.text_bytes == len(SUNNY.encode())


def test_of_a_text_everything_is_learnt_but_the_first_token_which_nothing_predicts() -> None:
    tokenizer = side(None)
    tokens = read(tokenizer, Sample(response=SUNNY))
    first = tokenizer.tokenizer.decode(tokens.ids[:1].tolist())
    assert whole(tokenizer, tokens) == SUNNY + END
    assert tokens.targets.tolist() == list(range(len(tokens) - 1))
    assert tokens.text_bytes == len(SUNNY.encode()) - len(first)


@pytest.mark.parametrize(
    "sample", [Sample(response=SUNNY), Sample(prompt=WEATHER, response=SUNNY)], ids=["text", "prompt"]
)
def test_a_tokenizer_that_begins_texts_with_a_token_does_so_once(sample: Sample) -> None:
    tokenizer = side(None, bos=True)
    tokens = read(tokenizer, sample)
    assert tokens.ids.tolist().count(tokenizer.tokenizer.bos_token_id) == 1
    assert tokens.ids[0] == tokenizer.tokenizer.bos_token_id
    assert tokens.ids.tolist().count(tokenizer.eos) == 1
    assert tokens.ids[-1] == tokenizer.eos
    assert learnt(tokenizer, tokens) == [
        SUNNY + END
    ]  # the first token of a text too: the one at the beginning predicts it
    assert tokens.text_bytes == len(SUNNY.encode())


def test_a_template_that_writes_the_first_token_itself_gets_no_second() -> None:
    tokenizer = side("{{ bos_token }}" + TEMPLATE, bos=True)
    tokens = read(tokenizer, chat(WEATHER, SUNNY))
    assert tokens.ids.tolist().count(tokenizer.tokenizer.bos_token_id) == 1
    assert tokens.ids[0] == tokenizer.tokenizer.bos_token_id


@pytest.mark.parametrize("ending", ["", "\n\n"], ids=["nothing", "blank line"])
def test_where_a_template_writes_no_end_the_end_of_sequence_is_learnt(ending: str) -> None:
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}" + ending + "{% endfor %}"
    tokenizer = side(template)
    tokens = read(tokenizer, chat(WEATHER, SUNNY, "?", "!"))
    assert learnt(tokenizer, tokens) == [SUNNY + END, "!" + END]
    assert whole(tokenizer, tokens) == (
        f"user: {WEATHER}{ending}assistant: {SUNNY}{END}{ending}user: ?{ending}assistant: !{END}{ending}"
    )


def test_text_before_the_end_of_a_turn_is_learnt_with_it() -> None:
    tokenizer = side(TEMPLATE.replace(END, " " + END))  # as Llama 2 writes " </s>"
    tokens = read(tokenizer, chat(WEATHER, SUNNY))
    assert learnt(tokenizer, tokens) == [f"{SUNNY} {END}"]


@pytest.mark.parametrize("finish", ["length", "stop"])
def test_a_response_that_was_cut_off_is_learnt_without_an_end(finish: str) -> None:
    tokenizer = side()
    end = "" if finish == "length" else END
    turns = Chat().read({"messages": chat_turns("a", "b", WEATHER, SUNNY), "finish": finish})
    tokens = read(tokenizer, turns)
    assert learnt(tokenizer, tokens) == ["b" + END, SUNNY + end]
    plain = read(tokenizer, PromptResponse().read({"prompt": WEATHER, "response": SUNNY, "finish": finish}))
    assert learnt(tokenizer, plain) == [SUNNY + end]
    foreign = SideTokenizer(make_foreign_tokenizer(template=TEMPLATE), "teacher")
    between = PairTokenizer(tokenizer, foreign, max_length=4096, too_long="truncate", same_targets=False,
                            aligner=kdflow.get_aligner("byte_span"))  # fmt: skip
    pair = between(turns, "x").pair
    assert pair is not None
    assert pair.teacher is not None
    for tokens, one in ((pair.student, tokenizer), (pair.teacher, foreign)):
        assert (tokens.ids[tokens.targets[-1] + 1] == one.eos) == (finish == "stop")


def test_without_any_end_the_text_alone_is_learnt() -> None:
    made = make_tokenizer(template=PLAIN)
    made.eos_token = None
    tokenizer = side(tokenizer=made)
    assert learnt(tokenizer, read(tokenizer, chat(WEATHER, SUNNY))) == [SUNNY]
    assert learnt(tokenizer, read(tokenizer, Sample(prompt="?", response=SUNNY))) == [SUNNY]


@pytest.mark.parametrize("template", [
    TEMPLATE,
    TEMPLATE.replace("message['content']", "message['content'] | trim"),
    TEMPLATE.replace("\n{{", "\n<think>\n\n</think>\n\n{{"),
    "{{ bos_token }}" + TEMPLATE.replace(END, "<|endoftext|>"),
    PLAIN,
], ids=["chatml", "trims", "empty thought", "other end", "bare"])  # fmt: skip
def test_the_tokens_of_a_response_are_the_same_whatever_the_template(template: str) -> None:
    tokenizer = side(template)
    tokens = read(tokenizer, chat(WEATHER, SUNNY, "x", "think end user assistant"))
    for number, text in enumerate([SUNNY, "think end user assistant"]):
        ids = tokens.ids[tokens.targets[tokens.response == number] + 1]
        assert ids[:-1].tolist() == CHATML.encode(text, add_special_tokens=False)
    plain = read(tokenizer, Sample(prompt="x", response=SUNNY))
    assert plain.ids[plain.targets + 1][:-1].tolist() == CHATML.encode(SUNNY, add_special_tokens=False)


@pytest.mark.parametrize("answer", ["user", "im_end", "assistant\n", WEATHER, "think", "</think>"])
def test_answers_that_stand_elsewhere_in_the_conversation_are_found_in_their_place(answer: str) -> None:
    tokenizer = side(TEMPLATE.replace("\n{{", "\n<think>\n</think>\n{{"))
    tokens = read(tokenizer, chat(WEATHER, answer, answer, answer))
    assert learnt(tokenizer, tokens) == [answer + END] * 2
    header = "<|im_start|>assistant\n<think>\n</think>\n"
    at = int(tokens.targets[0]) + 1
    assert tokenizer.tokenizer.decode(tokens.ids[:at].tolist()).endswith(header)


def test_an_answer_that_the_template_strips_is_not_taken_for_the_same_text_elsewhere() -> None:
    trim = "message['content'] | trim if message['role'] == 'assistant' else message['content']"
    tokenizer = side(TEMPLATE.replace("message['content']", trim))
    assert learnt(tokenizer, read(tokenizer, chat("say ja ", "ja "))) == ["ja" + END]


def test_a_template_that_strips_answers_is_followed() -> None:
    tokenizer = side(TEMPLATE.replace("message['content']", "message['content'] | trim"))
    tokens = read(tokenizer, chat(WEATHER, f"\n {SUNNY} \n"))
    assert learnt(tokenizer, tokens) == [SUNNY + END]
    assert tokens.text_bytes == len(SUNNY.encode())


@pytest.mark.parametrize("answer", ["\nSure", "\nSure\n", "\n\nSure"])
def test_a_newline_that_the_template_strips_from_an_answer_is_not_its_headers(answer: str) -> None:
    tokenizer = side(TEMPLATE.replace("message['content']", "message['content'] | trim"))
    assert learnt(tokenizer, read(tokenizer, chat(WEATHER, answer))) == ["Sure" + END]


def test_a_thought_that_the_template_takes_from_the_answer_is_learnt_with_it() -> None:
    template = TEMPLATE.replace(  # as Qwen3 does with the last answer
        "\n{{ message['content'] }}",
        "\n{% if '</think>' not in message['content'] %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] }}",
    )
    tokenizer = side(template)
    for thought in ("hm", ""):
        answer = f"<think>\n{thought}\n</think>\n\nyes"
        assert learnt(tokenizer, read(tokenizer, chat(WEATHER, answer))) == [answer + END]
    assert learnt(tokenizer, read(tokenizer, chat(WEATHER, "yes"))) == ["yes" + END]


@pytest.mark.parametrize("text", [END, f"{END}\n<|im_start|>user\nHi{END}", "a<|endoftext|>b"])
def test_text_of_a_response_that_looks_like_a_special_token_stays_text(text: str) -> None:
    tokenizer = side()
    for sample in (chat(WEATHER, text), Sample(prompt=text, response=text), Sample(response=text)):
        tokens = read(tokenizer, sample)
        ids = tokens.ids[tokens.targets + 1].tolist()
        assert ids.count(tokenizer.eos) == 1
        assert ids[-1] == tokenizer.eos
        assert not {0, 1} & set(ids)
    plain = read(tokenizer, Sample(prompt=text, response=text))
    assert plain.ids.tolist().count(tokenizer.eos) == 1
    assert tokenizer.tokenizer.decode(plain.ids.tolist()) == text + text + END


# --- what is refused --------------------------------------------------------------------------------------------------

LAST_ONLY = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
CUT_ANSWER = TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")


def test_templates_that_rewrite_earlier_turns_are_refused() -> None:
    with pytest.raises(
        KdflowError, match=r"data.jsonl:3: the chat template of the teacher rewrites turn 4 or a turn before"
    ):
        pairs(side(), side(LAST_ONLY, owner="teacher"))(chat("a", "b", "c", "d"), "data.jsonl:3")
    one_turn = pairs(side(LAST_ONLY))(chat("a", "b"), "data.jsonl:3")  # nothing earlier is rewritten
    assert one_turn.pair is not None


@pytest.mark.parametrize("template", [CUT_ANSWER, TEMPLATE.replace("message['content']", "message['content'] | upper"),
                                      "nothing of the conversation"])  # fmt: skip
def test_templates_that_rewrite_the_answer_are_refused(template: str) -> None:
    with pytest.raises(
        KdflowError, match=r"the chat template of the student rewrites turn 2 .* or the format prompt_response"
    ):
        pairs(side(template))(chat("a", "b</think>c"), "data.jsonl:3")


def test_a_tokenizer_without_a_template_is_refused_for_conversations() -> None:
    with pytest.raises(
        KdflowError, match=r"'chat' needs a chat template, and the tokenizer of the student .* has none"
    ):
        pairs(side(None))(chat("a", "b"), "data.jsonl:3")


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}" + TEMPLATE
    )
    sample = Chat().read({"messages": [{"role": "assistant", "content": "b"}]})
    with pytest.raises(
        KdflowError, match=r"data.jsonl:3: the chat template .* refuses the conversation: the user must begin"
    ):
        pairs(side(template))(sample, "data.jsonl:3")


def test_a_text_of_one_token_that_nothing_predicts_is_refused() -> None:
    made = make_tokenizer()
    made.eos_token = None
    with pytest.raises(KdflowError, match=r"data.jsonl:3: no trainable tokens"):
        pairs(side(tokenizer=made))(Sample(response="e"), "data.jsonl:3")


def test_a_text_without_tokens_is_refused() -> None:
    made = make_tokenizer()
    made.backend_tokenizer.normalizer = normalizers.Replace("\N{SOFT HYPHEN}", "")
    made.eos_token = None
    with pytest.raises(KdflowError, match=r"data.jsonl:3: no tokens to learn with the tokenizer of the student"):
        pairs(side(tokenizer=made))(Sample(prompt="x", response="\N{SOFT HYPHEN}"), "data.jsonl:3")


# --- two sides --------------------------------------------------------------------------------------------------------

SHORT = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
SHORT_CHAT = make_tokenizer(template=SHORT)


def test_sides_with_other_templates_learn_the_same_tokens() -> None:
    pair = pairs(side(), side(SHORT, owner="teacher"))(chat("a", SUNNY, "c", "d"), "x").pair
    assert pair is not None
    assert pair.teacher is not None
    assert len(pair.student) > len(pair.teacher)
    labels = [tokens.ids[tokens.targets + 1].tolist() for tokens in (pair.student, pair.teacher)]
    assert labels[0] == labels[1]
    assert pair.student.response.tolist() == pair.teacher.response.tolist()


def test_without_a_teacher_there_is_no_teachers_side() -> None:
    pair = pairs(side())(chat("a", "b"), "x").pair
    assert pair is not None
    assert pair.teacher is None
    assert pair.id == "x"


@pytest.mark.parametrize("sample", [Sample(response=SUNNY), chat("a", SUNNY, "b", SUNNY)], ids=["text", "chat"])
def test_the_sides_may_end_with_other_tokens(sample: Sample) -> None:
    base = make_tokenizer(template=TEMPLATE.replace(END, "<|endoftext|>"))
    base.eos_token = "<|endoftext|>"
    pair = pairs(side(), side(tokenizer=base, owner="teacher"))(sample, "x").pair
    assert pair is not None
    assert pair.teacher is not None
    differing = pair.student.ids[pair.student.targets + 1] != pair.teacher.ids[pair.teacher.targets + 1]
    responses = pair.student.response
    assert differing.tolist() == np.append(responses[1:] != responses[:-1], True).tolist()


DIFFERENT = (
    "{}: student and teacher render the response into different tokens, although they share a vocabulary: learnt token "
)


def test_a_difference_inside_a_response_is_refused() -> None:
    trims = side(TEMPLATE.replace("message['content']", "message['content'] | trim"), owner="teacher")
    ours, theirs = r"' ?\\n' \(id \d+\)", r"'<\|im_end\|>' \(id \d+\)"
    with pytest.raises(
        KdflowError, match=DIFFERENT.format("data.jsonl:3") + f"2 is {ours} to the student and {theirs}"
    ):
        pairs(side(), trims)(chat("a", "b\n"), "data.jsonl:3")


def test_another_token_in_a_response_of_the_same_length_is_refused() -> None:
    """What ends the turn before it differs too, and may."""
    other = make_tokenizer(template=TEMPLATE.replace(END, "<|endoftext|>"))
    other.backend_tokenizer.normalizer = normalizers.Replace("b", "c")
    (b,), (c,) = (CHATML.encode(letter) for letter in "bc")
    told = rf"3 is 'b' \(id {b}\) to the student and 'c' \(id {c}\) to the teacher; give both"
    with pytest.raises(KdflowError, match=DIFFERENT.format("x") + told):
        pairs(side(), side(tokenizer=other, owner="teacher"))(chat("a", "d", "a", "b"), "x")
    assert pairs(side(), side(tokenizer=other, owner="teacher"))(chat("b", "d"), "x").pair is not None


def test_a_first_token_that_only_one_side_learns_is_refused() -> None:
    with pytest.raises(KdflowError, match=DIFFERENT.format("x") + r"1 is '.*' \(id \d+\) to the st"):
        pairs(side(None), side(None, bos=True, owner="teacher"))(Sample(response=SUNNY), "x")


def test_a_last_token_that_only_one_side_learns_is_refused() -> None:
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(KdflowError, match=r"3 is none to the student and '<\|im_end\|>' \(id \d+\) to"):
        pairs(side(tokenizer=endless), side(owner="teacher"))(Sample(prompt="a", response="b c"), "x")


def test_between_other_vocabularies_the_sides_may_differ() -> None:
    teacher = side(tokenizer=make_tokenizer(300), owner="teacher")
    pair = pairs(side(), teacher, same_targets=False)(chat("a", SUNNY), "x").pair
    assert pair is not None
    assert pair.teacher is not None
    assert learnt(teacher, pair.teacher) == [SUNNY + END]


# --- too long ---------------------------------------------------------------------------------------------------------


@quick
@given(length=st.integers(2, 160), answer=st.text(min_size=1, max_size=60).filter(str.strip))
def test_both_sides_are_cut_after_the_same_target(length: int, answer: str) -> None:
    sample = chat("a", answer, "and", "b" * 9)
    student, teacher = side(tokenizer=CHATML), side(tokenizer=SHORT_CHAT, owner="teacher")
    full = pairs(student, teacher)(sample, "x").pair
    found = pairs(student, teacher, max_length=length)(sample, "x")
    assert full is not None
    assert full.teacher is not None
    fits = len(full.student) <= length
    assert found.truncated == (not fits and found.pair is not None)
    if found.pair is None:
        assert found.dropped == "prompt too long"
        assert full.student.targets[0] + 1 >= length
        return
    assert found.pair.teacher is not None
    count = len(found.pair.student.targets)
    assert count == (len(full.student.targets) if fits else (full.student.targets + 1 < length).sum())
    for cut, uncut in ((found.pair.student, full.student), (found.pair.teacher, full.teacher)):
        assert len(cut) <= length
        assert cut.ids.tolist() == uncut.ids[: len(cut)].tolist()
        assert cut.targets.tolist() == uncut.targets[:count].tolist()
        assert cut.response.tolist() == uncut.response[:count].tolist()
        if not fits:
            assert len(cut) == cut.targets[-1] + 2  # nothing is read that nothing is learnt from
    # A token of this tokenizer has a character for each byte.
    labels = found.pair.student.ids[found.pair.student.targets + 1].tolist()
    spelt = [CHATML.convert_ids_to_tokens(index) for index in labels if index != CHATML.eos_token_id]
    assert found.pair.student.text_bytes == sum(map(len, spelt))
    assert found.pair.student.text_bytes <= len(f"{answer}{'b' * 9}".encode())


def test_a_sample_that_just_fits_is_left_alone() -> None:
    full = pairs(side())(chat("a", SUNNY), "x").pair
    assert full is not None
    fits = pairs(side(), max_length=len(full.student))(chat("a", SUNNY), "x")
    assert not fits.truncated
    assert fits.pair is not None
    assert fits.pair.student.ids.tolist() == full.student.ids.tolist()
    assert pairs(side(), max_length=len(full.student) - 1)(chat("a", SUNNY), "x").truncated


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_the_longer_side_decides_whether_a_sample_is_too_long(too_long: str) -> None:
    sample, sides = chat("a", SUNNY), (side(SHORT), side(owner="teacher"))
    full = pairs(*sides)(sample, "x").pair
    assert full is not None
    found = pairs(*sides, max_length=len(full.student), too_long=too_long)(sample, "x")
    if too_long == "drop":
        assert (found.pair, found.dropped, found.truncated) == (None, "too long", False)
    else:
        assert found.pair is not None
        assert found.truncated
        assert len(found.pair.student) < len(full.student)


def test_between_other_vocabularies_each_side_is_cut_by_itself() -> None:
    teacher = side(tokenizer=make_tokenizer(300), owner="teacher")
    found = pairs(side(), teacher, same_targets=False, max_length=40)(chat("a", SUNNY * 9), "x").pair
    assert found is not None
    assert found.teacher is not None
    assert len(found.student) == len(found.teacher) == 40


def test_a_prompt_that_leaves_no_room_is_dropped_with_its_reason() -> None:
    for too_long, reason in (("truncate", "prompt too long"), ("drop", "too long")):
        found = pairs(side(), max_length=5, too_long=too_long)(Sample(prompt=WEATHER, response="x"), "x")
        assert (found.pair, found.dropped) == (None, reason)


# --- bytes ------------------------------------------------------------------------------------------------------------


def sentencepiece() -> PreTrainedTokenizerFast:
    """Characters, their spaces written as ▁, and bytes for what is no ASCII letter; texts begin with <s>."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyzé"]
    tokenizer = Tokenizer(
        models.BPE({piece: at for at, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("made", [make_tokenizer(bos=True), sentencepiece()], ids=["byte level", "sentencepiece"])
@pytest.mark.parametrize("text", ["plain text", "é für 25 °C", "日本語", "☀ a", "e\N{COMBINING ACUTE ACCENT}"])
def test_bytes_are_counted_also_where_a_character_is_cut(made: Any, text: str) -> None:
    tokenizer = side(tokenizer=made)
    tokens = read(tokenizer, Sample(prompt="a", response=text))
    assert tokens.text_bytes == len(text.encode())
    previous = 0
    for count in range(1, len(tokens.targets)):
        cut = tokenizer.truncate(tokens, int(tokens.targets[count - 1]) + 2)
        assert len(cut.targets) == count
        assert previous < cut.text_bytes <= len(text.encode())
        spelt = tokenizer.tokenizer.decode(cut.ids[cut.targets + 1].tolist())
        if "\N{REPLACEMENT CHARACTER}" not in spelt:
            assert cut.text_bytes == len(spelt.encode())
        previous = cut.text_bytes
    assert previous == len(text.encode())  # the last target is the end, which spells nothing
    assert tokenizer.truncate(tokens, 1).text_bytes == 0


@pytest.mark.parametrize("text", ["plain", "日本語", "é"])
def test_a_first_token_that_is_not_learnt_is_not_counted(text: str) -> None:
    tokenizer = side(tokenizer=make_tokenizer(corpus=["only ascii"]))  # the characters above are several tokens
    tokens = read(tokenizer, Sample(response=text))
    first = tokenizer.tokenizer.convert_ids_to_tokens(tokens.ids[:1].tolist())[0]
    assert tokens.text_bytes == len(text.encode()) - len(first)


# --- a real tokenizer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Any:
    from kdflow.models.fetch import resolve
    from kdflow.models.loading import load_tokenizer

    return load_tokenizer(resolve("HuggingFaceTB/SmolLM2-135M-Instruct"))


@pytest.mark.network
def test_a_real_tokenizer_and_its_template(smollm2: Any) -> None:
    tokenizer = side(tokenizer=smollm2)
    sample = chat(WEATHER, SUNNY, "Danke", f"Gern {END}")
    tokens = read(tokenizer, sample)
    assert learnt(tokenizer, tokens) == [SUNNY + END, f"Gern {END}{END}"]
    assert tokens.text_bytes == len(f"{SUNNY}Gern {END}".encode())
    # As transformers renders it, but for the text that looks like a special token.
    turns = [{"role": message.role, "content": message.content} for message in sample.messages[:3]]
    expected = smollm2.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert tokens.ids.tolist()[: len(expected)] == expected
    assert tokens.ids.tolist()[len(expected) :] == [
        *smollm2.encode(f"Gern {END}", split_special_tokens=True), tokenizer.eos, *smollm2.encode("\n"),
    ]  # fmt: skip


@pytest.mark.network
def test_a_real_tokenizer_and_plain_text(smollm2: Any) -> None:
    tokenizer = side(tokenizer=smollm2)
    tokens = read(tokenizer, Sample(response=SUNNY))
    assert tokens.ids.tolist() == [*smollm2.encode(SUNNY), tokenizer.eos]
    first = len(smollm2.decode(tokens.ids[:1].tolist()).encode())
    assert tokens.text_bytes == len(SUNNY.encode()) - first


def test_a_message_marks_whether_it_is_learnt() -> None:
    tokenizer = side()
    messages = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d", True))
    assert learnt(tokenizer, read(tokenizer, Sample(messages=messages))) == ["d" + END]
