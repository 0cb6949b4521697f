"""Responses that the student wrote itself, made into what it is trained on (Agarwal et al. 2023, GKD, 2306.13649)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, takewhile

import numpy as np

from kdflow.contracts import Pair, Rollout, Tokens
from kdflow.data.alignment import of_targets
from kdflow.data.rendering import Segment
from kdflow.data.tokenization import PairTokenizer


class RolloutTokenizer:
    """Puts a response of the student's in the place of a sample's last one.

    The student is trained on the very ids that were sampled, never on their text tokenized again. A teacher of the same
    vocabulary reads the same ids. Another one reads their bytes, cut at the last whole character and before the first
    special token, and also where its tokenizer does not give the same bytes back, as one that normalizes. An id that is
    no token, which can be drawn where a vocabulary has gaps, spells nothing, and cuts as a special token does.

    What ends a response goes by its sample: in a conversation what ends a turn, in plain text the end of the sequence.

    Args:
        tokenize: makes the pairs of the data.
        stop: texts that end a response.
    """

    def __init__(self, tokenize: PairTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenize, self._student, self._teacher = tokenize, tokenize.student, tokenize.teacher
        self._stop = [text.encode() for text in stop]

    def stop_ids(self, pair: Pair) -> tuple[int, ...]:
        """The student's ids that end a response to such a sample."""
        ends = (self._student.eos, self._student.end(pair.chat))
        return tuple({end: None for end in ends if end is not None})

    def prompt(self, pair: Pair) -> list[int]:
        """The student's ids up to the last response of a sample."""
        return _before(pair.student, _last_response(pair))

    def text(self, ids: Sequence[int]) -> str:
        """What ids say, special tokens left out."""
        return str(self._student.tokenizer.decode(ids, skip_special_tokens=True))

    def stopped(self, rollout: Rollout) -> Rollout:
        """The response up to the token with which one of the texts that end it is whole."""
        if not self._stop:
            return rollout
        spelled, ends = b"", []
        for token in self._spelled(rollout.ids):
            spelled += token
            ends.append(len(spelled))
        found = [at + len(text) for text in self._stop if (at := spelled.find(text)) >= 0]
        if not found:
            return rollout
        kept = next(number for number, end in enumerate(ends, start=1) if end >= min(found))
        return Rollout(rollout.ids[:kept], rollout.log_probabilities[:kept], "stop")

    def __call__(self, pair: Pair, rollout: Rollout) -> Pair:
        """The sample with this response, cut to the data's largest length, the only one that is learnt.

        The sample as it is, if nothing of the response is left, as where the prompt alone is that long.
        """
        last, ids = _last_response(pair), list(rollout.ids)
        student = self._student.tokens([Segment(_before(pair.student, last), False), Segment(ids, True)])
        tokens, alignment = [student], None
        if pair.teacher is not None and self._teacher is not None:
            context = Segment(_before(pair.teacher, last), False)
            if self._tokenize.aligner is not None:
                ours, theirs = self._segments(pair, rollout)
                teacher = self._teacher.tokens([context, theirs])
                alignment = of_targets(self._tokenize.aligner.align([ours], [theirs]), student, teacher)
                tokens.append(teacher)
            elif self._tokenize.same_targets:
                theirs = Segment(self._known(pair, ids), True)
                tokens.append(self._teacher.tokens([context, theirs]))
                if len(theirs.ids) < len(ids):
                    tokens, _ = self._tokenize.cut(tokens, None)
        if any(len(side) > self._tokenize.max_length for side in tokens):
            tokens, alignment = self._tokenize.cut(tokens, alignment)
        if not all(map(len, tokens)) or not len(tokens[0].targets):
            return pair
        sampled = np.array(rollout.log_probabilities[: len(tokens[0].targets)])
        return Pair(pair.id, tokens[0], tokens[1] if tokens[1:] else None, alignment, sampled, pair.chat)

    def _known(self, pair: Pair, ids: list[int]) -> list[int]:
        """The ids as far as the teacher has them; what ends the response, if it lacks that, is what ends its own."""
        assert self._teacher is not None
        size = self._teacher.bytes_of.vocabulary_size
        known, end = list(takewhile(lambda index: index < size, ids)), self._teacher.end(pair.chat)
        if len(known) == len(ids) - 1 and ids[-1] in self.stop_ids(pair) and end is not None:
            known.append(end)
        return known

    def _spelled(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes that each of the student's ids stands for."""
        tokenizer = self._student.bytes_of
        found = iter(tokenizer.token_bytes(index for index in ids if index in tokenizer.vocabulary))
        return [next(found) if index in tokenizer.vocabulary else b"" for index in ids]

    def _segments(self, pair: Pair, rollout: Rollout) -> tuple[Segment, Segment]:
        """The response in the student's tokens, and as much of it as reaches the teacher in the teacher's."""
        assert self._teacher is not None
        ids, end = list(rollout.ids), self._teacher.end(pair.chat)
        last = ids[-1] if ids and rollout.finish == "stop" else None
        ended = last is not None and (last in self.stop_ids(pair) or last in self._student.special)
        known, special = self._student.bytes_of.vocabulary, self._student.special
        cuts = (at for at, index in enumerate(ids) if index in special or index not in known)
        count = whole = next(cuts, len(ids) - ended)
        spelled = b"".join(self._student.bytes_of.token_bytes(ids[:count]))
        while True:
            count, text = _whole_characters(self._student.bytes_of.token_bytes(ids[:count]), len(spelled))
            theirs = self._teacher.encode(text) if text else []
            read = b"".join(self._teacher.bytes_of.token_bytes(theirs))
            if read == text.encode():
                break
            spelled = _common_start(text.encode(), read)
        content = len(theirs)
        if ended and count == whole == len(ids) - 1 and end is not None:
            theirs = [*theirs, end]
        return Segment(ids, True, text, count), Segment(theirs, True, text, content)


def _last_response(pair: Pair) -> int:
    """The number of the last response that both sides hold."""
    return min(int(side.response[-1]) for side in (pair.student, pair.teacher) if side is not None)


def _before(tokens: Tokens, response: int) -> list[int]:
    """The ids before a response."""
    first = int(np.searchsorted(tokens.response, response))
    return list(map(int, tokens.ids[: tokens.targets[first] + 1]))


def _whole_characters(tokens: Sequence[bytes], limit: int) -> tuple[int, str]:
    """How many tokens within the first ``limit`` bytes spell whole characters of UTF-8, and these."""
    spelled = b"".join(tokens)[:limit]
    try:
        text = spelled.decode()
    except UnicodeDecodeError as error:
        text = spelled[: error.start].decode()
    ends = [0, *accumulate(map(len, tokens))]
    borders = {0, *accumulate(len(character.encode()) for character in text)}
    count = max(number for number, end in enumerate(ends) if end in borders)
    return count, spelled[: ends[count]].decode()


def _common_start(one: bytes, other: bytes) -> bytes:
    """What both begin with, shorter than ``one``."""
    size = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[: min(size, len(one) - 1)]
