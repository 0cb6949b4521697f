"""Whether two models share a vocabulary."""

from __future__ import annotations

import pytest
from transformers import AddedToken, PreTrainedTokenizerFast

from kdflow.tokenizers.vocabulary import VocabularyComparison, compare_vocabularies, vocabulary_size
from tests.support.models import make_tokenizer


class Vocabulary:
    """A tokenizer as far as it is compared."""

    def __init__(self, **ids: int) -> None:
        self._ids = ids

    def get_vocab(self) -> dict[str, int]:
        return self._ids


def longer() -> PreTrainedTokenizerFast:
    """A later model of the family, which knows more special tokens."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>", special=True)])
    return tokenizer


def test_a_tokenizer_is_the_same_as_itself() -> None:
    assert compare_vocabularies(make_tokenizer(), make_tokenizer()) == VocabularyComparison(384, 384, 384, None)
    assert compare_vocabularies(make_tokenizer(), make_tokenizer()).same


def test_templates_and_special_roles_make_no_difference() -> None:
    other = make_tokenizer(template=None, bos=True)
    other.eos_token = "<|endoftext|>"
    assert compare_vocabularies(make_tokenizer(), other).same


@pytest.mark.parametrize("teacher_is_longer", [True, False])
def test_a_longer_vocabulary_of_the_family_is_the_same_where_both_have_tokens(teacher_is_longer: bool) -> None:
    sides = [make_tokenizer(), longer()]
    sizes = [384, 386]
    if not teacher_is_longer:
        sides.reverse()
        sizes.reverse()
    found = compare_vocabularies(*sides)
    assert found == VocabularyComparison(sizes[0], sizes[1], 384, None)
    assert found.same


def test_another_vocabulary_is_told_apart_at_its_first_other_id() -> None:
    found = compare_vocabularies(make_tokenizer(), make_tokenizer(corpus=["an other text " * 9]))
    assert not found.same
    assert 259 <= found.shared < 384  # three special tokens and 256 bytes are the same
    assert found.difference is not None
    assert f"id {found.shared} is " in found.difference


AB = Vocabulary(a=0, b=1)
CASES = {
    "another token": (AB, Vocabulary(a=0, c=1, b=2), 1, "id 1 is 'b' to the student and 'c' to the teacher"),
    "a gap of one side": (Vocabulary(a=0, c=2), AB, 1, "id 1 is None to the student and 'b' to the teacher"),
    "the same gap": (Vocabulary(a=0, c=2), Vocabulary(a=0, c=2, d=7), 3, None),
    "nothing in common": (AB, Vocabulary(b=0, a=1), 0, "id 0 is 'a' to the student and 'b' to the teacher"),
}


@pytest.mark.parametrize(("student", "teacher", "shared", "difference"), CASES.values(), ids=CASES)
def test_ids_are_compared_one_by_one(
    student: Vocabulary, teacher: Vocabulary, shared: int, difference: str | None
) -> None:
    found = compare_vocabularies(student, teacher)
    assert found.shared == shared
    assert found.same == (difference is None)
    assert found.difference == difference


def test_gaps_in_the_ids_count() -> None:
    """A size by the number of tokens would mask the last token of a vocabulary with a gap, as if it were padding."""
    assert vocabulary_size(Vocabulary(a=0, b=1, c=7)) == 8
