"""The order of samples: seeded, weighted, resumed anywhere, from tables and from streams."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdflow.contracts import KdflowError
from kdflow.data import order
from kdflow.data.order import Order, Shuffled, Streamed
from kdflow.data.samples import SampleStream
from kdflow.data.tokenization import Prepared
from tests.support.draw import quick

SIZES, SEEDS = st.integers(1, 40), st.integers(0, 2**31)


class Numbers:
    """Samples that are nothing but their names."""

    def __init__(self, size: int, weight: float = 1.0, name: str = "a") -> None:
        self.size, self.weight, self.name = size, weight, name

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Prepared:
        assert 0 <= index < self.size
        return Prepared(f"{self.name}{index}")


def stream(size: int, weight: float = 1.0, name: str = "a") -> SampleStream:
    def read(first: int) -> Iterator[Prepared]:
        return (Prepared(f"{name}{number}") for number in range(first, size))

    return SampleStream(name, read, weight)


def drawn(order: Order, count: int) -> list[str]:
    return [next(order).id for _ in range(count)]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW", 7)


# --- tables -----------------------------------------------------------------------------------------------------------


@quick
@given(size=SIZES, seed=SEEDS)
def test_each_epoch_is_a_permutation_and_the_same_for_a_seed(size: int, seed: int) -> None:
    names = drawn(Shuffled([Numbers(size)], seed), 3 * size)
    assert names == drawn(Shuffled([Numbers(size)], seed), 3 * size)
    for epoch in range(3):
        assert sorted(names[epoch * size : (epoch + 1) * size]) == sorted(f"a{number}" for number in range(size))


def test_seeds_and_epochs_shuffle_otherwise() -> None:
    orders = [drawn(Shuffled([Numbers(40)], seed), 120) for seed in range(3)]
    epochs = {tuple(order[start : start + 40]) for order in orders for start in (0, 40, 80)}
    assert len(epochs) == 9


def test_the_order_of_a_seed_never_changes() -> None:
    """A checkpoint holds where the order stands, not the order."""
    expected = [2, 4, 3, 6, 5, 0, 1, 7, 1, 3, 7, 6, 0, 4, 2, 5]
    assert drawn(Shuffled([Numbers(8)], 0), 16) == [f"a{number}" for number in expected]


@quick
@given(size=SIZES, seed=SEEDS, before=st.integers(0, 100))
def test_a_restored_order_goes_on_identically(size: int, seed: int, before: int) -> None:
    one, other = (Shuffled([Numbers(size), Numbers(3, 0.5, "b")], seed) for _ in range(2))
    drawn(one, before)
    other.restore(one.state())
    assert other.state() == one.state()
    assert drawn(other, 2 * size + 1) == drawn(one, 2 * size + 1)


def test_an_order_of_fewer_samples_than_when_it_was_saved_begins_the_next_epoch() -> None:
    shuffled = Shuffled([Numbers(3)], 0)
    shuffled.restore({"epoch": 1, "index": 7})
    assert sorted(drawn(shuffled, 3)) == ["a0", "a1", "a2"]
    assert shuffled.epoch == 2


def test_a_weight_says_how_often_an_epoch_holds_a_sample() -> None:
    shuffled = Shuffled([Numbers(10, 2.0, "a"), Numbers(8, 0.25, "b"), Numbers(4, 1.5, "c")], 0)
    assert len(shuffled) == 20 + 2 + 6
    epochs = [Counter(drawn(shuffled, len(shuffled))) for _ in range(8)]
    for epoch in epochs:
        assert all(epoch[f"a{number}"] == 2 for number in range(10))
        assert sorted(epoch[f"c{number}"] for number in range(4)) == [1, 1, 2, 2]
    # Of a quarter, another one is drawn each epoch.
    assert len({name for epoch in epochs for name in epoch if name[0] == "b"}) > 4


# --- streams ----------------------------------------------------------------------------------------------------------


def test_the_next_window_is_read_beside_the_work() -> None:
    """Else a run would stand still while it is tokenized."""
    read = threading.Semaphore(0)

    def counted(first: int) -> Iterator[Prepared]:
        for number in range(first, 20):
            read.release()
            yield Prepared(f"a{number}")

    streamed = Streamed([SampleStream("a", counted)], 0)
    drawn(streamed, 2)
    assert sum(read.acquire(blocking=False) for _ in range(20)) == 7, "not before it is of use"
    drawn(streamed, 1)
    assert all(read.acquire(timeout=60) for _ in range(7))
    assert not read.acquire(timeout=0.1), "one ahead, no more"
    assert sorted(drawn(streamed, 17)[4:], key=lambda name: int(name[1:])) == [f"a{number}" for number in range(7, 20)]


@quick
@given(size=SIZES, seed=SEEDS)
def test_a_stream_gives_each_sample_once_an_epoch(size: int, seed: int) -> None:
    streamed = Streamed([stream(size)], seed)
    for epoch in range(3):
        assert sorted(drawn(streamed, size)) == sorted(f"a{number}" for number in range(size))
        assert streamed.epoch == epoch


def test_a_stream_is_shuffled_inside_its_windows() -> None:
    names = drawn(Streamed([stream(28)], 0), 28)
    assert names != [f"a{number}" for number in range(28)]
    for start in range(0, 28, 7):
        assert sorted(names[start : start + 7]) == sorted(f"a{number}" for number in range(start, start + 7))


@quick
@given(size=SIZES, seed=SEEDS, before=st.integers(0, 100))
def test_a_restored_stream_goes_on_identically(size: int, seed: int, before: int) -> None:
    one, other = (Streamed([stream(size), stream(5, 2.0, "b")], seed) for _ in range(2))
    drawn(one, before)
    other.restore(one.state())
    assert other.state() == one.state()
    assert drawn(other, 2 * size + 1) == drawn(one, 2 * size + 1)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 0.1)])
def test_streams_alternate_in_proportion_to_their_weights(weights: tuple[float, float]) -> None:
    streamed = Streamed([stream(50, weights[0], "a"), stream(50, weights[1], "b")], 0)
    names = drawn(streamed, 440)
    for end in range(1, 440):
        taken = sum(name[0] == "a" for name in itertools.islice(names, end))
        assert taken == pytest.approx(end * weights[0] / sum(weights), abs=1.0)


def test_a_position_in_other_data_is_refused() -> None:
    stored, one, two = Shuffled([Numbers(3)], 0), Streamed([stream(3)], 0), Streamed([stream(3), stream(3)], 0)
    for other, state, told in (
        (stored, one.state(), "was streamed, and is not: give streaming: true back"),
        (one, stored.state(), "was not streamed, and is: take streaming: true out"),
        (one, two.state(), "had 2 streams, and has 1: give them back"),
        (two, one.state(), "had 1 streams, and has 2: give them back"),
    ):
        with pytest.raises(KdflowError, match=f"^data.train {told}"):
            other.restore(state)


def test_a_stream_that_is_shorter_than_when_it_was_saved_begins_the_next_epoch() -> None:
    before, after = Streamed([stream(7)], 0), Streamed([stream(3)], 0)
    drawn(before, 5)
    after.restore(before.state())
    assert sorted(drawn(after, 3)) == ["a0", "a1", "a2"]
    assert after.epoch == 1


def test_an_empty_stream_is_named() -> None:
    with pytest.raises(KdflowError, match=r"^a: the data file is empty$"):
        next(Streamed([stream(0)], 0))


def test_only_what_is_drawn_is_read() -> None:
    read: list[int] = []

    def count(first: int) -> Iterator[Prepared]:
        for number in range(first, 10**9):
            read.append(number)
            yield Prepared(f"a{number}")

    streamed: Any = Streamed([SampleStream("a", count)], 0)
    drawn(streamed, 9)  # two of the second window, from whose middle on the third would be read
    assert len(read) == 14


def test_a_stream_that_is_closed_is_not_read_to_the_end_of_its_window() -> None:
    begun, go_on, read = threading.Event(), threading.Event(), list[int]()

    def slow(first: int) -> Iterator[Prepared]:
        for number in range(first, 10**9):
            if number == 8:
                begun.set()
                assert go_on.wait(60)
            read.append(number)
            yield Prepared(f"a{number}")

    streamed = Streamed([SampleStream("a", slow)], 0)
    drawn(streamed, 4)
    assert begun.wait(60)
    threading.Timer(0.1, go_on.set).start()
    streamed.close()
    assert read == list(range(9))


STUCK = """
import threading
from kdflow.data import order
from kdflow.data.samples import SampleStream
from kdflow.data.tokenization import Prepared

def stuck(first):
    for number in range(first, 10**9):
        if number == 8:
            print("stuck", flush=True)
            threading.Event().wait()
        yield Prepared(str(number))

order.WINDOW = 7
streamed = order.Streamed([SampleStream("a", stuck)], 0)
for _ in range(4):
    next(streamed)
raise SystemExit(3)
"""


def test_a_stream_that_never_answers_keeps_no_process_alive() -> None:
    ended = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (3, "stuck\n")
