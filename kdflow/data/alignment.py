"""Which tokens of a response belong together, where student and teacher do not share a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kdflow.cache import code_of
from kdflow.contracts import Aligner, Alignment, KdflowError, Sample, TargetAlignment, Tokens
from kdflow.data.rendering import Segment
from kdflow.tokenizers.spelling import Spelling
from kdflow.tokenizers.tokenizer import Tokenizer


class ResponseAligner:
    """Aligns the responses of a sample by the bytes that their tokens stand for.

    Args:
        aligner: aligns the content of a response; what ends it is aligned here, the last token with the last.
        student: the student's tokenizer.
        teacher: the teacher's.
    """

    def __init__(self, aligner: Aligner, student: Tokenizer, teacher: Tokenizer) -> None:
        self.aligner, self._tokenizers = aligner, (student, teacher)

    @property
    def key(self) -> str:
        """All that an alignment depends on, besides what the tokenizers' files hold."""
        kinds = [type(self.aligner), type(self), Alignment, Spelling, Tokenizer, *map(type, self._tokenizers)]
        return " ".join([*map(code_of, kinds), repr(self.aligner.options)])

    def same_text(self, sample: Sample) -> Sample:
        """The sample with responses as both tokenizers see them: one that normalizes, to NFC say, does so for both."""

        def normalized(text: str) -> str:
            for tokenizer in self._tokenizers:
                if tokenizer.normalizes:
                    text = tokenizer.normalized(text).decode("utf-8", "replace")
            return text

        return replace_text(sample, normalized)

    def align(self, student: Sequence[Segment], teacher: Sequence[Segment]) -> TargetAlignment:
        """Align the learnt segments of a sample, response by response.

        Raises:
            KdflowError: the aligner does not do what it must.
            ValueError: the sides have different responses, or spell one differently.
        """
        sides = [[segment for segment in side if segment.learn] for side in (student, teacher)]
        stops, paths, start = [], [], np.zeros((2, 1), np.int64)
        for both in zip(*sides, strict=True):
            tokens = [
                tokenizer.spelling(segment.ids[: segment.content])
                for tokenizer, segment in zip(self._tokenizers, both, strict=True)
            ]
            found = _with_ending(_with_start(aligned(self.aligner, *tokens), *tokens), *both)
            stops.append(found.stops + start)
            if found.path is not None:
                paths.append(np.array(found.path, np.int64).reshape(-1, 2) + start.T)
            start = stops[-1][:, -1:]
        path = np.concatenate(paths) if paths else None
        return TargetAlignment(*numbered(np.concatenate(stops, axis=1)), path)


def aligned(aligner: Aligner, student: Sequence[bytes], teacher: Sequence[bytes]) -> Alignment:
    """What an aligner, which may be anybody's, makes of two tokenizations.

    Raises:
        KdflowError: it is no alignment, its spans do not partition both sides, or its path is none through them.
        ValueError: the aligner cannot align them, or fails.
    """
    try:
        found: Any = aligner.align(student, teacher)
    except (KdflowError, ValueError):
        raise
    except Exception as error:  # a plugin's, on this text: others may do
        raise ValueError(f"aligner '{aligner.name}' failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, Alignment):
        raise KdflowError(f"aligner '{aligner.name}' gave {found!r:.80}, not an Alignment")
    ends = [len(student), len(teacher)]
    if not _partition(found, ends):
        raise KdflowError(
            f"aligner '{aligner.name}' gave spans that do not partition the {ends[0]} tokens of the student and the "
            f"{ends[1]} of the teacher: on both sides each must start where the one before it stops, the first at 0, "
            "and the last stop behind the last token"
        )
    if found.path is not None and not _is_path(found.path, ends):
        raise KdflowError(
            f"aligner '{aligner.name}' gave a path that is none through the {ends[0]} tokens of the student and the "
            f"{ends[1]} of the teacher: it must be pairs of whole numbers (student token, teacher token), counted from "
            "0, of which neither ever falls"
        )
    return found


def replace_text(sample: Sample, change: Callable[[str], str]) -> Sample:
    """The sample with its responses changed."""
    messages = tuple(replace(turn, content=change(turn.content)) if turn.learn else turn for turn in sample.messages)
    return replace(sample, messages=messages, response=change(sample.response))


def of_targets(alignment: TargetAlignment, student: Tokens, teacher: Tokens) -> TargetAlignment:
    """The alignment of learnt tokens cut to those that are targets: nothing predicts the first token of all."""
    first = [int(len(alignment.student) > len(student.targets)), int(len(alignment.teacher) > len(teacher.targets))]
    numbers = [alignment.student, alignment.teacher]
    incomplete = {int(side[0]) for side, missing in zip(numbers, first, strict=True) if missing}
    ours, theirs = (
        np.where(np.isin(side, list(incomplete)), -1, side)[missing:]
        for side, missing in zip(numbers, first, strict=True)
    )
    path = None if alignment.path is None else alignment.path - first
    return TargetAlignment(ours, theirs, None if path is None else path[(path >= 0).all(1)])


def cut(alignment: TargetAlignment, kept: Sequence[int]) -> TargetAlignment:
    """The alignment of the first targets: as many of each side as fit, ``kept``, without spans that were cut apart."""
    sides = (alignment.student, alignment.teacher)
    lost = [side[count:] for side, count in zip(sides, kept, strict=True)]
    first_lost = min((int(side[side >= 0].min()) for side in lost if (side >= 0).any()), default=None)
    counts = list(kept)
    if first_lost is not None:
        ends = [np.flatnonzero(side >= first_lost) for side in sides]
        counts = [min(count, int(end[0])) if len(end) else count for count, end in zip(kept, ends, strict=True)]
    path = alignment.path
    if path is not None:
        path = path[(path < counts).all(1)]
    return TargetAlignment(alignment.student[: counts[0]], alignment.teacher[: counts[1]], path)


def joined(alignments: Sequence[TargetAlignment]) -> TargetAlignment:
    """The alignment of the samples of a micro-batch, one after the other; where there are none, the path is empty."""
    numbers: list[list[np.ndarray]] = [[], []]
    # An aligner that does not warp gives no path. A rank without samples cannot know of that: no pairs suit both.
    paths, spans, starts = [] if alignments else [np.zeros((0, 2), np.int64)], 0, np.zeros(2, np.int64)
    for alignment in alignments:
        for side, of_side in zip(numbers, (alignment.student, alignment.teacher), strict=True):
            side.append(np.where(of_side >= 0, of_side + spans, -1))
        if alignment.path is not None:
            paths.append(alignment.path + starts)
        spans += alignment.spans
        starts += [len(alignment.student), len(alignment.teacher)]
    empty = np.zeros(0, np.int64)
    ours, theirs = (np.concatenate([empty, *side]) for side in numbers)
    return TargetAlignment(ours, theirs, np.concatenate(paths) if paths else None)


def numbered(stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each token's span, by the stops of an alignment; -1 of spans that one side lacks."""
    lengths = stops.copy()
    lengths[:, 1:] -= stops[:, :-1]  # several times as fast as np.diff with what it is to put before
    ours, theirs = lengths
    matched = (ours > 0) & (theirs > 0)
    numbers = np.where(matched, matched.cumsum() - 1, -1)
    return numbers.repeat(ours), numbers.repeat(theirs)


def _partition(alignment: Alignment, ends: list[int]) -> bool:
    """Whether each span starts where the one before it stops, on both sides, and the last stops at these ends."""
    stops = alignment.stops
    if not stops.shape[1]:
        return not any(ends)
    if stops[:, -1].tolist() != ends or stops[0, 0] < 0 or stops[1, 0] < 0:
        return False
    if np.count_nonzero(stops[:, 1:] < stops[:, :-1]):  # a fraction of what any() takes
        return False
    spans = vars(alignment).get("spans")  # as they were given: of an alignment made from stops they need no look
    if spans is None:
        return True
    return [[ours.start or 0, theirs.start or 0] for ours, theirs in spans] == [[0, 0], *stops[:, :-1].T.tolist()]


def _is_path(path: Any, ends: list[int]) -> bool:
    """Whether these are pairs of tokens of both sides, and neither side goes back."""
    if not len(path):
        return True
    try:
        pairs = np.array(path)
    except ValueError:  # of several lengths
        return False
    if pairs.dtype.kind != "i" or pairs.shape[1:] != (2,):
        return False
    return bool((pairs[0] >= 0).all() and (pairs[-1] < ends).all() and (pairs[1:] >= pairs[:-1]).all())


def _with_start(alignment: Alignment, student: Spelling, teacher: Spelling) -> Alignment:
    """Tokens that spell nothing before a text, as the space that sentencepiece puts there, go with the first span."""
    stops = alignment.stops
    if stops.shape[1] < 2 or stops[:, 0].all() or student.bounds[stops[0, 0]] or teacher.bounds[stops[1, 0]]:
        return alignment
    return Alignment(stops=stops[:, 1:], path=alignment.path)


def _with_ending(alignment: Alignment, student: Segment, teacher: Segment) -> Alignment:
    """What ends a response on either side: the last token goes with the last, whatever both are called."""
    ends = np.array([[len(student.ids)], [len(teacher.ids)]])
    if len(student.ids) == student.content or len(teacher.ids) == teacher.content:  # a side whose response has no end
        return Alignment(stops=np.concatenate([alignment.stops, ends], axis=1), path=alignment.path)
    path = None if alignment.path is None else (*alignment.path, (len(student.ids) - 1, len(teacher.ids) - 1))
    return Alignment(stops=np.concatenate([alignment.stops, ends - 1, ends], axis=1), path=path)
