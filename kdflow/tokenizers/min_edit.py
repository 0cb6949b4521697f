"""Minimum-edit alignment: dynamic time warping over two token sequences, as FuseLLM aligns them (arXiv 2401.10491)."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from kdflow.contracts import Aligner, Alignment, Options
from kdflow.hookspecs import hookimpl

_HELD = 2**21  # totals, 8 MiB: within it none is made twice
_Antidiagonal = tuple[int, np.ndarray]  # the teacher's index at its first pair, and totals between two infinite ones


class MinEditOptions(Options):
    """Options of :class:`MinEdit`."""

    match_cost: Literal["fusellm", "fusechat"] = "fusellm"
    """Their edit distance, or a tenth of it where one token holds the other (FuseChat, arXiv 2408.07990)."""


class MinEdit(Aligner):
    """The cheapest warping path; pairing two tokens costs the edit distance of their bytes without spaces.

    The path is traced back from the end; of equally cheap ways it takes the diagonal first, then the teacher's previous
    token, then the student's. Spans are the groups of tokens that the path connects. Time grows with the product of
    the two numbers of tokens, memory with the smaller one times the root of both.
    """

    name = "min_edit"
    paper = "arXiv 2401.10491"
    Options: ClassVar[type[Options]] = MinEditOptions

    def align(self, student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> Alignment:
        """Align two sequences; where one is empty the other has no partner."""
        ours, theirs = len(student_tokens), len(teacher_tokens)
        if not ours or not theirs:
            return Alignment(((slice(0, ours), slice(0, theirs)),) if ours or theirs else (), ())
        path = _path(*_costs(teacher_tokens, student_tokens, self.options.match_cost == "fusechat"))
        return Alignment(_groups(path), tuple(path))


def _costs(
    teacher: Sequence[bytes], student: Sequence[bytes], cheap_parts: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs of pairing distinct tokens, in whole numbers, and which of these each token is."""
    # A byte as a character: the distance is over bytes.
    sides = [[token.replace(b" ", b"").decode("latin-1") for token in side] for side in (teacher, student)]
    distinct = [list(dict.fromkeys(side)) for side in sides]
    numbers = [{text: number for number, text in enumerate(texts)} for texts in distinct]
    kinds = [np.array([known[text] for text in side]) for known, side in zip(numbers, sides, strict=True)]
    # No path costs as much as every token's length ten times over; half of the largest number is left for infinity.
    most = 10 * (len(teacher) + len(student)) * max(map(len, itertools.chain(*distinct)))
    whole = np.int32 if most < np.iinfo(np.int32).max // 2 else np.int64
    table = cdist(*distinct, scorer=Levenshtein.distance, dtype=whole)
    if cheap_parts:  # in tenths, so that equally cheap ways are equal
        holds = [[one in other or other in one for other in distinct[1]] for one in distinct[0]]
        table = np.where(np.array(holds), table, 10 * table)
    return table, kinds[0], kinds[1]


def _path(table: np.ndarray, teacher: np.ndarray, student: np.ndarray) -> list[tuple[int, int]]:
    """The path from the first pair to the last, as ``(student, teacher)``.

    Totals are made by antidiagonals, in blocks. On the way forth the last two of each block are kept; on the way back a
    block is made again from those before it, and no more of it than the path can pass.
    """
    sides = len(teacher), len(student)
    size = max(math.isqrt(sum(sides)), _HELD // min(sides))
    starts = range(0, sum(sides) - 1, size)
    i, j = len(teacher) - 1, len(student) - 1
    infinite = np.iinfo(table.dtype).max // 2
    # The path comes from a pair before the first one, at no cost.
    kept = [[(-1, np.array([infinite, 0, infinite], table.dtype)), (0, np.array([infinite, infinite], table.dtype))]]
    for start in starts:
        block = itertools.islice(_totals(table, teacher, student, start, kept[-1], (i, j)), size)
        held = [*kept[-1], *(block if start == starts[-1] else deque(block, maxlen=2))]
        kept.append(held[-2:])
    path = [(j, i)]
    for start in reversed(starts):
        kept.pop()
        if start != starts[-1]:
            held = [*kept[-1], *_totals(table, teacher, student, start, kept[-1], (i, j))]
        while (i or j) and i + j >= start:
            (before_first, before), (last_first, last) = held[i + j - start], held[i + j - start + 1]
            diagonal, up, left = before.item(i - before_first), last.item(i - last_first), last.item(i - last_first + 1)
            least = min(diagonal, up, left)
            i, j = (i - 1, j - 1) if diagonal == least else (i - 1, j) if up == least else (i, j - 1)
            path.append((j, i))
    return path[::-1]


def _totals(
    table: np.ndarray, teacher: np.ndarray, student: np.ndarray, start: int,
    kept: Sequence[_Antidiagonal], end: tuple[int, int],
) -> Iterator[_Antidiagonal]:  # fmt: skip
    """The cost of the cheapest path to each pair from which one can go on to ``end``, from antidiagonal ``start`` on.

    Args:
        table: costs of pairing distinct tokens.
        teacher: which of these each token is.
        student: likewise.
        start: number of the first antidiagonal, the sum of the indices of each of its pairs.
        kept: the two antidiagonals before it.
        end: index of the teacher's token, and of the student's.
    """
    i, j = end
    rows, columns = teacher * table.shape[1], student[j::-1]
    (before_first, before), (last_first, last) = kept
    infinite = np.iinfo(table.dtype).max // 2
    for number in range(start, i + j + 1):
        first, stop = max(0, number - j), min(i, number) + 1
        now = np.empty(stop - first + 2, table.dtype)
        now[0] = now[-1] = infinite
        totals = now[1:-1]
        np.minimum(
            before[first - before_first : stop - before_first], last[first - last_first : stop - last_first], out=totals
        )
        np.minimum(totals, last[first - last_first + 1 : stop - last_first + 1], out=totals)
        totals += table.take(rows[first:stop] + columns[j - number + first : j - number + stop])
        yield first, now
        before_first, before, last_first, last = last_first, last, first, now


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
