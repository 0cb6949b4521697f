"""The stream of samples, and the optimizer steps that are cut from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdflow.contracts import KdflowError, Pair, Sample, Tokens
from kdflow.data.sources import Sources
from kdflow.data.steps import Step, Steps, Stream
from kdflow.data.tokenization import Prepared
from tests.support.draw import quick

SIZES, SEEDS = st.integers(1, 40), st.integers(0, 2**31)


def drawn(stream: Stream, count: int) -> list[int]:
    return [next(stream) for _ in range(count)]


# --- the stream -------------------------------------------------------------------------------------------------------


@quick
@given(size=SIZES, seed=SEEDS)
def test_each_epoch_is_a_permutation_and_the_same_for_a_seed(size: int, seed: int) -> None:
    order = drawn(Stream(size, seed), 3 * size)
    assert order == drawn(Stream(size, seed), 3 * size)
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_seeds_and_epochs_shuffle_otherwise() -> None:
    orders = [drawn(Stream(40, seed), 120) for seed in range(3)]
    epochs = {tuple(order[start : start + 40]) for order in orders for start in (0, 40, 80)}
    assert len(epochs) == 9


def test_the_order_of_a_seed_never_changes() -> None:
    """A checkpoint holds where the stream stands, not its order."""
    assert drawn(Stream(8, 0), 16) == [2, 4, 3, 6, 5, 0, 1, 7, 1, 3, 7, 6, 0, 4, 2, 5]


@quick
@given(size=SIZES, seed=SEEDS, before=st.integers(0, 100))
def test_a_restored_stream_goes_on_identically(size: int, seed: int, before: int) -> None:
    stream = Stream(size, seed)
    drawn(stream, before)
    other = Stream(size, seed)
    other.restore(stream.state())
    assert other.state() == stream.state()
    assert drawn(other, 2 * size + 1) == drawn(stream, 2 * size + 1)


def test_a_stream_of_fewer_samples_than_when_it_was_saved_begins_the_next_epoch() -> None:
    stream = Stream(3, 0)
    stream.restore({"epoch": 1, "index": 7})
    assert sorted(drawn(stream, 3)) == [0, 1, 2]
    assert stream.epoch == 2


# --- steps ------------------------------------------------------------------------------------------------------------


class Lengths(Sources):
    """Samples that are nothing but their length; 0 is one that is dropped, a negative one is truncated."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[str, Sample]:
        return f"data.jsonl:{index}", Sample(response=str(self.lengths[index]))


def tokenize(sample: Sample, name: str) -> Prepared:
    length = int(sample.response)
    if length == 0:
        return Prepared(None, "too long")
    ids = np.arange(abs(length))
    tokens = Tokens(ids, ids[:-1], np.zeros(abs(length) - 1, np.int64))
    return Prepared(Pair(name, tokens, None), truncated=length < 0)


def make(lengths: Sequence[int], tokens_per_step: int, seed: int = 0) -> Steps:
    return Steps(Lengths(lengths), tokenize, lambda pair: pair, tokens_per_step, seed)


def names(step: Step) -> list[str]:
    return [pair.id for pair in step.pairs]


LENGTHS = st.lists(st.integers(-9, 9), min_size=1, max_size=20).filter(any)


@quick
@given(lengths=LENGTHS, budget=st.integers(1, 60), seed=SEEDS)
def test_a_step_is_the_shortest_run_of_the_stream_that_reaches_the_tokens(
    lengths: list[int], budget: int, seed: int
) -> None:
    steps, stream = make(lengths, budget, seed), Stream(len(lengths), seed)
    for _ in range(4):
        step = steps.draw()
        expected, tokens = [], 0
        while tokens < budget:
            index = next(stream)
            if lengths[index]:
                expected.append(f"data.jsonl:{index}")
                tokens += abs(lengths[index])
        assert names(step) == expected
        assert step.tokens == tokens
        assert step.target_tokens == sum(abs(lengths[int(name.split(":")[1])]) - 1 for name in expected)


@quick
@given(lengths=LENGTHS, budget=st.integers(1, 60), seed=SEEDS)
def test_every_sample_drawn_is_trained_on_or_dropped_with_a_reason(lengths: list[int], budget: int, seed: int) -> None:
    steps = make(lengths, budget, seed)
    trained = [name for _ in range(4) for name in names(steps.draw())]
    accounting = steps.accounting
    assert accounting["drawn"] == steps.stream.epoch * len(lengths) + steps.stream.index
    assert accounting["drawn"] == accounting["trained"] + accounting["dropped: too long"]
    assert accounting["trained"] == len(trained)
    assert accounting["truncated"] == sum(lengths[int(name.split(":")[1])] < 0 for name in trained)


@quick
@given(lengths=LENGTHS, budget=st.integers(1, 60), seed=SEEDS, before=st.integers(0, 5))
def test_restored_steps_go_on_identically(lengths: list[int], budget: int, seed: int, before: int) -> None:
    steps, other = make(lengths, budget, seed), make(lengths, budget, seed)
    for _ in range(before):
        steps.draw()
    other.restore(steps.state())
    for _ in range(3):
        assert names(other.draw()) == names(steps.draw())
    assert other.accounting == steps.accounting
    assert other.state() == steps.state()


def test_states_are_copies() -> None:
    steps = make([3, 4], 5)
    state = steps.state()
    steps.draw()
    assert state == {"stream": {"epoch": 0, "index": 0}, "accounting": {"drawn": 0, "trained": 0, "truncated": 0}}


@quick
@given(size=st.integers(1, 12), usable=st.integers(0, 11), seed=SEEDS)
def test_a_single_usable_sample_is_found_wherever_it_stands_in_each_epoch(size: int, usable: int, seed: int) -> None:
    usable %= size
    steps = make([5 if index == usable else 0 for index in range(size)], 5, seed)
    assert [names(steps.draw()) for _ in range(6)] == [[f"data.jsonl:{usable}"]] * 6


@pytest.mark.parametrize("size", [1, 7])
def test_samples_that_are_all_dropped_are_an_error_and_not_an_endless_search(size: int) -> None:
    with pytest.raises(
        KdflowError, match=rf"no trainable tokens: all {size} samples .* dropped \(too long\); raise data"
    ):
        make([0] * size, 5).draw()


def test_an_algorithm_prepares_each_pair() -> None:
    def halve(pair: Pair) -> Pair:
        tokens = pair.student
        kept = tokens.targets[::2]
        return Pair(pair.id, Tokens(tokens.ids, kept, tokens.response[::2]))

    step = Steps(Lengths([6, 6]), tokenize, halve, 12, 0).draw()
    assert step.tokens == 12  # prompts and what is not learnt included
    assert step.target_tokens == 6


@quick
@given(st.lists(st.text("ab:1\n", max_size=4), max_size=4), st.lists(st.text("ab:1\n", max_size=4), max_size=4))
def test_digests_tell_samples_and_their_order(one: list[str], other: list[str]) -> None:
    empty = Tokens(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    digests = [Step(tuple(Pair(name, empty) for name in ids)).digest for ids in (one, other)]
    assert (digests[0] == digests[1]) == ("\n".join(one) == "\n".join(other))


def test_digests_of_two_seeds_differ_and_of_one_seed_are_the_same() -> None:
    lengths = list(range(1, 20))
    digests = Counter(make(lengths, 30, seed).draw().digest for seed in (0, 1, 2, 2))
    assert sorted(digests.values()) == [1, 1, 2]
