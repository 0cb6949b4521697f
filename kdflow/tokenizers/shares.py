"""How much of a response an alignment pairs."""

from __future__ import annotations

from typing import Literal, NamedTuple

from kdflow.contracts import Alignment

Kind = Literal["one_to_one", "spanning", "unmatched"]


class Shares(NamedTuple):
    """The student's tokens by what an alignment makes of them; they sum to all of them.

    Attributes:
        one_to_one: tokens paired with one of the teacher's, and it with them alone.
        spanning: tokens in spans of several tokens, on either side.
        unmatched: tokens in spans that hold none of the teacher's.
    """

    one_to_one: int
    spanning: int
    unmatched: int


def kind(student: slice, teacher: slice) -> Kind:
    """What a span is; without a token on either side, unmatched."""
    ours, theirs = student.stop - student.start, teacher.stop - teacher.start
    if not ours or not theirs:
        return "unmatched"
    return "one_to_one" if ours == theirs == 1 else "spanning"


def shares(alignment: Alignment) -> Shares:
    """Count the student's tokens of an alignment."""
    counts: dict[Kind, int] = {"one_to_one": 0, "spanning": 0, "unmatched": 0}
    for student, teacher in alignment.spans:
        counts[kind(student, teacher)] += student.stop - student.start
    return Shares(**counts)
