"""Responses that the student wrote, as training pairs: what was sampled, and what of it reaches the teacher."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import kdflow
from kdflow.contracts import Message, Pair, Rollout, Sample
from kdflow.data.rendering import SideTokenizer
from kdflow.data.rollouts import RolloutTokenizer
from kdflow.data.tokenization import PairTokenizer
from tests.support.draw import quick
from tests.support.models import TEMPLATE, make_foreign_tokenizer, make_tokenizer

STUDENT = SideTokenizer(make_tokenizer(), "student")
TWIN = SideTokenizer(make_tokenizer(), "teacher")
FOREIGN = SideTokenizer(make_foreign_tokenizer(template=TEMPLATE), "teacher")
NORMALIZING = SideTokenizer(make_foreign_tokenizer(template=TEMPLATE, nfc=True), "teacher")
END = STUDENT.tokenizer.convert_tokens_to_ids("<|im_end|>")
START = STUDENT.tokenizer.convert_tokens_to_ids("<|im_start|>")
ASKED = Sample(prompt="How are you? ", response="Fine.")


def tokenizer(teacher: SideTokenizer | None, max_length: int = 4096) -> PairTokenizer:
    aligner = kdflow.get_aligner("byte_span") if teacher in (FOREIGN, NORMALIZING) else None
    return PairTokenizer(
        STUDENT, teacher, max_length=max_length, too_long="truncate", same_targets=teacher is TWIN, aligner=aligner
    )


def answered(
    ids: list[int], teacher: SideTokenizer | None = FOREIGN, sample: Sample = ASKED, max_length: int = 4096
) -> Pair:
    """The sample with a response of these ids, which ends where a stop id is the last."""
    tokenize = tokenizer(teacher, max_length)
    pair = tokenize(sample, "a.jsonl:1").pair
    assert pair is not None
    made = RolloutTokenizer(tokenize)
    finish = "stop" if ids[-1] in made.stop_ids(pair) else "length"
    return made(pair, Rollout(tuple(ids), tuple(-0.5 * at for at in range(len(ids))), finish))


def learnt(side: SideTokenizer, found: Pair) -> tuple[list[int], list[int]]:
    """Context and response of one side."""
    tokens = found.student if side is STUDENT else found.teacher
    assert tokens is not None
    start = len(tokens) - len(tokens.targets)
    assert tokens.targets.tolist() == list(range(start - 1, len(tokens) - 1))
    assert (tokens.response == 0).all()
    return tokens.ids[:start].tolist(), tokens.ids[start:].tolist()


def text_of(ids: list[int], special: set[int | None]) -> tuple[int, str]:
    """How many ids reach a teacher, and what they spell: whole characters before the first special token."""
    stop = next((at for at, index in enumerate(ids) if index in special), len(ids))
    for count in range(stop, -1, -1):
        spelt = b"".join(STUDENT.bytes_of.token_bytes(ids[:count]))
        try:
            return count, spelt.decode()
        except UnicodeDecodeError:
            continue
    raise AssertionError


@pytest.mark.parametrize("ids", ["the end", "a stranger inside", "a stranger first"])
def test_a_teacher_reads_no_ids_that_it_lacks(ids: str) -> None:
    """Of one vocabulary, of which the student has more: what ends its turn, say."""
    longer = make_tokenizer()
    longer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    word, more = STUDENT.encode("Well"), longer.convert_tokens_to_ids("<|done|>")
    assert more == TWIN.bytes_of.vocabulary_size
    longer.eos_token = "<|done|>" if ids == "the end" else longer.eos_token
    response = {"the end": [*word, more], "a stranger inside": [*word, more, *word], "a stranger first": [more]}[ids]
    tokenize = PairTokenizer(
        SideTokenizer(longer, "student"), TWIN, max_length=4096, too_long="truncate", same_targets=True
    )
    made = RolloutTokenizer(tokenize)
    pair = tokenize(ASKED, "a.jsonl:1").pair
    assert pair is not None
    found = made(pair, Rollout(tuple(response), (-1.0,) * len(response), "stop"))
    if ids == "a stranger first":
        assert found is pair, "nothing is left: the data's response is learnt"
        return
    assert learnt(STUDENT, found)[1] == ([*word, more] if ids == "the end" else word)
    assert learnt(TWIN, found)[1] == ([*word, TWIN.end(chat=False)] if ids == "the end" else word)
    assert found.sampled is not None
    assert len(found.sampled) == len(found.student.targets)


@pytest.fixture(scope="module")
def gapped() -> SideTokenizer:
    """A student whose vocabulary has a gap: the ids 384 to 399 are no tokens, 400 is."""
    made = json.loads(make_tokenizer().backend_tokenizer.to_str())
    made["model"]["vocab"]["<|im_start|>"] = 400
    for token in made["added_tokens"]:
        token["id"] = made["model"]["vocab"][token["content"]]
    backend = Tokenizer.from_str(json.dumps(made))
    return SideTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>"), "student")


@pytest.mark.parametrize("stop", [(), ("d",)])
def test_an_id_that_is_no_token_spells_nothing_and_cuts_what_another_teacher_reads(
    gapped: SideTokenizer, stop: tuple[str, ...]
) -> None:
    tokenize = PairTokenizer(
        gapped, FOREIGN, max_length=4096, too_long="truncate", same_targets=False,
        aligner=kdflow.get_aligner("byte_span"),
    )  # fmt: skip
    made = RolloutTokenizer(tokenize, stop=stop)
    before, after = gapped.encode("ab"), gapped.encode("cde")
    ids = (*before, 399, *after, END)
    found = made.stopped(Rollout(ids, (-1.0,) * len(ids), "stop"))
    kept = len(before) + 1 + len(gapped.encode("cd")) if stop else len(ids)
    assert found.ids == ids[:kept]
    assert made.text(found.ids) == ("abcd" if stop else "abcde")
    pair = tokenize(ASKED, "a.jsonl:1").pair
    assert pair is not None
    answer = made(pair, found)
    assert answer.student.ids[-kept:].tolist() == list(found.ids)
    assert answer.alignment is not None
    assert (answer.alignment.student >= 0).tolist() == [True] * len(before) + [False] * (kept - len(before))
    assert FOREIGN.bytes_of.decode(learnt(FOREIGN, answer)[1]) == "ab"


@pytest.mark.parametrize("length", range(1, 40))
@pytest.mark.parametrize("teacher", [TWIN, FOREIGN])
def test_no_side_is_left_without_a_token(teacher: SideTokenizer, length: int) -> None:
    tokenize = tokenizer(teacher)
    pair = tokenize(ASKED, "a.jsonl:1").pair
    assert pair is not None
    tokenize.max_length = length
    ids = tuple(STUDENT.encode("Well, I am."))
    made = RolloutTokenizer(tokenize)(pair, Rollout(ids, (-1.0,) * len(ids)))
    assert made.teacher is not None
    assert min(len(made.student.targets), len(made.teacher)) > 0


@pytest.mark.parametrize("teacher", [None, TWIN])
def test_sampled_ids_are_trained_on_as_they_are_and_a_teacher_of_one_vocabulary_reads_them(
    teacher: SideTokenizer | None,
) -> None:
    apart = [STUDENT.encode(letter)[0] for letter in "the"] + [END]  # what the tokenizer itself would join
    assert STUDENT.encode("the") != apart[:-1]
    found = answered(apart, teacher)
    assert learnt(STUDENT, found) == (STUDENT.encode("How are you? "), apart)
    assert found.sampled is not None
    assert found.sampled.tolist() == [0.0, -0.5, -1.0, -1.5]
    assert (found.teacher is None) == (teacher is None)
    if teacher is not None:
        assert learnt(TWIN, found) == learnt(STUDENT, found)


@quick
@given(ids=st.lists(st.integers(0, len(STUDENT.tokenizer) - 1), min_size=1, max_size=30))
@example(ids=[END])
@example(ids=[START, END])
@example(ids=[*STUDENT.encode("ab"), START, *STUDENT.encode("cd"), END])
@example(ids=[*STUDENT.encode("ab"), STUDENT.encode("é")[0], END])
@example(ids=STUDENT.encode("né 你好 👩‍👩‍👧"))
def test_another_teacher_reads_whole_characters_before_the_first_special_token(ids: list[int]) -> None:
    found = answered(ids)
    count, text = text_of(ids, STUDENT.special)
    ended = ids[-1] == END and count == len(ids) - 1
    context, response = learnt(FOREIGN, found)
    assert learnt(STUDENT, found)[1] == ids
    assert context == [*FOREIGN.prefix, *FOREIGN.encode("How are you? ")]
    content = response[:-1] if ended else response
    assert b"".join(FOREIGN.bytes_of.token_bytes(content)).decode() == text
    assert ended == (response[-1:] == [FOREIGN.eos])
    alignment = found.alignment
    assert alignment is not None
    assert (alignment.student[:count] >= 0).all(), "all that was read is aligned"
    assert (alignment.student[count:] >= 0).tolist() == [ended] * (len(ids) - count)
    ours, theirs = STUDENT.bytes_of.token_bytes(ids[:count]), FOREIGN.bytes_of.token_bytes(content)
    for span in range(alignment.spans):
        spelt = [b"".join(token for token, number in zip(tokens, numbers, strict=False) if number == span)
                 for tokens, numbers in ((ours, alignment.student), (theirs, alignment.teacher))]  # fmt: skip
        assert spelt[0] == spelt[1]


def test_a_teacher_that_normalizes_reads_up_to_what_it_would_change() -> None:
    decomposed = unicodedata.normalize("NFD", "é")
    ids = [*STUDENT.encode("so "), *STUDENT.encode("n"), *STUDENT.encode(decomposed), *STUDENT.encode(" it is"), END]
    read = learnt(NORMALIZING, answered(ids, NORMALIZING))[1]
    assert b"".join(NORMALIZING.bytes_of.token_bytes(read)) == b"so n"
    whole = [*STUDENT.encode("so né it is"), END]
    read = learnt(NORMALIZING, answered(whole, NORMALIZING))[1]
    assert b"".join(NORMALIZING.bytes_of.token_bytes(read[:-1])).decode() == "so né it is"
    assert read[-1] == NORMALIZING.eos


def test_a_response_ends_as_its_own_sample_does_in_a_mixture() -> None:
    """Of models whose texts end otherwise than their turns."""
    ours, theirs = make_tokenizer(), make_foreign_tokenizer(template=TEMPLATE)
    ours.eos_token = "<|endoftext|>"
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    student, teacher = SideTokenizer(ours, "student"), SideTokenizer(theirs, "teacher")
    tokenize = PairTokenizer(
        student, teacher, max_length=4096, too_long="truncate", same_targets=False,
        aligner=kdflow.get_aligner("byte_span"),
    )  # fmt: skip
    made, text = RolloutTokenizer(tokenize), ours.eos_token_id
    chat = Sample((Message("user", "Hello"), Message("assistant", "Fine.", True)))
    for sample, ends in ((chat, (text, END)), (ASKED, (text,)), (chat, (text, END))):
        pair = tokenize(sample, "a.jsonl:1").pair
        assert pair is not None
        assert made.stop_ids(pair) == ends
        ids = (*student.encode("Fine."), ends[-1])
        found = made(pair, Rollout(ids, (-1.0,) * len(ids), "stop"))
        assert found.chat == pair.chat
        for one, data in ((found.student, pair.student), (found.teacher, pair.teacher)):
            assert one is not None
            assert data is not None
            assert one.ids.tolist() == data.ids[: data.targets[-1] + 2].tolist(), "as the data's own response"


@pytest.mark.parametrize("teacher", [TWIN, FOREIGN])
def test_the_last_answer_of_a_conversation_is_written_anew_and_the_others_are_context(teacher: SideTokenizer) -> None:
    turns = [("user", "Hello"), ("assistant", "Hi."), ("user", "Well?"), ("assistant", "Fine, thanks.")]
    messages = tuple(Message(role, text, role == "assistant") for role, text in turns)
    ids = [*STUDENT.encode("Good."), END]
    found = answered(ids, teacher, Sample(messages))
    expected = tokenizer(teacher)(Sample((*messages[:-1], Message("assistant", "Good.", True))), "a.jsonl:1").pair
    assert expected is not None
    for one, other in ((found.student, expected.student), (found.teacher, expected.teacher)):
        assert one is not None
        assert other is not None
        assert one.ids.tolist() == other.ids[: other.targets[-1] + 2].tolist()  # but for the line's end
        assert one.targets.tolist() == other.targets[other.response == 1].tolist()


@pytest.mark.parametrize("teacher", [None, TWIN, FOREIGN])
def test_a_response_is_cut_to_the_largest_length_on_both_sides(teacher: SideTokenizer | None) -> None:
    ids = [*STUDENT.encode("So it was that they came, and so it was that they went away again."), END]
    found = answered(ids, teacher, max_length=24)
    sides = [side for side in (found.student, found.teacher) if side is not None]
    assert max(map(len, sides)) <= 24
    response = learnt(STUDENT, found)[1]
    assert 0 < len(response) < len(ids)
    assert response == ids[: len(response)]
    assert found.sampled is not None
    assert len(found.sampled) == len(found.student.targets)
    if found.alignment is not None:
        assert (found.alignment.student >= 0).all()
        assert len(found.alignment.teacher) == len(sides[1].targets)


@pytest.mark.parametrize("teacher", [None, TWIN, FOREIGN], ids=["none", "same", "another"])
def test_a_response_without_ids_leaves_the_sample_as_it_is(teacher: SideTokenizer | None) -> None:
    tokenize = tokenizer(teacher)
    pair = tokenize(ASKED, "a.jsonl:1").pair
    assert pair is not None
    assert RolloutTokenizer(tokenize)(pair, Rollout((), (), "stop")) is pair


@pytest.mark.parametrize("stop", [["\n\n", "X"], ["ne\n"], ["never"]])
def test_texts_end_a_response_and_are_its_last(stop: list[str]) -> None:
    ids = (*STUDENT.encode("One line\n\nand another X, and more"), END)
    made = RolloutTokenizer(tokenizer(FOREIGN), stop=stop)
    found = made.stopped(Rollout(ids, tuple(-1.0 * at for at in range(len(ids))), "stop"))
    assert found.ids == ids[: len(found.ids)]
    assert len(found.log_probabilities) == len(found.ids)
    text = b"".join(STUDENT.bytes_of.token_bytes(found.ids)).decode()
    if stop == ["never"]:
        assert found.ids == ids
        return
    whole, shorter = (b"".join(STUDENT.bytes_of.token_bytes(found.ids[:size])).decode() for size in (None, -1))
    assert any(one in whole for one in stop)
    assert not any(one in shorter for one in stop)
    assert found.finish == "stop"
    pair = tokenizer(FOREIGN)(ASKED, "a.jsonl:1").pair
    assert pair is not None
    read = learnt(FOREIGN, made(pair, found))[1]
    assert FOREIGN.eos not in read, "no end was sampled, and none is made up"
    assert b"".join(FOREIGN.bytes_of.token_bytes(read)).decode() == text


def test_prompts_are_what_stands_before_the_answer() -> None:
    tokenize = tokenizer(FOREIGN)
    pair = tokenize(ASKED, "a.jsonl:1").pair
    assert pair is not None
    assert RolloutTokenizer(tokenize).prompt(pair) == STUDENT.encode("How are you? ")
    chat = Sample((Message("user", "Hello"), Message("assistant", "Hi.", True)))
    pair = tokenize(chat, "a.jsonl:2").pair
    assert pair is not None
    made = RolloutTokenizer(tokenize)
    assert made.prompt(pair) == STUDENT.prompt(Sample(chat.messages[:1]))
    assert made.stop_ids(pair) == (END,)
