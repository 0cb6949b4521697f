"""What large libraries make is left out by the garbage collector, once."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, sys
from kdflow.imports import large_imports
assert gc.get_freeze_count() == 0
try:
    with large_imports():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
        {then}
except ImportError:
    print("told")
frozen = gc.get_freeze_count()
assert frozen > 1000 and gc.isenabled()
with large_imports():
    assert gc.isenabled(), "what a program has made since is its own"
    made += [[] for _ in range(1000)]
assert gc.get_freeze_count() == frozen
"""


def printed(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_the_first_imports_are_left_out_and_nothing_later() -> None:
    assert printed(PROGRAM.format(then="pass")) == ""


def test_an_import_that_fails_is_told_and_the_collector_runs_again() -> None:
    assert printed(PROGRAM.format(then="import no_such_library")) == "told\n"


def test_the_command_line_imports_so() -> None:
    program = """
import gc, sys
from kdflow.cli import main
try:
    main(["train", "missing.yaml"])
except SystemExit:
    pass
assert "torch" in sys.modules and gc.get_freeze_count() > 100_000 and gc.isenabled()
"""
    printed(program)


def test_other_programs_are_left_alone() -> None:
    printed("import gc, kdflow; kdflow.train; assert gc.get_freeze_count() == 0 and gc.isenabled()")
