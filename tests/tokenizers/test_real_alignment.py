"""Aligners over pairs of real tokenizers, on mixed texts and on drawn ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

import kdflow
from kdflow.contracts import TargetAlignment
from kdflow.data.alignment import numbered
from kdflow.tokenizers import Tokenizer
from kdflow.tokenizers.byte_span import ByteSpan
from kdflow.tokenizers.identity import Identity
from kdflow.tokenizers.min_edit import MinEdit
from tests.support.draw import quick
from tests.support.texts import drawn, mixed
from tests.support.tokenizers import directory
from tests.tokenizers.test_aligners import assert_partition, plain_path

pytestmark = pytest.mark.network

PAIRS = [("gpt2", "gemma3"), ("llama3", "qwen2.5"), ("mistral-v1", "deepseek"), ("tekken", "mistral-v3")]
pairs = pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=map("-".join, PAIRS))
draw = settings(quick, suppress_health_check=[HealthCheck.differing_executors])


@cache
def load(name: str) -> Tokenizer:
    return kdflow.tokenizers.load(directory(name))


def tokens(text: str, *names: str) -> list[list[bytes]]:
    """The tokens of a text as all of these tokenizers normalize it."""
    models = [load(name) for name in names]
    for model in models:
        text = model.normalized(text).decode()
    return [model.token_bytes(model.encode(text)) for model in models]


def assert_byte_spans(student: list[bytes], teacher: list[bytes]) -> None:
    found = ByteSpan().align(student, teacher)
    assert_partition(found, student, teacher)
    assert all(b"".join(student[ours]) == b"".join(teacher[theirs]) for ours, theirs in found.spans)
    assert ByteSpan().align(teacher, student).spans == tuple((theirs, ours) for ours, theirs in found.spans)


@pairs
def test_byte_spans_of_every_mixed_text(student: str, teacher: str) -> None:
    one_to_one = spanning = 0
    for row in mixed():
        sides = tokens(row["text"], student, teacher)
        assert_byte_spans(*sides)
        found = TargetAlignment(*numbered(ByteSpan().align(*sides).stops)).shares()
        # All have a partner but sentencepiece's space before a text, where it is a token of its own.
        assert found["unmatched"] == (sides[0][:1] == [b""])
        one_to_one, spanning = one_to_one + found["one_to_one"], spanning + found["spanning"]
    assert min(one_to_one, spanning) > 1000


@pairs
@draw
@given(text=drawn())
def test_byte_spans_of_any_text(student: str, teacher: str, text: str) -> None:
    assert_byte_spans(*tokens(text, student, teacher))


@pytest.mark.parametrize("name", sorted({name for pair in PAIRS for name in pair}))
@draw
@given(text=drawn())
def test_a_tokenizer_and_itself_are_one_to_one(name: str, text: str) -> None:
    ours, theirs = tokens(text, name, name)
    one_to_one = tuple((slice(i, i + 1), slice(i, i + 1)) for i in range(len(ours)))
    for aligner in (ByteSpan(), Identity()):
        assert aligner.align(ours, theirs).spans == one_to_one


@pairs
@draw
@given(text=drawn())
def test_minimum_edit_paths_of_any_text_are_those_of_the_definition(student: str, teacher: str, text: str) -> None:
    ours, theirs = (side[:40] for side in tokens(text, student, teacher))
    found: Any = MinEdit().align(ours, theirs)
    assert_partition(found, ours, theirs)
    assert list(found.path) == (plain_path(ours, theirs) if ours and theirs else [])
