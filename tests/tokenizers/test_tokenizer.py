"""Bytes of tokens and round trips, over any text and small tokenizers of each kind."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdflow.contracts import KdflowError
from kdflow.tokenizers import SpecialTokens, Tokenizer, from_transformers, load, roundtrip
from kdflow.tokenizers.ranks import RankTokenizer
from kdflow.tokenizers.spelling import Spelling
from tests.support.models import make_tokenizer
from tests.support.small import PATTERN, ranks, write_ranks, write_sentencepiece, write_tekken
from tests.support.texts import drawn, mixed

KINDS = ["hugging face", "ranks", "tekken", "sentencepiece", "sentencepiece without prefix"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("small")
    return {
        "hugging face": from_transformers(make_tokenizer()),
        "ranks": load(write_ranks(root / "own.tiktoken"), pattern=PATTERN),
        "tekken": load(write_tekken(root / "tekken.json")),
        "sentencepiece": load(write_sentencepiece(root / "a.model")),
        "sentencepiece without prefix": load(write_sentencepiece(root / "b.model", add_dummy_prefix=False)),
    }


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(text=drawn())
def test_any_text_comes_back(small: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = small[kind]
    found = roundtrip(tokenizer, text)
    expected = text.replace("▁", " ") if kind.startswith("sentencepiece") else text
    assert found.found == expected.encode()
    assert found.exact == (expected == text)
    assert bool(found.reasons) == (not found.exact)
    assert tokenizer.decode(found.ids) == expected
    assert len(tokenizer.token_bytes(found.ids)) == len(found.ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_bytes_are_those_of_each_id_wherever_it_stands(
    small: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = small[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size - 1)))
    cut = data.draw(st.integers(0, len(ids)))
    whole = tokenizer.token_bytes(ids, at_start=False)
    assert whole == [tokenizer.token_bytes([index], at_start=False)[0] for index in ids]
    assert whole == tokenizer.token_bytes(ids[:cut], at_start=False) + tokenizer.token_bytes(ids[cut:], at_start=False)
    start = b"".join(tokenizer.token_bytes(ids))
    assert start == (b"".join(whole).removeprefix(b" ") if tokenizer.prefixes_space else b"".join(whole))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_spelling_is_that_of_each_id(small: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    tokenizer = small[kind]
    assert_spelling(tokenizer, data.draw(st.lists(st.sampled_from(sorted(tokenizer.vocabulary)))))


def assert_spelling(tokenizer: Tokenizer, ids: list[int]) -> None:
    """It is what ``token_bytes`` tells, and the bounds cut the text so."""
    expected = tokenizer.token_bytes(ids)
    for given_ids in (ids, np.array(ids, np.int64)):
        found = tokenizer.spelling(given_ids)
        assert list(found) == expected
        assert found.text == b"".join(expected)
        assert found.bounds.tolist() == [0, *itertools.accumulate(map(len, expected))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_spelling_of_ids_that_are_none_is_refused_by_name(small: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = small[kind]
    size = tokenizer.vocabulary_size
    gaps = sorted(set(range(size)) - set(tokenizer.vocabulary))[:1]
    for wrong in (-1, -size, size, 10**12, *gaps):
        for ids in ([0, wrong, 1], np.array([wrong])):
            with pytest.raises(KdflowError, match=f"id {wrong} is no token of .*ids are 0 to {size - 1}"):
                tokenizer.spelling(ids)


def test_a_spelling_is_a_sequence() -> None:
    tokens = [b"", b"ab", b"c", b""]
    found = Spelling.of(tokens)
    assert Spelling.of(found) is found
    assert (found.text, found.bounds.tolist()) == (b"abc", [0, 0, 2, 3, 3])
    assert (len(found), found[1], found[-2], found[1:3]) == (4, b"ab", b"c", [b"ab", b"c"])
    assert list(found) == tokens
    assert found == tokens
    assert found == Spelling.of(tuple(tokens))
    assert found != [b"abc"]
    assert found != 3
    assert b"".join(found) == b"abc"
    assert b"c" in found
    assert repr(found) == f"Spelling.of({tokens!r})"
    assert len(Spelling.of([])) == 0
    with pytest.raises(IndexError):
        found[4]


def test_all_mixed_texts_come_back_from_a_byte_level_tokenizer(small: dict[str, Tokenizer]) -> None:
    assert all(roundtrip(small["hugging face"], row["text"]).exact for row in mixed())


def test_ids_may_be_an_array(small: dict[str, Tokenizer]) -> None:
    for tokenizer in small.values():
        ids = tokenizer.encode("the thing")
        assert tokenizer.token_bytes(np.array(ids, dtype=np.int64)) == tokenizer.token_bytes(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_refused(small: dict[str, Tokenizer], kind: str) -> None:
    with pytest.raises(KdflowError, match=r"half a surrogate pair, '\\ud83d' at character 3, .* repair it"):
        small[kind].encode("abc\ud83d")


def test_a_run_of_spaces_that_overflows_tiktoken_is_an_error_not_the_end(small: dict[str, Tokenizer]) -> None:
    tokenizer = load(Path(small["ranks"].source), pattern=r"\s+(?!\S)|\s+|\S+")
    with pytest.raises(KdflowError, match="tiktoken gives up on a text of 2,000,001 characters"):
        tokenizer.encode(" " * 2_000_000 + "x")


def test_a_tokenizer_of_transformers_stays_in_use() -> None:
    """It may be padding and reading special tokens for somebody else between two calls."""
    owner = make_tokenizer()
    tokenizer = from_transformers(owner)
    text = "a <|im_end|> b"
    before = tokenizer.encode(text)
    assert owner("short", padding="max_length", max_length=40, truncation=True)["attention_mask"][-1] == 0
    assert 2 in owner.encode(text)
    assert tokenizer.encode(text) == before
    assert 2 not in before


def test_a_tokenizer_without_backend_says_what_to_do() -> None:
    class Slow:
        name_or_path = "some/where"

    with pytest.raises(KdflowError, match=r"some/where: a Slow has no backend .* give the path of that file"):
        from_transformers(Slow())


# --- reasons ---------------------------------------------------------------------------------------------------------


def test_what_sentencepiece_changes_and_cannot_spell_is_told(tmp_path: Path) -> None:
    """With its defaults: no bytes to fall back on, NFKC, runs of spaces made one."""
    defaults = {"byte_fallback": False, "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    tokenizer = load(write_sentencepiece(tmp_path / "lossy.model", vocab_size=300, **defaults))
    assert tokenizer.normalizes == ("NFKC", "runs of spaces to one", "U+2581 to space")
    found = roundtrip(tokenizer, "the ﬁrst  house")
    assert found.found == b"the first house"
    assert list(found.reasons) == ["normalization"]
    assert "NFKC" in found.reasons["normalization"]
    assert "at byte 4, b'\\xef\\xac\\x81rst  hous' became b'first house'" in found.reasons["normalization"]
    found = roundtrip(tokenizer, "the 你 house")
    assert found.found == b"the  house"
    assert list(found.reasons) == ["unknown token"]
    assert found.reasons["unknown token"].startswith("1 tokens are <unk>, which stands for no bytes: at byte 4")
    assert tokenizer.decode(found.ids) == "the  house"


def test_bytes_that_a_vocabulary_lacks_are_told() -> None:
    letter = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\x04")[0][0]
    rules = make_tokenizer().backend_tokenizer.to_str()
    assert f'"{letter}":' in rules
    without = Backend.from_str(rules.replace(f'"{letter}":', '"another":'))
    tokenizer = from_transformers(PreTrainedTokenizerFast(tokenizer_object=without))
    assert tokenizer.missing_bytes == b"\x04"
    found = roundtrip(tokenizer, "a\x04b\x04")
    assert found.found == b"ab"
    assert found.reasons == {"missing bytes": "no token spells 0x04; 2 bytes are gone"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [([1000 + ord("b")], "at byte 0, b'a' became b'b'"), ([0, 1000 + ord("b")], "at byte 0, b'a' became b'b'")],
    ids=["another byte", "another byte beside an unknown token"],
)
def test_a_difference_that_nothing_explains_is_not_hidden(wrong: list[int], told: str) -> None:
    class Broken(RankTokenizer):
        def _encode(self, text: str) -> list[int]:
            return wrong

    tokenizer = Broken("broken", ranks(), PATTERN, SpecialTokens({0: "<unk>"}, unk=0), offset=1000)
    assert roundtrip(tokenizer, "a").reasons == {"unexplained": told}
