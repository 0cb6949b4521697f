"""The data pipeline alone, on a CPU: from text to aligned pairs, and from these to packed micro-batches.

``same``: SmolLM2's tokenizer on both sides. ``aligned``: SmolLM2's and Gemma 3's, responses aligned by bytes. The text
is Jane Austen's, in passages of 3,000 characters or so, each under a heading of its own, so that none is like another.

``prepare``: student tokens a second from text to what lies on disk, in worker processes, once a run's data is new.
``step``: student tokens a second of one process that draws steps from there, packs and collates them, which is what a
run does while the device works.
``stream``: the same from text, of a source that is streamed: tokenized and aligned in that process, by a thread.

    python benchmarks/data.py [--out benchmarks/results/data.json] [--passages 4000]
        [--student MODEL] [--teacher MODEL]

Models are directories or ids, of which only the tokenizers are used.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from own_process import about, keep, show

from kdflow.contracts import Algorithm
from kdflow.data.packing import collate, pack
from kdflow.data.steps import Steps, open_steps
from kdflow.runtime.prepare import make_algorithm, prepare
from kdflow.runtime.tokenizers import open_tokenizers

TEXT = Path(__file__).resolve().parents[1] / "examples" / "data" / "train.jsonl"
STEP, MICRO_BATCH = 131072, 8192
RUNS = {"same": "forward_kl", "aligned": "uld"}
Drawn = tuple[Steps, Algorithm]


def write_passages(file: Path, count: int) -> None:
    """So many passages, each with another heading."""
    texts = [json.loads(line)["text"] for line in TEXT.read_text("utf-8").splitlines()]
    lines = [json.dumps({"text": f"Passage {number}.\n\n{texts[number % len(texts)]}"}) for number in range(count)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds from text to disk, and from there to micro-batches; and from text to micro-batches."""
    prepared, steps, last = opened(name, folder, arguments, {"epochs": 1}, streaming=False)
    stepped, tokens = seconds_of(steps, last)
    _, streamed, _ = opened(name, folder, arguments, {"steps": last}, streaming=True)
    from_text, as_many = seconds_of(streamed, last)
    return {
        "tokens": tokens, "prepare_seconds": prepared, "prepare_tokens_per_second": tokens / prepared,
        "step_tokens_per_second": tokens / stepped, "stream_tokens_per_second": as_many / from_text,
    }  # fmt: skip


def opened(
    name: str, folder: Path, arguments: argparse.Namespace, training: dict[str, int], streaming: bool
) -> tuple[float, Drawn, int]:
    """Seconds to open the data, its steps with their preparation for the algorithm, and how many there are."""
    config, plugins = prepare(
        {
            "student": {"model": arguments.student},
            "teacher": {"model": arguments.student if name == "same" else arguments.teacher},
            "algorithm": {"name": RUNS[name]},
            "data": {"train": [{"path": str(folder / "passages.jsonl"), "format": "text", "streaming": streaming}],
                     "max_length": MICRO_BATCH, "max_tokens": MICRO_BATCH},
            "training": {**training, "tokens_per_step": STEP},
            "output": str(folder / "run"),
        },
        (), (),
    )  # fmt: skip
    algorithm = make_algorithm(config, plugins)
    tokenize, _ = open_tokenizers(config, plugins, algorithm)
    started = time.perf_counter()
    steps, last = open_steps(config, plugins, tokenize)
    return time.perf_counter() - started, (steps, algorithm), last


def seconds_of(drawn_from: Drawn, count: int) -> tuple[float, int]:
    """Of so many steps, drawn, packed and collated, and their tokens."""
    (steps, algorithm), tokens = drawn_from, 0
    began = time.perf_counter()
    for _ in range(count):
        drawn = steps.draw()
        for pairs in pack([algorithm.prepare(pair) for pair in drawn.pairs], MICRO_BATCH):
            collate(pairs, True)
        tokens += drawn.tokens
    return time.perf_counter() - began, tokens


def main() -> None:
    """Both, each with an empty cache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data.json"))
    parser.add_argument("--passages", type=int, default=4000)
    parser.add_argument("--student", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--teacher", default="google/gemma-3-270m")
    arguments = parser.parse_args()
    from kdflow.models.fetch import resolve

    arguments.student, arguments.teacher = resolve(arguments.student), resolve(arguments.teacher)
    cores = len(os.sched_getaffinity(0))
    results = about(cores=cores, passages=arguments.passages)
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["KDFLOW_CACHE"] = folder
            write_passages(Path(folder, "passages.jsonl"), arguments.passages)
            results[name] = measure(name, Path(folder), arguments)
        keep(arguments.out, results)
        show(name, results[name])


if __name__ == "__main__":
    main()
