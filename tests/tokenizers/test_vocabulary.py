"""Whether two models share a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AddedToken, PreTrainedTokenizerFast

from kdflow.tokenizers import load
from kdflow.tokenizers.vocabulary import VocabularyComparison, compare_vocabularies, vocabulary_size
from tests.support.models import make_tokenizer
from tests.support.small import write_sentencepiece


def vocabulary(special: Iterable[str] = (), added: Iterable[str] = (), **ids: int) -> PreTrainedTokenizerFast:
    """A tokenizer with these tokens at these ids, of which some were added."""
    backend = Tokenizer(models.BPE(ids, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def longer() -> PreTrainedTokenizerFast:
    """A later model of the family, which knows more special tokens."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>", special=True)])
    return tokenizer


def test_a_tokenizer_is_the_same_as_itself() -> None:
    tokenizer = make_tokenizer()
    found = compare_vocabularies(tokenizer, tokenizer)
    assert found.same
    assert found == VocabularyComparison(
        student_size=384, teacher_size=384, shared=384, difference=None, shared_ids=384, shared_tokens=381, renamed={},
        roles={"bos": ("<|endoftext|>",) * 2, "eos": ("<|im_end|>",) * 2, "pad": ("<|im_end|>",) * 2,
               "unk": (None, None)},
        student_gaps=0, teacher_gaps=0,
    )  # fmt: skip


def test_templates_and_special_roles_make_no_difference() -> None:
    other = make_tokenizer(template=None, bos=True)
    other.eos_token = "<|endoftext|>"
    found = compare_vocabularies(make_tokenizer(), other)
    assert found.same
    assert found.roles["eos"] == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("teacher_is_longer", [True, False])
def test_a_longer_vocabulary_of_the_family_is_the_same_where_both_have_tokens(teacher_is_longer: bool) -> None:
    sides = [make_tokenizer(), longer()]
    sizes = [384, 386]
    if not teacher_is_longer:
        sides.reverse()
        sizes.reverse()
    found = compare_vocabularies(*sides)
    assert found.same
    assert [found.student_size, found.teacher_size] == sizes
    assert found.shared == found.shared_ids == 384
    assert found.renamed == {}


def test_another_vocabulary_is_told_apart_at_its_first_other_id() -> None:
    found = compare_vocabularies(make_tokenizer(), make_tokenizer(corpus=["an other text " * 9]))
    assert not found.same
    assert 259 <= found.shared < 384  # three special tokens and 256 bytes are the same
    assert found.difference is not None
    assert f"id {found.shared} is " in found.difference


AB = {"a": 0, "b": 1}
CASES = {
    "another token": (AB, {"a": 0, "c": 1, "b": 2}, 1, 1, "id 1 is 'b' to the student and 'c' to the teacher"),
    "a gap of one side": ({"a": 0, "c": 2}, AB, 1, 1, "id 1 is None to the student and 'b' to the teacher"),
    "the same gap": ({"a": 0, "c": 2}, {"a": 0, "c": 2, "d": 7}, 3, 2, None),
    "nothing in common": (AB, {"b": 0, "a": 1}, 0, 0, "id 0 is 'a' to the student and 'b' to the teacher"),
    "a difference in the middle": (
        {**AB, "c": 2},
        {"a": 0, "x": 1, "c": 2},
        1,
        2,
        "id 1 is 'b' to the student and 'x'",
    ),
    "a part of a character": ({"a": 0, "ä": 1}, AB, 1, 1, "id 1 is b'\\xe4' to the student and 'b' to the teacher"),
}


@pytest.mark.parametrize(("student", "teacher", "shared", "shared_ids", "difference"), CASES.values(), ids=CASES)
def test_ids_are_compared_one_by_one(
    student: dict[str, int], teacher: dict[str, int], shared: int, shared_ids: int, difference: str | None
) -> None:
    found = compare_vocabularies(vocabulary(**student), vocabulary(**teacher))
    assert (found.shared, found.shared_ids) == (shared, shared_ids)
    assert found.same == (difference is None)
    assert str(found.difference).startswith(str(difference))


def test_gaps_and_tokens_at_other_ids_are_counted() -> None:
    found = compare_vocabularies(vocabulary(a=0, c=2), vocabulary(c=1, a=5, d=2))
    assert (found.student_gaps, found.teacher_gaps) == (1, 3)
    assert (found.shared_ids, found.shared_tokens) == (0, 2)


RENAMED = {
    "a special token": ({"special": ["<r>"]}, {"special": ["<s>"]}, {2: ("<r>", "<s>")}),
    "an added token": ({"special": ["<r>"]}, {"added": ["<think>"]}, {2: ("<r>", "<think>")}),
    "special on one side": ({"special": ["<think>"]}, {"added": ["<think>"]}, {}),
    "the rest is the same": (
        {"special": ["<r>", "<e>"]}, {"special": ["<s>", "<e>"], "added": ["<more>"]}, {2: ("<r>", "<s>")},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("student", "teacher", "renamed"), RENAMED.values(), ids=RENAMED)
def test_a_renamed_special_token_is_told_and_leaves_vocabularies_the_same(
    student: dict[str, list[str]], teacher: dict[str, list[str]], renamed: dict[int, tuple[str, str]]
) -> None:
    found = compare_vocabularies(vocabulary(**student, **AB), vocabulary(**teacher, **AB))
    assert found.same
    assert found.shared == min(found.student_size, found.teacher_size)
    assert found.renamed == renamed
    assert found.shared_ids == found.shared - len(renamed)


def test_an_ordinary_token_where_the_other_side_has_a_special_one_is_a_difference() -> None:
    for sides in (
        (vocabulary(**AB, c=2), vocabulary(["<s>"], **AB)),
        (vocabulary(["<s>"], **AB), vocabulary(**AB, c=2)),
    ):
        found = compare_vocabularies(*sides)
        assert not found.same
        assert found.shared == 2
        assert not found.renamed


def test_tokenizers_of_other_libraries_are_compared_by_their_bytes(tmp_path: Path) -> None:
    pieces = load(write_sentencepiece(tmp_path / "a.model"))
    found = compare_vocabularies(make_tokenizer(), pieces)
    assert not found.same
    assert found.shared_tokens > 50  # letters, and words with a space before them, which both write their own way
    assert b" the" in set(pieces.vocabulary.values())


def test_gaps_in_the_ids_count() -> None:
    """A size by the number of tokens would mask the last token of a vocabulary with a gap, as if it were padding."""
    assert vocabulary_size(vocabulary(a=0, b=1, c=7)) == 8
