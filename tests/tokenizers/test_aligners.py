"""Aligners: what each promises on any bytes, and against the originals' alignments."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdflow
from kdflow.contracts import Alignment
from kdflow.tokenizers import min_edit
from kdflow.tokenizers.byte_span import ByteSpan
from kdflow.tokenizers.identity import Identity
from kdflow.tokenizers.min_edit import MinEdit
from kdflow.tokenizers.spelling import Spelling
from tests.support.draw import quick

VECTORS = Path(__file__).parents[1] / "vectors"
ALIGNERS = [Identity(), ByteSpan(), MinEdit()]
TEXT = st.binary(max_size=60)
CUTS = st.lists(st.integers(0, 60), max_size=20)
TOKENS = st.lists(st.sampled_from([b"a", b"ab", b" ab", b"b", b" ", b"", "é".encode(), b"\xc3", b"\xa9"]), max_size=12)


def cut(text: bytes, at: list[int]) -> list[bytes]:
    """A text in tokens; a place that is named twice gives one without bytes."""
    bounds = [0, *sorted(min(place, len(text)) for place in at), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(bounds)]


def assert_partition(alignment: Alignment, student: list[bytes], teacher: list[bytes]) -> None:
    for side, tokens in enumerate((student, teacher)):
        slices = [span[side] for span in alignment.spans]
        bounds = [0, *(one.stop for one in slices)]
        assert [one.start for one in slices] == bounds[:-1]
        assert bounds[-1] == len(tokens)
    assert all(ours.start < ours.stop or theirs.start < theirs.stop for ours, theirs in alignment.spans)


# --- what they promise ------------------------------------------------------------------------------------------------


@quick
@given(text=TEXT, ours=CUTS, theirs=CUTS)
def test_spans_partition_both_sides(text: bytes, ours: list[int], theirs: list[int]) -> None:
    student, teacher = cut(text, ours), cut(text, theirs)
    for aligner in ALIGNERS:
        assert_partition(aligner.align(student, teacher), student, teacher)


@quick
@given(student=TOKENS, teacher=TOKENS)
def test_also_where_the_sides_spell_different_texts(student: list[bytes], teacher: list[bytes]) -> None:
    for aligner in (Identity(), MinEdit()):
        assert_partition(aligner.align(student, teacher), student, teacher)


@quick
@given(text=TEXT, ours=CUTS, theirs=CUTS)
def test_byte_spans_spell_the_same_bytes_are_the_finest_and_mirror(
    text: bytes, ours: list[int], theirs: list[int]
) -> None:
    student, teacher = cut(text, ours), cut(text, theirs)
    spans = ByteSpan().align(student, teacher).spans
    assert all(b"".join(student[a]) == b"".join(teacher[b]) for a, b in spans)
    assert ByteSpan().align(teacher, student).spans == tuple((b, a) for a, b in spans)
    if student != teacher:
        ends = [set(itertools.accumulate(map(len, side))) - {0} for side in (student, teacher)]
        assert len([a for a, b in spans if b"".join(student[a])]) == len(ends[0] & ends[1])


@quick
@given(tokens=TOKENS)
def test_equal_tokens_are_paired_one_to_one(tokens: list[bytes]) -> None:
    expected = tuple((slice(i, i + 1), slice(i, i + 1)) for i in range(len(tokens)))
    assert ByteSpan().align(tokens, list(tokens)).spans == expected
    assert Identity().align(tokens, list(tokens)).spans == expected


def test_tokens_without_bytes_go_with_the_one_before_or_stand_at_the_start() -> None:
    aligned = ByteSpan().align([b"", b"a", b"", b"bc"], [b"ab", b"c"])
    assert aligned.spans == ((slice(0, 1), slice(0, 0)), (slice(1, 4), slice(0, 2)))
    assert ByteSpan().align([b"a", b"", b"b"], [b"a", b"b"]).spans == (
        (slice(0, 2), slice(0, 1)),
        (slice(2, 3), slice(1, 2)),
    )
    assert ByteSpan().align([b""], []).spans == ((slice(0, 1), slice(0, 0)),)
    assert ByteSpan().align([], []).spans == ()


def test_different_texts_are_refused_with_the_place() -> None:
    with pytest.raises(ValueError, match=r"different texts from byte 3 on: b'd' to the student, b'e f' to the teacher"):
        ByteSpan().align([b"abc", b"d"], [b"ab", b"ce f"])
    with pytest.raises(ValueError, match=r"from byte 2 on: b'' to the student, b'c'"):
        ByteSpan().align([b"ab"], [b"abc"])


def test_by_number_the_rest_has_no_partner() -> None:
    assert Identity().align([b"a", b"b", b"c"], [b"abc"]).spans == (
        (slice(0, 1), slice(0, 1)),
        (slice(1, 3), slice(1, 1)),
    )


@quick
@given(text=TEXT, ours=CUTS, theirs=CUTS)
def test_a_spelling_is_aligned_as_the_list_of_its_tokens(text: bytes, ours: list[int], theirs: list[int]) -> None:
    student, teacher = cut(text, ours), cut(text, theirs)
    for aligner in ALIGNERS:
        found = aligner.align(Spelling.of(student), Spelling.of(teacher))
        assert found == aligner.align(student, teacher)
        assert found == Alignment(found.spans, found.path)


@quick
@given(sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=20))
def test_an_alignment_has_spans_and_their_stops_whichever_it_is_made_of(sizes: list[tuple[int, int]]) -> None:
    ends = [[0, *itertools.accumulate(size[side] for size in sizes)] for side in (0, 1)]
    spans = tuple(zip(*([slice(*both) for both in itertools.pairwise(side)] for side in ends), strict=True))
    of_spans, of_stops = Alignment(spans), Alignment(stops=np.array(ends)[:, 1:])
    assert of_stops.spans == spans
    assert of_spans.stops.shape == (2, len(sizes))
    assert of_spans.stops.tolist() == [side[1:] for side in ends]
    assert of_spans == of_stops
    assert of_spans != Alignment(spans, ((0, 0),))
    assert repr(of_stops) == f"Alignment(spans={spans}, path=None)"


@pytest.mark.parametrize("made_of", [{}, {"spans": (), "stops": np.zeros((2, 0), np.int64)}], ids=["none", "both"])
def test_an_alignment_is_made_of_one_of_the_two(made_of: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="give one of the two"):
        Alignment(**made_of)


def test_they_are_found_by_name() -> None:
    for name in ("identity", "byte_span", "min_edit"):
        assert kdflow.get_aligner(name).align([b"ab"], [b"a", b"b"]).spans


# --- minimum edit -----------------------------------------------------------------------------------------------------


def distance(one: bytes, other: bytes) -> int:
    """Levenshtein's, by its recurrence."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def plain_path(student: list[bytes], teacher: list[bytes]) -> list[tuple[int, int]]:
    """The definition, cell by cell."""
    cheapest: dict[tuple[int, int], tuple[int, tuple[int, int] | None]] = {}
    for i, j in itertools.product(range(len(teacher)), range(len(student))):
        ways = [cell for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if cell in cheapest]
        way = min(ways, key=lambda cell: cheapest[cell][0], default=None)
        cost = distance(teacher[i].replace(b" ", b""), student[j].replace(b" ", b""))
        cheapest[i, j] = (cost + (cheapest[way][0] if way else 0), way)
    at: tuple[int, int] | None = (len(teacher) - 1, len(student) - 1)
    path = []
    while at is not None:
        path.append((at[1], at[0]))
        at = cheapest[at][1]
    return path[::-1]


@pytest.mark.parametrize("held", [1, 40, 2**23])
@quick
@given(student=TOKENS.filter(bool), teacher=TOKENS.filter(bool))
def test_the_path_is_that_of_the_definition_however_little_of_the_table_is_held(
    held: int, student: list[bytes], teacher: list[bytes]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(min_edit, "_HELD", held)
        assert list(MinEdit().align(student, teacher).path or ()) == plain_path(student, teacher)


@quick
@given(student=TOKENS.filter(bool), teacher=TOKENS.filter(bool))
def test_spans_are_what_the_path_connects(student: list[bytes], teacher: list[bytes]) -> None:
    aligned = MinEdit().align(student, teacher)
    for ours, theirs in aligned.spans:
        inside = [(a, b) for a, b in aligned.path or () if ours.start <= a < ours.stop]
        assert all(theirs.start <= b < theirs.stop for _, b in inside)
        assert all(a == c or b == d for (a, b), (c, d) in itertools.pairwise(inside))


def test_a_long_response_takes_less_than_a_byte_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(min_edit, "_HELD", 1)
    choose = random.Random(0)
    student, teacher = ([bytes([choose.randrange(97, 117)]) for _ in range(3000)] for _ in range(2))
    tracemalloc.start()
    path = MinEdit().align(student, teacher).path
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path is not None
    assert len(path) >= 3000
    assert peak < 3000 * 3000
    monkeypatch.setattr(min_edit, "_HELD", 2**24)  # in one block
    assert path == MinEdit().align(student, teacher).path


def test_totals_past_32_bits_are_held() -> None:
    tokens = [b"x" * 60_000, b"a", b"b"] * 300
    found = MinEdit().align(tokens, tokens[1:])
    assert found.path is not None
    assert found.path[:3] == ((0, 0), (1, 0), (2, 1))
    assert found.path[-1] == (899, 898)


# --- the originals ----------------------------------------------------------------------------------------------------


def _byte_map() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTES = _byte_map()


def as_bytes(tokens: list[str], tokenizer: str) -> list[bytes]:
    if "mistral" not in tokenizer and "j2" not in tokenizer:
        spelt = (all(character in BYTES for character in token) for token in tokens)  # special tokens are not
        return [bytes(map(BYTES.__getitem__, t)) if b else t.encode() for t, b in zip(tokens, spelt, strict=True)]
    plain = [token.replace("▁", " ").encode() for token in tokens]
    return [bytes([int(t[3:5], 16)]) if t.startswith("<0x") else p for t, p in zip(tokens, plain, strict=True)]


def cases(method: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((VECTORS / method / "cases.json").read_text(encoding="utf-8"))["cases"]
    return found


def words(case: dict[str, Any]) -> dict[str, Any]:
    """Its inputs, which some cases share with another one."""
    given: dict[str, Any] = case["json_inputs"]
    return words(MINED[given["same_as"]]) if "same_as" in given else given


MINED = {case["id"]: case for case in cases("mined_alignment")}


def _is_comparable(case: dict[str, Any]) -> bool:
    """FuseLLM compares characters of the byte map with characters: only printable ASCII is the same to it as to us."""
    if case["impl"] not in ("fusellm", "fusechat") or "alignment" not in case:
        return False
    text = words(case)["text"]
    byte_level = not any(name in case["id"] for name in ("mistral", "j2"))
    return byte_level or (text.isascii() and text.isprintable())


# In the case that is left out the text names special tokens, which the original compares by their names.
PATHS = [case for case in MINED.values() if _is_comparable(case) and case["id"] != "llama3-deepseek.special.fusechat"]
GOLD = [case for case in cases("gold_byte_alignment") if "student_tokens" in case["json_inputs"]]
GOLD = [case for case in GOLD if "mistral" not in case["id"]]


def test_there_are_cases() -> None:
    assert len(PATHS) > 15
    assert len(GOLD) > 20


@pytest.mark.parametrize("case", PATHS, ids=lambda case: case["id"])
def test_paths_are_fusellms_and_fusechats(case: dict[str, Any]) -> None:
    given = words(case)
    student = as_bytes(given["student_tokens"], given["student_tokenizer"])
    teacher = as_bytes(given["teacher_tokens"], given["teacher_tokenizer"])
    expected = [(b, a) for a, b in case["alignment"]["matches"]]
    aligner = kdflow.get_aligner("min_edit", match_cost=case["impl"])
    assert list(aligner.align(student, teacher).path or ()) == expected


@pytest.mark.parametrize("case", GOLD, ids=lambda case: case["id"])
def test_byte_spans_are_golds_where_both_spell_the_text(case: dict[str, Any]) -> None:
    given = case["json_inputs"]
    student, teacher = as_bytes(given["student_tokens"], "gpt2"), as_bytes(given["teacher_tokens"], "gpt2")
    if b"".join(student) != b"".join(teacher):
        with pytest.raises(ValueError, match="different texts"):
            ByteSpan().align(student, teacher)
        return
    spans = ByteSpan().align(student, teacher).spans
    assert [list(range(a.start, a.stop)) for a, _ in spans] == case["alignment"]["student_groups"]
    assert [list(range(b.start, b.stop)) for _, b in spans] == case["alignment"]["teacher_groups"]


def test_chinese_between_byte_level_and_sentencepiece_is_aligned_where_fusellm_sees_noise() -> None:
    (case,) = (case for case in cases("mined_alignment") if case["id"] == "qwen-mistral_v1.chinese")
    given = case["json_inputs"]
    student = as_bytes(given["student_tokens"], "mistral")[1:]  # without sentencepiece's own space
    teacher = as_bytes(given["teacher_tokens"], "qwen")
    spans = ByteSpan().align(student, teacher).spans
    assert len(spans) > 8
    assert all(b"".join(student[a]) == b"".join(teacher[b]) for a, b in spans)


KDFLOW = {case["id"]: case for case in cases("kdflow_token_alignment") if "text" in case["json_inputs"]}


def contents(case: dict[str, Any]) -> tuple[list[bytes], list[bytes]]:
    """Student's and teacher's tokens without the one that ends them, and without sentencepiece's own space."""
    found = []
    for side, tokenizer in zip(("teacher", "student"), case["id"].split(".")[0].split("-"), strict=True):
        tokens = case["json_inputs"][f"{side}_tokens"]
        ended = tokens[-1:] == [case["params"][f"{side}_eos"]]
        tokens = as_bytes(tokens[: len(tokens) - ended], tokenizer)
        if tokenizer in ("mistral_v1", "j2") and tokens:
            tokens[0] = tokens[0].removeprefix(b" ")
        found.append(tokens)
    return found[1], found[0]


def equal_tokens(student: list[bytes], teacher: list[bytes]) -> set[tuple[int, int]]:
    """Pairs of tokens that begin and end at the same bytes of the text: what is to be found."""
    ends = [[0, *itertools.accumulate(map(len, side))] for side in (student, teacher)]
    places = [{place: at for at, place in enumerate(itertools.pairwise(side)) if place[0] < place[1]} for side in ends]
    return {(places[0][place], places[1][place]) for place in places[0].keys() & places[1].keys()}


def one_to_one(alignment: Alignment) -> set[tuple[int, int]]:
    return {(a.start, b.start) for a, b in alignment.spans if a.stop - a.start == b.stop - b.start == 1}


SAME_TEXT = {name: case for name, case in KDFLOW.items() if len({b"".join(side) for side in contents(case)}) == 1}


@pytest.mark.parametrize("algorithm", ["eta", "simple_ctkd"])
@pytest.mark.parametrize("case", SAME_TEXT.values(), ids=lambda case: case["id"])
def test_what_kdflow_pairs_is_paired_and_every_other_equal_token_too(case: dict[str, Any], algorithm: str) -> None:
    student, teacher = contents(case)
    found, theirs = one_to_one(ByteSpan().align(student, teacher)), case["alignment"][algorithm]
    pairs = set(zip(theirs["student_idx"], theirs["teacher_idx"], strict=True)) - {(len(student), len(teacher))}
    assert pairs <= found == equal_tokens(student, teacher)
    if "english" in case["id"]:
        assert pairs == found


@pytest.mark.parametrize(
    ("name", "length", "kdflows", "ours"),
    [
        ("qwen-mistral_v1.chinese", 28, 0, 3),
        ("qwen-mistral_v1.code", 26, 2, 17),
        ("qwen-mistral_v1.emoji_zwj", 43, 1, 12),
        ("qwen-mistral_v1.mixed", 16, 0, 11),  # English with one Chinese word
        ("mistral_v1-qwen.mixed", 14, 0, 11),
        ("j2-qwen.mixed", 14, 1, 8),
    ],
)
def test_after_another_spelling_kdflow_pairs_nothing_more(name: str, length: int, kdflows: int, ours: int) -> None:
    """Its two histories, of tokens' names, never agree again; the end of the response is lost with the rest."""
    case = KDFLOW[name]
    assert len(case["json_inputs"]["student_tokens"]) == length
    student, teacher = contents(case)
    for found in case["alignment"].values():
        assert len(found["student_idx"]) == kdflows
        assert len(student) not in found["student_idx"]
    aligned = ByteSpan().align(student, teacher)
    assert len(one_to_one(aligned)) == ours
    assert all(b"".join(student[a]) == b"".join(teacher[b]) for a, b in aligned.spans)
