"""What a micro-batch of the student costs the host, while the device has next to nothing to do.

    python benchmarks/host.py [--out benchmarks/results/host.json] [KEY=VALUE]...

28 blocks, as 0.6B has, of 64 numbers a token, compiled; micro-batches of one sample of 64 tokens. Milliseconds of
``Student.backward`` in this process until all is queued, on one thread: what a GPU waits for, where its own work takes
less. Overrides such as ``training.activation_checkpointing=true``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from own_process import about, keep, show, synchronize
from random_models import SHAPES, make_model, vocabulary_size
from workload import run_file, write_text

import kdflow
from kdflow.runtime.student import Student

LENGTH, MICRO_BATCHES, STEPS = 64, 4, 24
SHAPES["narrow"] = {**SHAPES["tiny"], "num_hidden_layers": 28, "head_dim": 64}


def measure(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train, and time each micro-batch; those of the first steps, which compile, are left out."""
    make_model(folder / "student", "narrow", 0)
    make_model(folder / "teacher", "tiny", 1)
    text = write_text(
        folder / "text.jsonl", itertools.repeat(LENGTH), LENGTH * MICRO_BATCHES * STEPS, vocabulary_size("narrow")
    )
    run = run_file(
        folder / "run", folder / "student", folder / "teacher", text, length=LENGTH, micro_batch=LENGTH,
        step=LENGTH * MICRO_BATCHES, steps=STEPS, compile=True, dtype="bfloat16",
    )  # fmt: skip
    backward, seconds = Student.backward, list[float]()

    def timed(*arguments: Any, **options: Any) -> Any:
        synchronize()
        started = time.perf_counter()
        found = backward(*arguments, **options)
        seconds.append(time.perf_counter() - started)
        return found

    with mock.patch.object(Student, "backward", timed):
        kdflow.train(run, overrides)
    taken = [1000 * one for one in seconds[len(seconds) // 4 :]]
    return {"milliseconds": statistics.median(taken), "least": min(taken), "micro_batches": len(taken)}


def main() -> None:
    """Measure in a folder of its own, print and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/host.json"))
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.overrides)
    keep(arguments.out, about(overrides=arguments.overrides, **found))
    show("a micro-batch", found)


if __name__ == "__main__":
    main()
