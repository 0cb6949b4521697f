"""The finest spans that spell the same bytes on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from kdflow.contracts import Aligner, Alignment
from kdflow.hookspecs import hookimpl
from kdflow.tokenizers.spelling import Spelling


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
        ours, theirs = Spelling.of(student_tokens), Spelling.of(teacher_tokens)
        if ours.text != theirs.text:
            raise ValueError(_difference(ours.text, theirs.text))
        if np.array_equal(ours.bounds, theirs.bounds):
            return Alignment(stops=np.stack([np.arange(1, len(ours) + 1)] * 2))
        # For each byte, how many of the teacher's tokens lie before it; -1 inside of one.
        before = np.full(len(ours.text) + 1, -1)
        before[theirs.bounds] = np.arange(len(theirs) + 1)
        theirs_to = before.take(ours.bounds)
        theirs_to[:-1][ours.bounds[1:] == ours.bounds[:-1]] = -1  # of tokens without bytes the last one's bound counts
        ours_to = np.flatnonzero(theirs_to >= 0)
        stops = np.array([ours_to, theirs_to.take(ours_to)])
        # The first span ends at byte 0: it holds tokens without bytes at the start, most often none.
        return Alignment(stops=stops if stops[:, 0].any() else stops[:, 1:])


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
