"""Which of the student's tokens an alignment pairs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kdflow.contracts import Alignment
from kdflow.tokenizers.shares import Shares, kind, shares
from tests.support.draw import quick


def spans(sizes: list[tuple[int, int]]) -> Alignment:
    """The alignment whose spans have these numbers of tokens."""
    found, student, teacher = [], 0, 0
    for ours, theirs in sizes:
        found.append((slice(student, student + ours), slice(teacher, teacher + theirs)))
        student, teacher = student + ours, teacher + theirs
    return Alignment(tuple(found))


def test_the_students_tokens_are_counted_by_the_span_they_are_in() -> None:
    assert shares(spans([(1, 1), (3, 1), (1, 2), (2, 2), (4, 0), (0, 5), (1, 1)])) == Shares(
        one_to_one=2, spanning=3 + 1 + 2, unmatched=4
    )
    assert shares(spans([])) == Shares(0, 0, 0)


def test_a_span_without_a_token_on_either_side_is_unmatched() -> None:
    kinds = [kind(*span) for span in spans([(1, 1), (0, 1), (1, 0), (1, 2), (2, 1)]).spans]
    assert kinds == ["one_to_one", "unmatched", "unmatched", "spanning", "spanning"]


@quick
@given(sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any)))
def test_every_token_of_the_student_is_counted_once(sizes: list[tuple[int, int]]) -> None:
    assert sum(shares(spans(sizes))) == sum(ours for ours, _ in sizes)
