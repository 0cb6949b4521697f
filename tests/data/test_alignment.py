"""Responses of two tokenizers, aligned: what belongs together, also where it was cut, and what is refused."""

from __future__ import annotations

import gc
import importlib
import inspect
import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdflow
from kdflow.contracts import Alignment, KdflowError, Message, Pair, Sample, TargetAlignment, TokenBatch
from kdflow.data.alignment import ResponseAligner, aligned, numbered
from kdflow.data.packing import collate
from kdflow.data.rendering import Segment, SideTokenizer
from kdflow.data.tokenization import PairTokenizer
from tests.support.draw import quick
from tests.support.models import TEMPLATE, make_foreign_tokenizer, make_tokenizer, texts

TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}]{{ message['content'].strip() }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
STUDENT = SideTokenizer(make_tokenizer(), "student")
TEACHER = SideTokenizer(make_foreign_tokenizer(template=TURNS), "teacher")
TEXTS = [
    *(text[:300] for text in texts()[:3]),
    "Sonnig, 25 °C – schön! ☀",
    "你好，世界",
    "👩‍👩‍👧 ok",
    "  two  spaces\n\n",
    "def f(x):\n    return x\n",
]


def tokenizer(
    aligner: str = "byte_span", student: SideTokenizer = STUDENT, teacher: SideTokenizer = TEACHER, **options: Any
) -> PairTokenizer:
    given = {"max_length": 4096, "too_long": "truncate", "same_targets": False, **options}
    return PairTokenizer(student, teacher, aligner=kdflow.get_aligner(aligner), **given)


def pair(sample: Sample, *arguments: Any, **options: Any) -> Pair:
    found = tokenizer(*arguments, **options)(sample, "a.jsonl:1").pair
    assert found is not None
    return found


def spelt(found: Pair) -> list[tuple[bytes, bytes]]:
    """The bytes that the targets of each span spell, of student and teacher; what has no span is left out."""
    assert found.alignment is not None
    assert found.teacher is not None
    sides = []
    for side, tokens, numbers in (
        (STUDENT, found.student, found.alignment.student), (TEACHER, found.teacher, found.alignment.teacher)
    ):  # fmt: skip
        labels = side.bytes_of.token_bytes(tokens.ids[tokens.targets + 1].tolist(), at_start=False)
        sides.append([b"".join(label for label, number in zip(labels, numbers, strict=True) if number == span)
                      for span in range(found.alignment.spans)])  # fmt: skip
    return list(zip(*sides, strict=True))


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_spans_of_a_response_spell_the_same_and_ends_meet(text: str) -> None:
    found = pair(Sample(prompt="Q: ", response=text))
    alignment = found.alignment
    assert alignment is not None
    assert found.teacher is not None
    assert min(*alignment.student, *alignment.teacher) >= 0, "every token belongs somewhere"
    pieces = spelt(found)
    for at, (ours, theirs) in enumerate(pieces):
        assert theirs == (b" " + ours if at == 0 else ours)  # sentencepiece writes a space of its own before a text
    assert pieces[-1] == (b"", b""), "the ends, which spell nothing, meet"
    assert b"".join(ours for ours, _ in pieces) == text.encode()
    assert sum(alignment.shares().values()) == len(found.student.targets)


@quick
@given(text=st.text(min_size=1, max_size=30))
def test_any_text_is_aligned_or_refused_by_name(text: str) -> None:
    spells = (
        STUDENT.bytes_of.decode(STUDENT.bytes_of.encode(text)),
        TEACHER.bytes_of.decode(TEACHER.bytes_of.encode(text)),
    )
    if spells[0] != spells[1]:  # ▁ is a space to one of them
        with pytest.raises(KdflowError, match=r"^a\.jsonl:1: the tokens spell different texts"):
            pair(Sample(prompt="Q: ", response=text))
        return
    assert all(ours.strip() == theirs.strip() for ours, theirs in spelt(pair(Sample(prompt="Q: ", response=text))))


class ByObjects(kdflow.Aligner):
    """Another package's aligner: it takes tokens one by one, and gives slices. Cuts where byte_span does."""

    name = "by_objects"

    def align(self, student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> Alignment:
        ends = [list(itertools.accumulate(map(len, side))) for side in (student_tokens, teacher_tokens)]
        shared = sorted(set(ends[0]) & set(ends[1]) | {0})
        stops = [[sum(end <= place for end in side) for place in shared] for side in ends]
        spans = [
            (slice(a, b), slice(c, d))
            for (a, b), (c, d) in zip(*(itertools.pairwise([0, *side]) for side in stops), strict=True)
            if a < b or c < d
        ]
        return Alignment(tuple(spans))


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_an_aligner_of_another_package_may_know_nothing_of_arrays(text: str) -> None:
    sample = Sample(prompt="Q: ", response=text)
    expected = pair(sample).alignment
    found = PairTokenizer(STUDENT, TEACHER, max_length=4096, too_long="drop", same_targets=False, aligner=ByObjects())(
        sample, "a.jsonl:1"
    ).pair
    assert found is not None
    assert found.alignment is not None
    assert expected is not None
    assert np.array_equal(found.alignment.student, expected.student)
    assert np.array_equal(found.alignment.teacher, expected.teacher)


class Given(kdflow.Aligner):
    """A plugin's aligner, which gives this of two and three tokens."""

    name = "given"
    given: Any = None

    def align(self, student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> Alignment:
        assert (len(student_tokens), len(teacher_tokens)) == (2, 3)
        found: Alignment = self.given
        return found


WHOLE = (slice(0, 1), slice(0, 2)), (slice(1, 2), slice(2, 3))


@pytest.mark.parametrize(
    "given",
    [
        Alignment(WHOLE),
        Alignment([(slice(1), slice(2)), (slice(1, 2), slice(2, 3))]),
        Alignment([(slice(0, 2), slice(0, 0)), (slice(2, 2), slice(0, 3))]),
        Alignment(stops=np.array([[1, 2], [2, 3]])),
        Alignment(WHOLE, path=()),
        Alignment(WHOLE, path=((0, 0), (0, 1), (1, 2))),
    ],
    ids=repr,
)
def test_what_an_aligner_gives_is_taken_where_it_partitions_both_sides(given: Alignment) -> None:
    aligner = Given()
    aligner.given = given
    assert aligned(aligner, [b"a", b"b"], [b"a", b"", b"b"]) is given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (list(WHOLE), r"\[\(slice.*, not an Alignment"),
        (None, "None, not an Alignment"),
        (Alignment(()), "spans that do not partition the 2 tokens of the student and the 3 of the teacher"),
        (Alignment(WHOLE[:1]), "spans that do not partition"),
        (Alignment(WHOLE[1:]), "spans that do not partition"),
        (Alignment(WHOLE[::-1]), "spans that do not partition"),
        (Alignment([*WHOLE, (slice(2, 3), slice(3, 3))]), "spans that do not partition"),
        (Alignment([(slice(0, 1), slice(0, 1)), (slice(1, 2), slice(2, 3))]), "spans that do not partition"),
        (Alignment([(slice(0, 2), slice(0, 2)), (slice(1, 2), slice(2, 3))]), "spans that do not partition"),
        (Alignment(stops=np.array([[-1, 2], [2, 3]])), "spans that do not partition"),
        (Alignment(stops=np.array([[1, 2], [4, 3]])), "spans that do not partition"),
        (Alignment(WHOLE, path=((0, 0), (2, 2))), "a path that is none through the 2 tokens of the student and the 3 "),
        (Alignment(WHOLE, path=((0, 0), (1, 3))), "a path that is none"),
        (Alignment(WHOLE, path=((-1, 0), (1, 1))), "a path that is none"),
        (Alignment(WHOLE, path=((1, 0), (0, 1))), "a path that is none"),
        (Alignment(WHOLE, path=((0, 1), (1, 0))), "a path that is none"),
        (Alignment(WHOLE, path=((0.0, 0.0),)), "a path that is none"),  # type: ignore[arg-type]
        (Alignment(WHOLE, path=((0, 0, 0),)), "a path that is none"),  # type: ignore[arg-type]
        (Alignment(WHOLE, path=((0, 0), (1,))), "a path that is none"),  # type: ignore[arg-type]
        (Alignment(WHOLE, path=(0, 1)), "a path that is none"),  # type: ignore[arg-type]
    ],
)
def test_what_an_aligner_does_wrong_is_told_as_its_own(given: Any, message: str) -> None:
    aligner = Given()
    aligner.given = given
    ids = [STUDENT.encode("a")[0], STUDENT.encode("b")[0]]
    sides = [Segment(ids, True, "ab", 2)], [Segment([*ids, ids[0]], True, "aba", 3)]
    with pytest.raises(KdflowError, match=f"^aligner 'given' gave {message}"):
        ResponseAligner(aligner, STUDENT.bytes_of, STUDENT.bytes_of).align(*sides)


class Adds(kdflow.Aligner):
    """A plugin's aligner that takes tokens for numbers."""

    name = "adds"

    def align(self, student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> Alignment:
        return Alignment(path=(student_tokens[0] + 1,))  # type: ignore[operator]


def test_what_an_aligner_fails_at_is_told_with_the_record() -> None:
    tokenize = PairTokenizer(STUDENT, TEACHER, max_length=64, too_long="drop", same_targets=False, aligner=Adds())
    with pytest.raises(KdflowError, match=r"^a\.jsonl:1: aligner 'adds' failed: TypeError: can't concat int to bytes$"):
        tokenize(Sample(prompt="Q: ", response="yes"), "a.jsonl:1")


@pytest.mark.parametrize(
    "module",
    [
        "contracts.algorithms", "data.alignment", "tokenizers.byte_span", "tokenizers.spelling",
        "tokenizers.tokenizer", "tokenizers.huggingface",
    ],
)  # fmt: skip
def test_code_that_changes_makes_another_key(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize, read = tokenizer(), inspect.getsource
    before = tokenize.key
    changed = importlib.import_module(f"kdflow.{module}")
    monkeypatch.setattr(inspect, "getsource", lambda of: read(of) + "#" * (of is changed))
    assert tokenize.key != before


def test_byte_span_makes_no_object_for_a_token() -> None:
    """Hundreds of new objects would wake Python's collector, which goes through all vocabularies in memory."""
    text = " ".join(texts())[:3000]
    sides = [[Segment(ids := side.encode(text), True, text, len(ids))] for side in (STUDENT, TEACHER)]
    align = ResponseAligner(kdflow.get_aligner("byte_span"), STUDENT.bytes_of, TEACHER.bytes_of).align
    align(*sides)
    gc.collect()
    before = gc.get_count()[0]
    found = align(*sides)
    assert gc.get_count()[0] - before < 50 < len(found.student)


def test_a_conversation_is_aligned_turn_by_turn_though_templates_differ() -> None:
    turns = [("user", "Wie ist das Wetter?", False), ("assistant", " Sonnig! ", True), ("user", "Und?", False),
             ("assistant", "Warm.", True)]  # fmt: skip
    found = pair(Sample(tuple(Message(*turn) for turn in turns)))
    assert found.alignment is not None
    assert found.teacher is not None
    ours, theirs = zip(*spelt(found), strict=True)
    # The teacher's template strips, so both learn the stripped text; <|im_end|> meets </s>.
    assert b"".join(ours) == b"Sonnig!Warm."
    assert b"".join(theirs) == b" Sonnig! Warm."
    response = [side.response for side in (found.student, found.teacher)]
    for number in range(found.alignment.spans):
        (a,), (b,) = (
            set(r[of == number])
            for r, of in zip(response, (found.alignment.student, found.alignment.teacher), strict=True)
        )
        assert a == b


def test_without_a_prompt_the_token_that_nothing_predicts_has_no_partner() -> None:
    found = pair(Sample(response="The end."))
    assert found.alignment is not None
    assert found.teacher is not None
    # The student has no start token: its first token is no target, but the teacher's, after <s>, is.
    assert len(found.alignment.student) == len(found.student.targets) == len(found.student.ids) - 1
    assert len(found.teacher.targets) == len(found.teacher.ids) - 1
    assert found.alignment.teacher[0] == -1
    assert (found.alignment.student >= 0).all()


@pytest.mark.parametrize("aligner", ["byte_span", "min_edit", "identity"])
@pytest.mark.parametrize("max_length", [20, 33, 64])
def test_both_sides_are_cut_at_the_same_place(aligner: str, max_length: int) -> None:
    sample = Sample(prompt="Q: ", response=texts()[0][:400])
    whole, found = pair(sample, aligner), pair(sample, aligner, max_length=max_length)
    assert found.alignment is not None
    assert found.teacher is not None
    assert whole.alignment is not None
    assert max(len(found.student), len(found.teacher)) <= max_length
    counts = len(found.student.targets), len(found.teacher.targets)
    assert counts == (len(found.alignment.student), len(found.alignment.teacher))
    # What is left is what it was, and no span lost a part.
    assert np.array_equal(found.alignment.student, whole.alignment.student[: counts[0]])
    assert np.array_equal(found.alignment.teacher, whole.alignment.teacher[: counts[1]])
    for side, count in zip((whole.alignment.student, whole.alignment.teacher), counts, strict=True):
        assert not set(side[:count][side[:count] >= 0]) & set(side[count:])
    if aligner == "byte_span":
        assert b"".join(a for a, _ in spelt(found)) == b"".join(b for _, b in spelt(found)).removeprefix(b" ")


def test_a_side_that_normalizes_does_so_for_both() -> None:
    text = unicodedata.normalize("NFD", "schön, Åse é")
    teacher = SideTokenizer(make_foreign_tokenizer(nfc=True), "teacher")
    found = pair(Sample(prompt="Q: ", response=text), teacher=teacher)
    ids = found.student.ids[found.student.targets + 1].tolist()
    assert b"".join(STUDENT.bytes_of.token_bytes(ids)).decode() == unicodedata.normalize("NFC", text)
    texts_of = [side.bytes_of.decode(side.bytes_of.encode(text)) for side in (STUDENT, teacher)]
    assert texts_of[0] != texts_of[1], "without it the two would spell different texts"


def test_a_path_survives_cutting_and_dropping() -> None:
    sample = Sample(response=texts()[0][:200])
    found = pair(sample, "min_edit", max_length=40)
    assert found.alignment is not None
    assert found.alignment.path is not None
    assert found.teacher is not None
    path = found.alignment.path
    assert (path >= 0).all()
    assert (path.max(0) < [len(found.student.targets), len(found.teacher.targets)]).all()
    wanted = np.arange(len(found.teacher.targets)) % 3 == 0
    less = found.with_teacher_targets(wanted)
    assert less.alignment is not None
    assert less.alignment.path is not None
    assert less.teacher is not None
    kept = np.flatnonzero(wanted)
    assert [(a, kept[b]) for a, b in less.alignment.path] == [(a, b) for a, b in path if wanted[b]]
    assert np.array_equal(less.teacher.targets, found.teacher.targets[wanted])
    assert np.array_equal(less.student.targets, found.student.targets)


def test_without_an_alignment_no_target_of_the_teacher_can_be_dropped() -> None:
    found = replace(pair(Sample(prompt="Q: ", response="yes")), alignment=None)
    assert found.teacher is not None
    with pytest.raises(
        KdflowError, match=r"aligned, and this pair is not: let the algorithm's needs name 'teacher' an"
    ):
        found.with_teacher_targets(np.zeros(len(found.teacher.targets), bool))


def test_a_micro_batch_joins_the_alignments_of_its_samples() -> None:
    found = [pair(Sample(prompt="Q: ", response=text), "min_edit") for text in ("One two.", "你好", "three")]
    batch = collate(found, with_teacher=True)
    assert batch.alignment is not None
    assert batch.teacher is not None
    assert batch.alignment.path is not None
    for side, numbers in ((batch.student, batch.alignment.student), (batch.teacher, batch.alignment.teacher)):
        assert isinstance(side, TokenBatch)
        assert len(numbers) == len(side.targets)
    response = batch.student.response_of_target.numpy(), batch.teacher.response_of_target.numpy()
    assert all(response[0][a] == response[1][b] for a, b in batch.alignment.path)
    assert batch.alignment.spans == sum(one.alignment.spans for one in found if one.alignment)
    empty = collate([], with_teacher=True).alignment
    assert empty is not None
    assert len(empty.student) == len(empty.teacher) == empty.spans == 0


def spans(sizes: list[tuple[int, int]]) -> Alignment:
    """The alignment whose spans have these numbers of tokens."""
    ends = [[0, *itertools.accumulate(side)] for side in zip(*sizes, strict=True)]
    return Alignment(tuple(zip(*([slice(*span) for span in itertools.pairwise(side)] for side in ends), strict=True)))


def test_the_students_tokens_are_counted_by_the_span_they_are_in() -> None:
    alignment = TargetAlignment(*numbered(spans([(1, 1), (3, 1), (1, 2), (2, 2), (4, 0), (0, 5), (1, 1)]).stops))
    assert alignment.shares() == {"one_to_one": 2, "spanning": 3 + 1 + 2, "unmatched": 4}
    assert [side.tolist() for side in alignment.one_to_one()] == [[0, 11], [0, 11]]
    assert TargetAlignment(*numbered(Alignment(()).stops)).shares() == {"one_to_one": 0, "spanning": 0, "unmatched": 0}


@quick
@given(sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any)))
def test_every_token_of_the_student_is_counted_once(sizes: list[tuple[int, int]]) -> None:
    counts = TargetAlignment(*numbered(spans(sizes).stops)).shares()
    assert sum(counts.values()) == sum(ours for ours, _ in sizes)
    assert counts["unmatched"] == sum(ours for ours, theirs in sizes if not theirs)


def test_a_target_whose_partner_was_dropped_is_not_aligned_one_to_one() -> None:
    alignment = TargetAlignment(np.array([0, 1, 1, -1, 2]), np.array([0, 1, 2, 2, -1]))
    assert alignment.shares() == {"one_to_one": 1, "spanning": 3, "unmatched": 1}
    assert [side.tolist() for side in alignment.one_to_one()] == [[0], [0]]


def test_tool_calls_that_each_template_writes_its_own_way_are_refused() -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    turns = (Message("user", "a"), Message("assistant", "b", True, {"tool_calls": call}))
    template = TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] }}{{ message['tool_calls'] }}")
    student = SideTokenizer(make_tokenizer(template=template), "student")
    with pytest.raises(KdflowError, match=r"a\.jsonl:1: .*different texts from byte"):
        tokenizer(student=student)(Sample(turns), "a.jsonl:1")
