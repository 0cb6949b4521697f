"""The finest spans that spell the same bytes on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kdflow.contracts import Aligner, Alignment
from kdflow.hookspecs import hookimpl
from kdflow.tokenizers.spans import spans_to


class ByteSpan(Aligner):
    """Cuts both sides wherever both have a token's end at the same byte; linear in the number of tokens.

    Every byte belongs to exactly one span, both slices of a span spell the same bytes, swapping the sides mirrors the
    result, and equal tokens are paired one-to-one. A token without bytes goes with the one before it.
    """

    name = "byte_span"

    def align(self, student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> Alignment:
        """Align two spellings of one text.

        Raises:
            ValueError: the sides spell different texts.
        """
        ours, theirs = b"".join(student_tokens), b"".join(teacher_tokens)
        if ours != theirs:
            raise ValueError(_difference(ours, theirs))
        if student_tokens == teacher_tokens:
            stops = range(1, len(student_tokens) + 1)
            return Alignment(spans_to(stops, stops))
        ends = [_ends(side) for side in (student_tokens, teacher_tokens)]
        cut = np.zeros((2, len(ours) + 1), bool)
        cut[0, ends[0]] = cut[1, ends[1]] = True
        cut[:, 0] = True
        shared = np.flatnonzero(cut[0] & cut[1])
        ours_to, theirs_to = (np.searchsorted(side, shared, side="right").tolist() for side in ends)
        # The first span ends at byte 0: it holds tokens without bytes at the start, most often none.
        first = int(not ours_to[0] and not theirs_to[0])
        return Alignment(spans_to(ours_to[first:], theirs_to[first:]))


def _ends(tokens: Sequence[bytes]) -> Any:
    """The byte at which each token ends."""
    return np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)))


def _difference(ours: bytes, theirs: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return (
        f"the tokens spell different texts from byte {at} on: {ours[at : at + 20]!r} to the student, "
        f"{theirs[at : at + 20]!r} to the teacher"
    )


@hookimpl
def kdflow_aligners() -> Iterable[type[Aligner]]:
    """The aligner of this module."""
    return [ByteSpan]
