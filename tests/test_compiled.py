"""Functions in machine code."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numba
import pytest
from numba.core.codegen import get_host_cpu_features

from kdflow.compiled import compiled

PROGRAM = """
import numpy as np
from kdflow.compiled import compiled

@compiled()
def scale(values):
    for j in range(len(values)):
        values[j] *= np.float32(3.0)

scale(np.ones(64, np.float32))
print(*scale.inspect_asm().values())
"""


def test_where_machine_code_cannot_be_kept_it_is_made_all_the_same() -> None:
    homeless: dict[str, Any] = {}
    exec(compile("def twice(x):\n    return 2 * x", "<nowhere>", "exec"), homeless)
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(homeless["twice"], cache=True)
    twice = compiled()(homeless["twice"])
    assert twice(4) == 8
    assert twice.signatures


@pytest.mark.skipif("+avx512f" not in get_host_cpu_features(), reason="needs AVX-512")
def test_vectors_are_as_wide_as_the_cpu_has_them() -> None:
    """In a process of its own: what numba may use is settled when it first compiles."""
    told = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    assert "zmm" in told
