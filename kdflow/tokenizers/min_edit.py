"""Minimum-edit alignment: dynamic time warping over two token sequences, as FuseLLM aligns them (arXiv 2401.10491)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from kdflow.compiled import compiled
from kdflow.contracts import Aligner, Alignment, Options
from kdflow.hookspecs import hookimpl

_HELD = 2**23  # pairs whose ways are held at once, 8 MiB: up to so many none is made twice


class MinEditOptions(Options):
    """Options of :class:`MinEdit`."""

    match_cost: Literal["fusellm", "fusechat"] = "fusellm"
    """Their edit distance, or a tenth of it where one token holds the other (FuseChat, arXiv 2408.07990)."""


class MinEdit(Aligner):
    """The cheapest warping path; pairing two tokens costs the edit distance of their bytes without spaces.

    The path is traced back from the end; of equally cheap ways it takes the diagonal first, then the teacher's previous
    token, then the student's. Spans are the groups of tokens that the path connects. Time grows with the product of
    the two numbers of tokens, memory with the student's times the root of the teacher's.
    """

    name = "min_edit"
    paper = "https://arxiv.org/abs/2401.10491"
    Options: ClassVar[type[Options]] = MinEditOptions

    def align(self, student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> Alignment:
        """Align two sequences; where one is empty the other has no partner."""
        ours, theirs = len(student_tokens), len(teacher_tokens)
        if not ours or not theirs:
            return Alignment(((slice(0, ours), slice(0, theirs)),) if ours or theirs else (), ())
        path = _path(*_costs(teacher_tokens, student_tokens, self.options.match_cost == "fusechat"))
        # A span ends where the next pair shares no token with the one before it.
        ends = np.append((np.diff(path, axis=0) > 0).all(1), True)
        return Alignment(stops=(path[ends] + 1).T, path=tuple(map(tuple, path.tolist())))


def _costs(
    teacher: Sequence[bytes], student: Sequence[bytes], cheap_parts: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def _path(table: np.ndarray, teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """The path from the first pair to the last, int64 ``[n, 2]``, each ``(student, teacher)``."""
    # The teacher's tokens in blocks, so large that what is kept of all and what is held of one take as much memory.
    size = min(max(math.isqrt(8 * len(teacher)), _HELD // len(student)), len(teacher))
    kept = np.full(((len(teacher) - 1) // size + 1, len(student) + 1), 2**62)
    # Before the first of the student's tokens there is one column more. The path comes from its first pair, at no cost.
    kept[0, 0] = 0
    ways = np.empty((size, len(student)), np.uint8)
    path = np.empty((len(teacher) + len(student) - 1, 2), np.int64)
    return path[_traced()(table, teacher, student, kept, ways, path) :]


@cache
def _traced() -> Any:
    """:func:`_trace` in machine code."""
    return compiled()(_trace)


def _trace(
    table: np.ndarray, teacher: np.ndarray, student: np.ndarray, kept: np.ndarray, ways: np.ndarray, path: np.ndarray
) -> int:
    """Write the path to the end of ``path`` and return where it begins.

    On the way forth the totals before each block of the teacher's tokens are kept; on the way back the block is made
    again from these, no further than the path can pass, with the way that leads to each of its pairs.

    Args:
        table: costs of pairing distinct tokens.
        teacher: which of these each token is.
        student: likewise.
        kept: totals before each block, of which those before the first are given; int64, infinite elsewhere.
        ways: room for the ways of one block.
        path: room for the path.
    """
    diagonal, up, left = 0, 1, 2
    blocks, size, infinite = len(kept), len(ways), kept[0, 1]
    i, j, first = len(teacher) - 1, len(student) - 1, len(path)
    for turn in range(2 * blocks - 1):
        block = turn if turn < blocks else 2 * blocks - 2 - turn
        totals = kept[block, : j + 2].copy()
        for row in range(block * size, min((block + 1) * size, len(teacher))):
            costs = table[teacher[row]][student]
            before, last = totals[0], infinite
            totals[0] = infinite
            for column in range(j + 1):
                above = totals[column + 1]
                least, way = before, diagonal
                if above < least:
                    least, way = above, up
                if last < least:
                    least, way = last, left
                last = least + costs[column]
                ways[row - block * size, column] = way
                totals[column + 1] = last
                before = above
        if turn < blocks - 1:
            kept[block + 1] = totals
            continue
        while i >= block * size:
            first -= 1
            path[first] = j, i
            way = ways[i - block * size, j]
            if way != left:
                i -= 1
            if way != up:
                j -= 1
    return first


@hookimpl
def kdflow_aligners() -> Iterable[type[Aligner]]:
    """The aligner of this module."""
    return [MinEdit]
