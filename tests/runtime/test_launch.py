"""Ranks on one machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from kdflow.runtime.launch import launch
launch(1, [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"])
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() == 1, reason="needs a core to leave alone")
def test_ranks_have_no_more_threads_than_one_process_would_have() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
