"""What the benchmarks of whole steps share: text for models of random_models.py, and runs.

Every word of the text is one token, so that lengths are exact. A run is ``kdflow train`` in a process of its own, whose
metrics are read afterwards.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from own_process import synchronize
from random_models import words
from torch.profiler import profile

from kdflow.runtime.events import Events

WARM = 4  # steps before the figures


def ragged(most: int = 4096) -> Iterator[int]:
    """Log-normal lengths, without end: of at most 4,096 tokens, 700 on average; of other bounds, as many times less."""
    draw, scale = random.Random(0), most / 4096
    return (max(most // 256, min(most, round(scale * draw.lognormvariate(6.15, 0.9)))) for _ in itertools.count())


def write_text(path: Path, lengths: Iterator[int], tokens: int, vocab_size: int, learnt: float = 0.5) -> str:
    """Samples of these lengths until they come to so many tokens; the share ``learnt`` of each is the response."""
    draw, vocabulary, lines = random.Random(0), words(vocab_size), []
    while tokens > 0:
        length = next(lengths)
        tokens -= length
        response = min(length - 1, max(1, round(length * learnt)))  # the end is its last token
        counts = (length - response, response - 1)
        texts = (" " + " ".join(draw.choices(vocabulary, k=count)) for count in counts)
        lines.append(json.dumps(dict(zip(("prompt", "response"), texts, strict=True))) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def run_file(
    output: Path, student: Path, teacher: Path, text: str, *, length: int, micro_batch: int, step: int, steps: int,
    **training: Any,
) -> dict[str, Any]:  # fmt: skip
    """Forward KL, in tokens: of the longest sample, of a micro-batch and of a step."""
    return {
        "student": {"model": str(student)},
        "teacher": {"model": str(teacher)},
        "algorithm": {"name": "forward_kl"},
        "data": {
            "train": [{"path": text, "format": "prompt_response"}], "max_length": length, "max_tokens": micro_batch,
        },
        "training": {
            "steps": steps, "tokens_per_step": step, "learning_rate": 1e-5, "checkpoint_every": None,
            "evaluate_every": None, **training,
        },
        "output": str(output),
    }  # fmt: skip


@contextmanager
def tracing(tracer: profile, before: int, last: int) -> Iterator[list[dict[str, Any]]]:
    """Trace the steps after ``before`` up to ``last`` of what trains in this process, and give what they tell."""
    emit, told = Events.emit, list[dict[str, Any]]()

    def watch(self: Events, event: str, **fields: Any) -> None:
        emit(self, event, **fields)
        if event != "step":
            return
        if fields["step"] > before:
            told.append(fields)
        if fields["step"] in (before, last):
            synchronize()
            (tracer.start if fields["step"] == before else tracer.stop)()

    with mock.patch.object(Events, "emit", watch):
        yield told


def device_work(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernels and copies of a trace, by their start."""
    work = (event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))
    return sorted(work, key=lambda event: float(event["ts"]))


def to_host(work: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The copies to the host among them."""
    return [event for event in work if event["cat"] == "gpu_memcpy" and "DtoH" in event["name"]]


def span_and_gaps(work: Sequence[dict[str, Any]]) -> tuple[float, list[float]]:
    """Microseconds from the first piece of work to the end of the last, and those between them without any."""
    gaps: list[float] = []
    first = end = float(work[0]["ts"]) if work else 0.0
    for event in work:
        start = float(event["ts"])
        if start > end:
            gaps.append(start - end)
        end = max(end, start + float(event["dur"]))
    return end - first, gaps


def train(
    run: dict[str, Any], overrides: Sequence[str] = (), program: Sequence[str] = ("-m", "kdflow")
) -> dict[str, Any]:
    """Train in a process of its own through the command line, and read what it left behind.

    Args:
        run: the run file's content.
        overrides: of it.
        program: Python's arguments; kdflow's command line, or another program that runs it.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    output = Path(run["output"])
    file = output.with_suffix(".yaml")
    shutil.rmtree(output, ignore_errors=True)
    file.write_text(yaml.safe_dump(run), encoding="utf-8")
    command = [sys.executable, *program, "train", str(file), *overrides]
    started = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"kdflow train: exit code {done.returncode}: …{done.stdout[-4000:]}")
    until_ready = (output / "environment.json").stat().st_mtime - started  # written just before
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    shutil.rmtree(output)
    every = [event for event in events if event["event"] == "step"]
    (ready,) = (event for event in events if event["event"] == "ready")
    start = {"imports": until_ready - ready["seconds"], **ready["parts"]}
    start["rest"] = ready["seconds"] - sum(ready["parts"].values())
    start["first step"] = every[0]["seconds"]
    teacher: dict[str, Any] = next((event for event in events if event["event"] == "teacher"), {})
    steady = every[WARM:] or every[-1:]
    return {
        "tokens_per_second": statistics.median(event["tokens"] / event["seconds"] for event in steady),
        "peak_bytes": every[-1]["memory_bytes"],
        "tokens_per_step": statistics.median(event["tokens"] for event in steady),
        "target_tokens_per_step": statistics.median(event["target_tokens"] for event in steady),
        "phases": {name: statistics.median(event["phases"][name] for event in steady) for name in every[0]["phases"]},
        "flops_utilisation": statistics.median(event.get("flops_utilisation", math.nan) for event in steady),
        "seconds_to_the_first_step": {**start, "all": sum(start.values())},
        "seconds": [event["seconds"] for event in every],
        "losses": [event["loss"] for event in every],
        "gradient_norms": [event["grad_norm"] for event in every],
        "rows": {key: teacher.get(key) for key in ("transport", "copies_per_row", "bytes_per_row")},
    }
