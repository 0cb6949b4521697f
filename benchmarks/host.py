"""What a micro-batch of the student costs the host, as kdflow builds the student and in other ways, side by side.

    python benchmarks/host.py [--out benchmarks/results/host.json] [--forms apart,one]

28 blocks, as 0.6B has, of 64 numbers a token, compiled; a micro-batch is one sample of 64 tokens, so that the device
has next to nothing to do. Milliseconds of ``Student.backward`` until all is queued, on one thread: a GPU waits for it
where its own work takes less. Students take turns, micro-batch by micro-batch. ``apart``: every linear map is a product
of its own; ``pairs``: a gate and what passes it are one, too; ``one`` and ``two``: so many blocks are a unit of FSDP.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from own_process import about, in_turns, keep, show, synchronize
from random_models import SHAPES, make_model

import kdflow
from kdflow import plugins
from kdflow.config import StudentConfig, TrainingConfig
from kdflow.contracts import Batch, TokenBatch
from kdflow.models import joined
from kdflow.runtime import student as of_student
from kdflow.runtime.processes import Processes

LENGTH, WARM, ROUNDS = 64, 8, 200
SHAPES["narrow"] = {**SHAPES["tiny"], "num_hidden_layers": 28, "head_dim": 64}
# The constant of a module that is set otherwise than in kdflow.
FORMS: dict[str, tuple[Any, str, int]] = {
    "kdflow": (joined, "_FEWEST", joined._FEWEST),
    "apart": (joined, "_FEWEST", 99),
    "pairs": (joined, "_FEWEST", 2),
    "one": (of_student, "_UNIT", 1),
    "two": (of_student, "_UNIT", 2),
}


def make(form: str, folder: Path, processes: Processes) -> Callable[[], float]:
    """Build a student, compile it, and return what tells the seconds of a micro-batch."""
    plugin = plugins.load([]).algorithm("sft")
    training = TrainingConfig(compile=True, dtype="bfloat16")
    count = torch.arange(LENGTH)
    tokens = TokenBatch(count, count, torch.tensor([0, LENGTH]).int(), count[:-1], 0 * count[:-1], LENGTH, "")
    batch = Batch(tokens, None).to(processes.device)

    def measure() -> float:
        synchronize()
        started = time.perf_counter()
        student.backward(batch, lambda: None, LENGTH, last=False)
        return time.perf_counter() - started

    joined.joining.cache_clear()  # or blocks would find what was compiled for another form
    with mock.patch.object(*FORMS[form]):
        student = of_student.Student(
            StudentConfig(model=str(folder)), training, plugin(plugin.Options()), kdflow.tokenizers.load(str(folder)),
            None, None, processes,
        )  # fmt: skip
        measure()
    return measure


def main() -> None:
    """Measure in a folder of its own, print and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/host.json"))
    parser.add_argument("--forms", default="apart,one", help="beside kdflow's own")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # each form compiles the same function anew
    with tempfile.TemporaryDirectory() as name, Processes() as processes:
        folder = Path(name)
        make_model(folder, "narrow", 0)
        forms = {form: make(form, folder, processes) for form in ("kdflow", *arguments.forms.split(","))}
        taken = in_turns(forms, ROUNDS, WARM)
    found = {form: 1000 * statistics.median(seconds) for form, seconds in taken.items()}
    shares = {form: found[form] / found["kdflow"] for form in found if form != "kdflow"}
    keep(arguments.out, about(milliseconds=found, of_kdflow=shares, micro_batches=ROUNDS))
    show("milliseconds a micro-batch", found)
    show("times as long as kdflow's", shares)


if __name__ == "__main__":
    main()
