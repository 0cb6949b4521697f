"""Which blocks the kernel gets, and that a machine stays with them; they are measured in tests/gpu."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from kdflow.ops import tuning
from kdflow.ops.tuning import CANDIDATES, Blocks, choose, keep, read

FIRST, SECOND, *_ = CANDIDATES


def taken(**faster: float) -> dict[Blocks, float]:
    """Milliseconds: 10 but for the ``first`` and the ``second`` blocks that are given."""
    return {
        **dict.fromkeys(CANDIDATES, 10.0),
        **{{"first": FIRST, "second": SECOND}[name]: ms for name, ms in faster.items()},
    }


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({}, FIRST),
        ({"first": 9.0}, FIRST),
        ({"second": 9.85}, FIRST),
        ({"second": 9.7}, SECOND),
        ({"first": 20}, CANDIDATES[1]),
    ],
)
def test_others_than_the_first_are_chosen_where_they_are_plainly_faster(times: dict[str, float], best: Blocks) -> None:
    assert choose(taken(**times)) == best


def test_little_work_is_not_measured() -> None:
    def run(blocks: Blocks) -> None:
        raise AssertionError("it was run")

    assert tuning.fastest({}, 2**20, run) == FIRST


def test_what_was_kept_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    assert read(path) is None
    assert keep(path, "{}", taken(second=5.0)) == SECOND
    assert keep(path, "{}", taken()) == SECOND, "another process was first"
    assert read(path) == SECOND
    told = json.loads(path.read_text("utf-8"))
    assert told["ms"]["512,16"] == 5.0
    assert [file.name for file in tmp_path.iterdir()] == ["key.json"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read it, too"


def test_a_gpu_that_cannot_run_some() -> None:
    assert choose({}) == FIRST
    assert choose({SECOND: 3.0}) == SECOND


def _keeps(path: Path, second: bool) -> Blocks:
    return keep(path, "{}", taken(**({"second": 5.0} if second else {})))


def test_processes_that_measure_at_once_agree(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.starmap(_keeps, [(tmp_path / "key.json", number % 2 == 0) for number in range(40)])
    assert len(set(found)) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"blocks": [256]}', '{"blocks": 3}', '{"blocks": [7, 3]}'])
def test_what_is_broken_is_made_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key.json"
    path.write_text(text, encoding="utf-8")
    assert read(path) is None
    assert keep(path, "{}", taken(second=5.0)) == SECOND
