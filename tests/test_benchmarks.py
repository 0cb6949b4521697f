"""The benchmarks: they import, and what they start does not outlive its time."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_beside_them(code: str) -> None:
    """In a process of its own, to which the benchmarks are modules, as they are to each other."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stderr


def test_every_benchmark_can_be_imported() -> None:
    names = ", ".join(sorted(file.stem for file in BENCHMARKS.glob("*.py")))
    run_beside_them(f"import {names}")


def test_every_contender_of_the_head_runs() -> None:
    run_beside_them("""
import argparse, head
small = argparse.Namespace(rows=256, vocab=1500, student=16, teacher=24, seed=0, repeats=1, block=None)
for contender in head.CONTENDERS:
    if contender not in head.TRL:
        for name, run in head.measure(contender, small)["runs"].items():
            assert run["loss"] > 0, (contender, name)
""")


def test_overrides_may_stand_behind_options() -> None:
    texts = [path.read_text("utf-8") for path in BENCHMARKS.glob("*.py")]
    with_overrides = [text for text in texts if '"overrides", nargs' in text]
    assert len(with_overrides) > 3
    assert all("parser.parse_intermixed_args()" in text for text in with_overrides)


def test_a_measurement_that_fails_or_takes_too_long_leaves_its_last_words(tmp_path: Path) -> None:
    run, log = load("own_process").run, tmp_path / "log"
    assert run([sys.executable, "-c", "print('all is well')"], log, limit=60) is None
    assert log.read_text() == "all is well\n"
    failed = run([sys.executable, "-c", "raise SystemExit('no GPU')"], log, limit=60)
    assert failed == "exit code 1: …no GPU\n"
    started = time.monotonic()
    hung = run(["sh", "-c", "echo begun; sleep 600 & sleep 600"], log, limit=0.5)
    assert hung == "killed after 0.5 s: …begun\n"
    assert time.monotonic() - started < 300
