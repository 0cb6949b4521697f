"""Minimum-edit alignment: dynamic time warping over two token sequences, as FuseLLM aligns them (arXiv 2401.10491)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from kdflow.contracts import Aligner, Alignment, Options
from kdflow.hookspecs import hookimpl

_DIAGONAL, _TEACHER, _STUDENT = 0, 1, 2


class MinEditOptions(Options):
    """Options of :class:`MinEdit`."""

    match_cost: Literal["fusellm", "fusechat"] = "fusellm"
    """Their edit distance, or a tenth of it where one token holds the other (FuseChat, arXiv 2408.07990)."""


class MinEdit(Aligner):
    """The cheapest warping path; pairing two tokens costs the edit distance of their bytes without spaces.

    The path is traced back from the end; of equally cheap ways it takes the diagonal first, then the teacher's previous
    token, then the student's. Spans are the groups of tokens that the path connects.
    """

    name = "min_edit"
    paper = "arXiv 2401.10491"
    Options: ClassVar[type[Options]] = MinEditOptions

    def align(self, student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> Alignment:
        """Align two sequences; where one is empty the other has no partner."""
        ours, theirs = len(student_tokens), len(teacher_tokens)
        if not ours or not theirs:
            return Alignment(((slice(0, ours), slice(0, theirs)),) if ours or theirs else (), ())
        costs = _costs(teacher_tokens, student_tokens, self.options.match_cost == "fusechat")
        path = _trace(_directions(costs, theirs, ours))
        return Alignment(_groups(path), tuple(path))


Costs = tuple[np.ndarray, np.ndarray, np.ndarray]


def _costs(teacher: Sequence[bytes], student: Sequence[bytes], cheap_parts: bool) -> Costs:
    """Costs of pairing distinct tokens, in whole numbers, and which of these each token is."""
    # A byte as a character: the distance is over bytes.
    sides = [[token.replace(b" ", b"").decode("latin-1") for token in side] for side in (teacher, student)]
    distinct = [list(dict.fromkeys(side)) for side in sides]
    numbers = [{text: number for number, text in enumerate(texts)} for texts in distinct]
    kinds = [np.array([known[text] for text in side]) for known, side in zip(numbers, sides, strict=True)]
    table = cdist(*distinct, scorer=Levenshtein.distance, dtype=np.int32)
    if cheap_parts:  # in tenths, so that equally cheap ways are equal
        holds = [[one in other or other in one for other in distinct[1]] for one in distinct[0]]
        table = np.where(np.array(holds), table, 10 * table)
    return table, kinds[0], kinds[1]


def _directions(costs: Costs, rows: int, columns: int) -> np.ndarray:
    """For each pair ``[teacher, student]`` where the cheapest path to it comes from; one antidiagonal at a time."""
    table, teacher, student = costs
    directions = np.zeros((rows, columns), np.int8)
    # Cheapest cost to the cells of an antidiagonal, by the teacher's index + 1; outside the table it is infinite.
    infinite = np.iinfo(np.int64).max // 2
    before, last = np.full(rows + 1, infinite), np.full(rows + 1, infinite)
    for diagonal in range(rows + columns - 1):
        first, stop = max(0, diagonal - columns + 1), min(rows, diagonal + 1)
        i = np.arange(first, stop)
        ways = np.stack([before[first:stop], last[first:stop], last[first + 1 : stop + 1]])
        chosen = ways.argmin(0)  # the first of equal ones
        least = np.take_along_axis(ways, chosen[None], 0)[0] if diagonal else np.zeros(1, np.int64)
        directions[i, diagonal - i] = chosen
        before, last = last, np.full(rows + 1, infinite)
        last[first + 1 : stop + 1] = least + table[teacher[i], student[diagonal - i]]
    return directions


def _trace(directions: np.ndarray) -> list[tuple[int, int]]:
    """The path from the first pair to the last, as ``(student, teacher)``."""
    i, j = directions.shape[0] - 1, directions.shape[1] - 1
    path = [(j, i)]
    while i or j:
        way = directions[i, j]
        i, j = i - (way != _STUDENT), j - (way != _TEACHER)
        path.append((int(j), int(i)))
    return path[::-1]


def _groups(path: Sequence[tuple[int, int]]) -> tuple[tuple[slice, slice], ...]:
    """Runs of the path in which each pair shares a token with the one before it."""
    spans = []
    (first_student, first_teacher), (student, teacher) = path[0], path[0]
    for next_student, next_teacher in path[1:]:
        if next_student != student and next_teacher != teacher:
            spans.append((slice(first_student, student + 1), slice(first_teacher, teacher + 1)))
            first_student, first_teacher = next_student, next_teacher
        student, teacher = next_student, next_teacher
    return (*spans, (slice(first_student, student + 1), slice(first_teacher, teacher + 1)))


@hookimpl
def kdflow_aligners() -> Iterable[type[Aligner]]:
    """The aligner of this module."""
    return [MinEdit]
