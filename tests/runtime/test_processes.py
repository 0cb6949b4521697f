"""What a process sets for itself before it computes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The last product has the sizes of the first; two hundred others lie between.
PRODUCTS = """
import torch
from kdflow.runtime.processes import Processes
with Processes():
    for rows in [64, *range(65, 265), 64]:
        torch.mm(torch.ones(rows, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16))
"""


@pytest.mark.parametrize(("users", "found"), [(None, "cache_miss"), ("1024", "cache_hit")])
def test_on_a_cpu_few_products_are_remembered_unless_the_user_says_how_many(users: str | None, found: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ONEDNN_VERBOSE": "profile_create"}
    environment.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    if users is not None:
        environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = users
    done = subprocess.run([sys.executable, "-c", PRODUCTS], env=environment, capture_output=True, text=True, check=True)
    made = [line for line in done.stdout.splitlines() if ",matmul," in line and "64x64:64x64" in line]
    if not made:
        pytest.skip("torch multiplies bf16 without oneDNN on this CPU")
    assert found in made[-1]
