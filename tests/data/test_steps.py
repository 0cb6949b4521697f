"""The stream of samples, and the optimizer steps that are cut from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdflow.contracts import KdflowError, Pair, Tokens
from kdflow.data.order import Shuffled
from kdflow.data.steps import Step, Steps, count_steps, nothing_to_learn
from kdflow.data.tokenization import Prepared
from tests.support.draw import quick

SIZES, SEEDS = st.integers(1, 40), st.integers(0, 2**31)


# --- steps ------------------------------------------------------------------------------------------------------------


class Lengths:
    """Samples that are nothing but their length; 0 is one that is dropped, a negative one is truncated."""

    def __init__(self, lengths: Sequence[int], weight: float = 1.0) -> None:
        self.lengths, self.weight = lengths, weight

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Prepared:
        length, name = self.lengths[index], f"data.jsonl:{index}"
        if length == 0:
            return Prepared(name, dropped="too long")
        ids = np.arange(abs(length))
        tokens = Tokens(ids, ids[:-1], np.zeros(abs(length) - 1, np.int64))
        return Prepared(name, Pair(name, tokens, None), truncated=length < 0)


def make(lengths: Sequence[int], tokens_per_step: int, seed: int = 0, samples: int | None = None) -> Steps:
    return Steps(Shuffled([Lengths(lengths)], seed), tokens_per_step, samples)


def names(step: Step) -> list[str]:
    return [pair.id for pair in step.pairs]


LENGTHS = st.lists(st.integers(-9, 9), min_size=1, max_size=20).filter(any)


@quick
@given(lengths=LENGTHS, budget=st.integers(1, 60), seed=SEEDS)
def test_a_step_is_the_shortest_run_of_the_stream_that_reaches_the_tokens(
    lengths: list[int], budget: int, seed: int
) -> None:
    steps, order = make(lengths, budget, seed), Shuffled([Lengths(lengths)], seed)
    for _ in range(4):
        step = steps.draw()
        expected, tokens = [], 0
        while tokens < budget:
            prepared = next(order)
            if prepared.pair is not None:
                expected.append(prepared.id)
                tokens += len(prepared.pair.student)
        assert names(step) == expected
        assert step.tokens == tokens
        assert step.target_tokens == sum(abs(lengths[int(name.split(":")[1])]) - 1 for name in expected)


@quick
@given(lengths=LENGTHS, budget=st.integers(1, 60), seed=SEEDS)
def test_every_sample_drawn_is_trained_on_or_dropped_with_a_reason(lengths: list[int], budget: int, seed: int) -> None:
    steps = make(lengths, budget, seed)
    trained = [name for _ in range(4) for name in names(steps.draw())]
    accounting = steps.accounting
    state = steps.state()["stream"]
    assert accounting["drawn"] == state["epoch"] * len(lengths) + state["index"]
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
    assert state == {
        "stream": {"epoch": 0, "index": 0},
        "accounting": {"drawn": 0, "trained": 0, "truncated": 0},
        "skipped": {},
    }


@quick
@given(size=st.integers(1, 12), usable=st.integers(0, 11), seed=SEEDS)
def test_a_single_usable_sample_is_found_wherever_it_stands_in_each_epoch(size: int, usable: int, seed: int) -> None:
    usable %= size
    steps = make([5 if index == usable else 0 for index in range(size)], 5, seed)
    assert [names(steps.draw()) for _ in range(6)] == [[f"data.jsonl:{usable}"]] * 6


@pytest.mark.parametrize("size", [1, 7])
def test_samples_that_are_all_dropped_are_an_error_and_not_an_endless_search(size: int) -> None:
    told = rf"data\.train: none of the {size} records drawn in an epoch can be used \(data\.jsonl:\d: too long\); raise"
    with pytest.raises(KdflowError, match=rf"{told} data\.max_length"):
        make([0] * size, 5).draw()


@pytest.mark.parametrize("seed", range(4))
def test_records_of_the_epoch_in_which_the_last_good_one_was_drawn_are_not_counted(seed: int) -> None:
    lengths = [5, 0, 0, 0]
    steps = make(lengths, 5, seed)
    steps.draw()
    lengths[0] = 0  # the rest of this epoch holds nothing, nor does the next
    with pytest.raises(KdflowError, match=r"none of the 4 records drawn in an epoch can be used"):
        steps.draw()


@pytest.mark.parametrize("first", [
    Prepared("a:1", problem="a:1: the field 'longitude' is missing"),
    Prepared("a:1", problem="a:1: 'text' must be text, not 'too long'"),
    Prepared("a:1", problem="a:1 is too long"),
])  # fmt: skip
def test_a_problem_that_only_speaks_of_length_is_not_mended_by_a_greater_one(first: Prepared) -> None:
    assert nothing_to_learn("eval", "3 records", first) == (
        f"data.eval: none of the 3 records can be used ({first.problem})"
    )


@pytest.mark.parametrize("dropped", ["too long", "prompt too long", "of a length that no model has"])
def test_what_was_dropped_for_its_length_is_named_and_mended_by_a_greater_one(dropped: str) -> None:
    assert nothing_to_learn("train", "3 records looked at", Prepared("a:1", dropped=dropped)) == (
        f"data.train: none of the 3 records looked at can be used (a:1: {dropped}); raise data.max_length"
    )


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_a_share_of_the_samples_is_the_students_to_answer_whatever_the_steps(fraction: float) -> None:
    def chosen(tokens_per_step: int, seed: int = 3) -> list[bool]:
        steps = Steps(Shuffled([Lengths([6] * 400)], seed), tokens_per_step, 400, fraction=fraction, seed=seed)
        found: list[bool] = []
        while (step := steps.draw()).pairs:
            found += [number in step.on_policy for number in range(len(step.pairs))]
        return found

    whole = chosen(60)
    assert sum(whole) == pytest.approx(400 * fraction, abs=25 * (fraction not in (0, 1)))
    assert chosen(24) == whole
    assert (chosen(60, seed=4) == whole) == (fraction in (0, 1))


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


@quick
@given(lengths=LENGTHS, budget=st.integers(1, 60), seed=SEEDS, epochs=st.floats(0.1, 3.5))
def test_epochs_are_as_many_steps_as_are_counted(lengths: list[int], budget: int, seed: int, epochs: float) -> None:
    tokens = np.abs(lengths)
    count, samples = count_steps(Shuffled([Lengths(lengths)], seed), tokens, budget, epochs)
    assert samples == max(1, round(epochs * len(lengths)))
    steps = make(lengths, budget, seed, samples)
    drawn = [steps.draw() for _ in range(count)]
    assert all(step.pairs for step in drawn)
    assert not steps.draw().pairs
    assert steps.accounting["drawn"] == samples
    assert all(step.tokens >= budget for step in drawn[:-1])


def test_steps_that_go_on_beyond_the_last_sample_are_over() -> None:
    long, short = make([5] * 9, 10, samples=9), make([5] * 4, 10, samples=4)
    for _ in range(3):
        long.draw()
    short.restore(long.state())  # six samples, of data that has four now
    assert not short.draw().pairs


def test_a_record_that_cannot_be_used_ends_the_run_or_is_listed() -> None:
    class Broken(Lengths):
        def __getitem__(self, index: int) -> Prepared:
            return Prepared("data.jsonl:7", problem="data.jsonl:7: no JSON") if index else super().__getitem__(0)

    with pytest.raises(KdflowError, match=r"^data.jsonl:7: no JSON$"):
        Steps(Shuffled([Broken([5, 0])], 0), 20).draw()
    steps = Steps(Shuffled([Broken([5, 0])], 0), 20, stop_on_problem=False)
    assert names(steps.draw()) == ["data.jsonl:0"] * 4
    assert steps.skipped == {"data.jsonl:7": "data.jsonl:7: no JSON"}
    assert steps.accounting["drawn"] == steps.accounting["trained"] + steps.accounting["dropped: unusable"]
    assert steps.state()["skipped"] == steps.skipped
