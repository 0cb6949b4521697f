"""Samples as text → pairs of token sequences: both sides rendered, aligned, cut to length and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdflow.contracts import Aligner, KdflowError, Pair, Sample, TargetAlignment, Tokens
from kdflow.data.alignment import ResponseAligner, cut, of_targets, replace_text
from kdflow.data.rendering import Segment, SideTokenizer


@dataclass(frozen=True)
class Prepared:
    """A pair, or why there is none: it was ``dropped`` for its length, or has a ``problem``, a whole sentence.

    ``truncated`` pairs were cut.
    """

    id: str
    pair: Pair | None = None
    dropped: str | None = None
    problem: str | None = None
    truncated: bool = False


class PairTokenizer:
    """Makes pairs of token sequences out of samples.

    Args:
        student: renders for the student.
        teacher: renders for the teacher, if there is one.
        max_length: tokens of the longest sample, on either side.
        too_long: ``truncate`` or ``drop``.
        same_targets: whether both sides learn the same tokens, since they share a vocabulary.
        aligner: for algorithms that need an alignment.
    """

    def __init__(self, student: SideTokenizer, teacher: SideTokenizer | None, *, max_length: int, too_long: str,
                 same_targets: bool, aligner: Aligner | None = None) -> None:  # fmt: skip
        self.student, self.teacher = student, teacher
        self.max_length, self.too_long, self.same_targets = max_length, too_long, same_targets
        self.aligner: ResponseAligner | None = None
        if aligner is not None and teacher is not None:
            self.aligner = ResponseAligner(aligner, student.bytes_of, teacher.bytes_of)

    @property
    def key(self) -> str:
        """A hash of all that the tokens depend on."""
        sides = [side.key for side in (self.student, self.teacher) if side is not None]
        aligner = "" if self.aligner is None else self.aligner.key
        return " ".join([*sides, str(self.max_length), self.too_long, str(self.same_targets), aligner])

    def __call__(self, sample: Sample, sample_id: str) -> Prepared:
        """Render, align, cut to ``max_length`` and compare the sides.

        Raises:
            KdflowError: the sample cannot be used; names it.
        """
        sides = [side for side in (self.student, self.teacher) if side is not None]
        alignment = None
        try:
            if self.aligner is not None:  # what one side's tokenizer changes in a text, both learn
                sample = self.aligner.same_text(sample)
            segments = self._render(sample)
            if self.aligner is not None:
                if _differ_at_their_ends(*segments):
                    segments = self._render(replace_text(sample, str.strip))
                alignment = self.aligner.align(*segments)
            tokens = [side.tokens(one) for side, one in zip(sides, segments, strict=True)]
        except ValueError as error:
            raise KdflowError(f"{sample_id}: {error}") from None
        if not all(len(side.targets) for side in tokens):
            raise KdflowError(
                f"{sample_id}: no trainable tokens: a single token has none before it that could predict it"
            )
        if alignment is not None:
            alignment = of_targets(alignment, *tokens)
        elif self.same_targets and len(tokens) == 2:
            self._compare(tokens, sample_id)
        truncated = any(len(side) > self.max_length for side in tokens)
        if truncated:
            if self.too_long == "drop":
                return Prepared(sample_id, dropped="too long")
            tokens, alignment = self.cut(tokens, alignment)
            if not all(len(side.targets) for side in tokens):
                return Prepared(sample_id, dropped="prompt too long")
        student, teacher = tokens[0], tokens[1] if len(tokens) == 2 else None
        pair = Pair(sample_id, student, teacher, alignment, chat=bool(sample.messages))
        return Prepared(sample_id, pair, truncated=truncated)

    def _render(self, sample: Sample) -> list[list[Segment]]:
        """The segments of each side, the teacher's with the prompt that it alone sees."""
        ours = self.student.render(sample)
        return [ours] if self.teacher is None else [ours, self.teacher.render(sample.for_teacher())]

    def cut(
        self, tokens: Sequence[Tokens], alignment: TargetAlignment | None
    ) -> tuple[list[Tokens], TargetAlignment | None]:
        """Cut the sides to ``max_length``.

        At the same place of the text where it is known: at a target of both, or between two spans.
        """
        sides = [side for side in (self.student, self.teacher) if side is not None][: len(tokens)]
        fits = [int((side.targets < self.max_length - 1).sum()) for side in tokens]
        if alignment is not None:
            alignment = cut(alignment, fits)
            fits = [len(alignment.student), len(alignment.teacher)]
        elif self.same_targets:
            fits = [min(fits)] * len(fits)
        else:
            return [side.truncate(one, self.max_length) for side, one in zip(sides, tokens, strict=True)], None
        lengths = [int(one.targets[kept - 1]) + 2 if kept > 0 else 0 for one, kept in zip(tokens, fits, strict=True)]
        return [side.truncate(one, length) for side, one, length in zip(sides, tokens, lengths, strict=True)], alignment

    def _compare(self, tokens: Sequence[Tokens], sample_id: str) -> None:
        """With one vocabulary both sides learn the same tokens, but for the token that ends a turn."""
        if (at := first_difference(*tokens)) is None:
            return
        learnt = []
        for side, one in zip((self.student, self.teacher), tokens, strict=True):
            assert side is not None
            found = one.ids[one.targets[at : at + 1] + 1].tolist()  # none, where the other side alone goes on
            learnt.append(f"{side.tokenizer.decode(found)!r} (id {found[0]})" if found else "none")
        raise KdflowError(
            f"{sample_id}: student and teacher render the response into different tokens, although they share a "
            f"vocabulary: learnt token {at + 1} is {learnt[0]} to the student and {learnt[1]} to the teacher; "
            "give both the same tokenizer and chat template"
        )


def first_difference(student: Tokens, teacher: Tokens) -> int | None:
    """The first number at which the sides learn different tokens, those left out that end a turn on both."""
    count = min(len(student.targets), len(teacher.targets))
    ours, theirs = (side.ids[side.targets[:count] + 1] for side in (student, teacher))
    ends = [np.append(side.response[1:] != side.response[:-1], True)[:count] for side in (student, teacher)]
    differs = np.append((ours != theirs) & ~(ends[0] & ends[1]), len(student.targets) != len(teacher.targets))
    return int(differs.argmax()) if differs.any() else None


def _differ_at_their_ends(student: Sequence[Segment], teacher: Sequence[Segment]) -> bool:
    """Whether responses are the same but for space around them, which one of the templates takes away."""
    ours, theirs = ([segment.text for segment in side if segment.learn] for side in (student, teacher))
    return ours != theirs and [text.strip() for text in ours] == [text.strip() for text in theirs]
