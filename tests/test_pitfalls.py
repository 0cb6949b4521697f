"""The table of known failures names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = [
    tuple(cell.strip() for cell in line.strip("|\n").rsplit("|", 1))
    for line in (TESTS / "pitfalls.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "::" in line
]


def test_there_is_a_table() -> None:
    assert len(ROWS) > 20


@pytest.mark.parametrize(("pitfall", "tests"), ROWS, ids=[row[0][:40] for row in ROWS])
def test_each_pitfall_has_tests(pitfall: str, tests: str) -> None:
    for test in tests.split():
        file, _, name = test.partition("::")
        source = (TESTS / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{pitfall}: {test} does not exist"
