"""Packing of samples into micro-batches under a token budget, and their division among ranks."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence

import numpy as np
import torch

from kdflow.contracts import Batch, Pair, TokenBatch, Tokens
from kdflow.data.alignment import joined

# Keeps a rank in step that has no micro-batch left: one token, nothing to learn.
_FILLER = Tokens(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))


def pack(pairs: Sequence[Pair], max_tokens: int, ranks: int = 1) -> list[list[Pair]]:
    """Micro-batches of at most ``max_tokens`` tokens on the longer side, evenly filled, and as many for every rank.

    No more than first fit makes, but for what comes out even among the ranks: a step that is a little over a multiple
    of the budget would else end in a tiny one, which takes a device far longer than its tokens are worth. The result
    depends on the samples, the budget and the number of ranks alone.
    """
    sizes = [_size(pair) for pair in pairs]
    longest_first = sorted(range(len(pairs)), key=lambda i: (-sizes[i], i))
    room, places = list[int](), list[int]()
    for index in longest_first:
        place = next((at for at, free in enumerate(room) if free >= sizes[index]), len(room))
        if place == len(room):
            room.append(max_tokens)
        room[place] -= sizes[index]
        places.append(place)
    count = -(-len(room) // ranks) * ranks
    even = _evenly([sizes[index] for index in longest_first], count, max_tokens)
    bins: list[list[Pair]] = [[] for _ in range(count)]
    for index, place in zip(longest_first, even or places, strict=True):
        bins[place].append(pairs[index])
    return [packed for packed in bins if packed]


def _evenly(sizes: Sequence[int], count: int, most: int) -> list[int] | None:
    """In which of ``count`` bins each size goes, always the emptiest; None where one would hold more than ``most``."""
    filled, places = [(0, at) for at in range(count)], list[int]()
    for size in sizes:
        before, at = filled[0]
        if before + size > most:
            return None
        heapq.heapreplace(filled, (before + size, at))
        places.append(at)
    return places


def share(bins: Sequence[Sequence[Pair]], rank: int, ranks: int) -> list[Sequence[Pair]]:
    """The micro-batches of one rank: as many as any other's, the missing ones empty."""
    ordered = sorted(bins, key=lambda pairs: -sum(_size(pair) for pair in pairs))
    count = -(-len(ordered) // ranks)
    mine: list[Sequence[Pair]] = list(ordered[rank::ranks])
    return mine + [()] * (count - len(mine))


def collate(pairs: Sequence[Pair], with_teacher: bool) -> Batch:
    """One packed micro-batch; an empty one is a filler that carries a graph."""
    sides = [[pair.student for pair in pairs]]
    if with_teacher:
        sides.append([pair.teacher for pair in pairs if pair.teacher is not None])
    # A response has one number on both sides, though one side may have been cut before another of its responses.
    responses = np.cumsum([0, *(max(_responses(tokens) for tokens in both) for both in zip(*sides, strict=True))])
    student, *teacher = (_pack_side(side or [_FILLER], responses) for side in sides)
    alignments = [pair.alignment for pair in pairs if pair.alignment is not None]
    sampled = [np.full(len(pair.student.targets), np.nan) if pair.sampled is None else pair.sampled for pair in pairs]
    return Batch(
        student, teacher[0] if teacher else None, tuple(pair.id for pair in pairs),
        joined(alignments) if with_teacher and len(alignments) == len(pairs) else None,
        np.concatenate([np.zeros(0), *sampled]),
    )  # fmt: skip


def _size(pair: Pair) -> int:
    return max(len(pair.student), 0 if pair.teacher is None else len(pair.teacher))


def _responses(tokens: Tokens) -> int:
    return int(tokens.response[-1]) + 1 if len(tokens.response) else 0


def _pack_side(sequences: Sequence[Tokens], responses: np.ndarray) -> TokenBatch:
    lengths = [len(tokens) for tokens in sequences]
    starts = np.cumsum([0, *lengths])
    ids = np.concatenate([tokens.ids for tokens in sequences])
    digest = hashlib.sha256(ids.tobytes() + starts.tobytes()).hexdigest()
    targets = [tokens.targets + start for tokens, start in zip(sequences, starts, strict=False)]
    response = [tokens.response + first for tokens, first in zip(sequences, responses, strict=False)]
    return TokenBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        targets=torch.from_numpy(np.concatenate(targets)),
        response_of_target=torch.from_numpy(np.concatenate(response)),
        longest=max(lengths),
        digest=digest,
    )
