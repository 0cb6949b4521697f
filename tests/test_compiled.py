"""Functions in machine code."""

from __future__ import annotations

from typing import Any

import numba
import pytest

from kdflow.compiled import compiled


def test_where_machine_code_cannot_be_kept_it_is_made_all_the_same() -> None:
    homeless: dict[str, Any] = {}
    exec(compile("def twice(x):\n    return 2 * x", "<nowhere>", "exec"), homeless)
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(homeless["twice"], cache=True)
    twice = compiled()(homeless["twice"])
    assert twice(4) == 8
    assert twice.signatures
