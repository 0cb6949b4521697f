"""Packing under a token budget, the division among ranks, and what a packed batch holds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdflow.contracts import Pair, TokenBatch, Tokens
from kdflow.data.packing import collate, pack, share
from tests.support.draw import quick


@st.composite
def sequences(draw: st.DrawFn, longest: int = 12) -> Tokens:
    """Any ids, with targets grouped into responses."""
    ids = np.array(draw(st.lists(st.integers(0, 99), min_size=1, max_size=longest)), np.int64)
    targets = np.array([at for at in range(len(ids) - 1) if draw(st.booleans())], np.int64)
    jumps = [draw(st.booleans()) for _ in targets]
    return Tokens(ids, targets, np.cumsum(jumps).astype(np.int64) if len(targets) else targets)


@st.composite
def pair_lists(draw: st.DrawFn, teacher: bool | None = None, smallest: int = 0) -> list[Pair]:
    with_teacher = draw(st.booleans()) if teacher is None else teacher
    count = draw(st.integers(smallest, 12))
    return [Pair(str(at), draw(sequences()), draw(sequences()) if with_teacher else None) for at in range(count)]


def names(bins: object) -> list[list[str]]:
    return [[pair.id for pair in pairs] for pairs in bins]  # type: ignore[attr-defined]


# --- packing and sharing ----------------------------------------------------------------------------------------------


@quick
@given(pairs=pair_lists(), budget=st.integers(12, 40))
def test_every_pair_is_packed_once_and_no_side_is_over_the_budget(pairs: list[Pair], budget: int) -> None:
    bins = pack(pairs, budget)
    assert Counter(name for packed in names(bins) for name in packed) == Counter(pair.id for pair in pairs)
    for packed in bins:
        assert packed
        assert sum(len(pair.student) for pair in packed) <= budget
        assert sum(len(pair.teacher) for pair in packed if pair.teacher is not None) <= budget
    assert names(pack(pairs, budget)) == names(bins)


@quick
@given(pairs=pair_lists(smallest=1), budget=st.integers(12, 40))
def test_micro_batches_are_filled(pairs: list[Pair], budget: int) -> None:
    """No two micro-batches would fit into one."""
    sizes = [sum(max(len(p.student), len(p.teacher or ())) for p in packed) for packed in pack(pairs, budget)]
    assert len(sizes) < 2 or sum(sorted(sizes)[:2]) > budget


@quick
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40), budget=st.integers(12, 40))
def test_micro_batches_are_even_where_that_takes_no_more_of_them(lengths: list[int], budget: int) -> None:
    tokens = [Tokens(np.arange(length), np.zeros(0, np.int64), np.zeros(0, np.int64)) for length in lengths]
    sizes = [sum(len(pair.student) for pair in packed) for packed in pack([Pair("", one) for one in tokens], budget)]
    # What is put into the emptiest never makes it fuller than another by more than itself.
    even = max(sizes) - min(sizes) <= max(lengths)
    assert even or sum(sorted(sizes)[:2]) > budget


def test_a_step_a_little_over_its_budget_does_not_end_in_a_tiny_micro_batch() -> None:
    tokens = [Tokens(np.arange(2), np.zeros(0, np.int64), np.zeros(0, np.int64)) for _ in range(21)]
    bins = pack([Pair("", one) for one in tokens], 20)
    assert [len(packed) for packed in bins] == [7, 7, 7]


@pytest.mark.parametrize(("ranks", "loads"), [(2, [42, 40]), (3, [28, 28, 26]), (8, [12, 10, 10, 10, 10, 10, 10, 10])])
def test_ranks_have_as_much_to_do_as_each_other(ranks: int, loads: list[int]) -> None:
    tokens = [Tokens(np.arange(2), np.zeros(0, np.int64), np.zeros(0, np.int64)) for _ in range(41)]
    bins = pack([Pair("", one) for one in tokens], 20, ranks)
    assert [2 * sum(map(len, share(bins, rank, ranks))) for rank in range(ranks)] == loads


@quick
@given(pairs=pair_lists(), budget=st.integers(12, 40), ranks=st.integers(1, 5))
def test_ranks_have_as_many_micro_batches_each_and_all_of_them_together(
    pairs: list[Pair], budget: int, ranks: int
) -> None:
    bins = pack(pairs, budget, ranks)
    shares = [share(bins, rank, ranks) for rank in range(ranks)]
    assert {len(mine) for mine in shares} == {-(-len(bins) // ranks)}
    together = [packed for mine in shares for packed in mine]
    assert sorted(names(filter(None, together))) == sorted(names(bins))
    assert sum(not packed for packed in together) == len(together) - len(bins)
    if bins:
        assert all(mine[0] for mine in shares) == (len(bins) >= ranks)


def test_the_longest_micro_batches_run_side_by_side() -> None:
    tokens = [
        Tokens(np.arange(length), np.arange(length - 1), np.zeros(length - 1, np.int64)) for length in (3, 9, 4, 8)
    ]
    bins = [[Pair(str(len(one)), one)] for one in tokens]
    assert [names(share(bins, rank, 2)) for rank in (0, 1)] == [[["9"], ["4"]], [["8"], ["3"]]]


# --- packed batches ---------------------------------------------------------------------------------------------------


def check(batch: TokenBatch, sides: list[Tokens]) -> None:
    """Everything in ``batch`` is what its sequences say one by one."""
    lengths = [len(tokens) for tokens in sides]
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.longest == max(lengths)
    assert batch.input_ids.tolist() == [index for tokens in sides for index in tokens.ids.tolist()]
    assert batch.position_ids.tolist() == [at for length in lengths for at in range(length)]
    assert batch.labels.tolist() == [index for tokens in sides for index in tokens.ids[tokens.targets + 1].tolist()]
    predicting = [index for tokens in sides for index in tokens.ids[tokens.targets].tolist()]
    assert batch.input_ids[batch.targets].tolist() == predicting
    positions = [at for tokens in sides for at in tokens.targets.tolist()]
    assert batch.position_ids[batch.targets].tolist() == positions
    assert {x.dtype for x in (batch.input_ids, batch.position_ids, batch.targets)} == {torch.int64}


@quick
@given(pairs=pair_lists(teacher=True, smallest=1))
def test_a_packed_batch_says_what_its_sequences_say(pairs: list[Pair]) -> None:
    batch = collate(pairs, with_teacher=True)
    assert batch.teacher is not None
    check(batch.student, [pair.student for pair in pairs])
    check(batch.teacher, [pair.teacher for pair in pairs if pair.teacher is not None])
    assert batch.sample_ids == tuple(pair.id for pair in pairs)


@quick
@given(pairs=pair_lists(teacher=True, smallest=1))
def test_a_response_has_a_number_of_its_own_and_the_same_on_both_sides(pairs: list[Pair]) -> None:
    batch = collate(pairs, with_teacher=True)
    meaning: dict[int, tuple[int, int]] = {}  # number in the batch → sample, and number in the sample
    for side, sequences in ((batch.student, [p.student for p in pairs]), (batch.teacher, [p.teacher for p in pairs])):
        assert side is not None
        own = [(at, n) for at, tokens in enumerate(sequences) if tokens is not None for n in tokens.response.tolist()]
        for number, response in zip(side.response_of_target.tolist(), own, strict=True):
            assert meaning.setdefault(number, response) == response
    assert len(set(meaning.values())) == len(meaning)


def test_without_a_teacher_there_is_no_teachers_side() -> None:
    tokens = Tokens(np.arange(4), np.arange(3), np.zeros(3, np.int64))
    for pair in (Pair("a", tokens), Pair("a", tokens, tokens)):
        batch = collate([pair], with_teacher=False)
        assert batch.teacher is None
        check(batch.student, [tokens])


@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_filler_holds_a_token_and_learns_nothing(with_teacher: bool) -> None:
    batch = collate((), with_teacher)
    sides = [batch.student, batch.teacher] if with_teacher else [batch.student]
    assert (batch.teacher is not None) == with_teacher
    assert batch.sample_ids == ()
    for side in sides:
        assert side is not None
        assert (len(side.input_ids), len(side.targets), len(side.labels), side.longest) == (1, 0, 0, 1)
        assert side.cu_seqlens.tolist() == [0, 1]


@quick
@given(one=pair_lists(smallest=1), other=pair_lists(smallest=1))
def test_digests_tell_ids_and_boundaries(one: list[Pair], other: list[Pair]) -> None:
    contents = [[pair.student.ids.tolist() for pair in pairs] for pairs in (one, other)]
    digests = [collate(pairs, False).student.digest for pairs in (one, other)]
    assert (digests[0] == digests[1]) == (contents[0] == contents[1])


@quick
@given(ids=st.lists(st.integers(0, 99), min_size=2, max_size=9), data=st.data())
def test_the_same_ids_cut_otherwise_have_another_digest(ids: list[int], data: st.DataObject) -> None:
    def digest(*pieces: list[int]) -> str:
        nothing = np.zeros(0, np.int64)
        pairs = [Pair("", Tokens(np.array(piece, np.int64), nothing, nothing)) for piece in pieces]
        return collate(pairs, False).student.digest

    at = data.draw(st.integers(1, len(ids) - 1))
    changed = [*ids[:at], (ids[at] + 1) % 100, *ids[at + 1 :]]
    assert len({digest(ids), digest(ids[:at], ids[at:]), digest(changed)}) == 3
    assert digest(ids) == digest(list(ids))


def test_a_batch_moves_whole() -> None:
    tokens = Tokens(np.arange(4), np.arange(3), np.zeros(3, np.int64))
    batch = collate([Pair("a", tokens, tokens)], with_teacher=True)
    moved = batch.to(torch.device("meta"))
    for side, original in ((moved.student, batch.student), (moved.teacher, batch.teacher)):
        assert side is not None
        assert original is not None
        assert side.input_ids.is_meta
        assert side.response_of_target.is_meta
        assert (side.longest, side.digest) == (original.longest, original.digest)
    assert moved.sample_ids == ("a",)


def test_a_batch_that_was_moved_still_has_its_ids_on_the_host() -> None:
    batch = collate((), with_teacher=False).student
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == "meta"
    assert moved.on_host is batch
    assert moved.to(torch.device("meta")).on_host is batch
    assert batch.on_host is batch
    assert batch.to(torch.device("cpu")).host is None


def test_sequences_of_a_batch_are_those_with_targets() -> None:
    ids, wanted = [[5, 6, 7], [8, 9], [1, 2, 3, 4]], [[0, 1], [], [2]]
    pairs = [
        Pair("", Tokens(np.array(one), np.array(targets, np.int64), np.zeros(len(targets), np.int64)))
        for one, targets in zip(ids, wanted, strict=True)
    ]
    found = [(one.tolist(), targets.tolist()) for one, targets in collate(pairs, False).student.sequences()]
    assert found == [([5, 6, 7], [0, 1]), ([1, 2, 3, 4], [2])]
