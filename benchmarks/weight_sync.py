"""New weights on their way from a student into a rollout engine on one GPU: seconds, and GB a second.

Qwen3's shapes with random weights; the student is kdflow's own, in fp32 under FSDP2, the engine holds bf16. For each
shape and engine, in a process of its own: the student's weights are changed; the first update, which may allocate; then
whole calls of ``engine.update_weights(student.weights())``. GB are those of the bf16 weights, each counted once.
``weights_seconds`` is going through the student's weights and casting them, and nothing else.

Responses are drawn before the first update and after the last: ``gap`` is how far the log-probabilities that the engine
tells of its tokens lie from the student's own, in nats, on average and at most. Before, it shows what stale weights
would look like.

    python benchmarks/weight_sync.py DIRECTORY [--out benchmarks/results/weight-sync.json] [--shapes 0.6B,1.7B]
        [--engines sglang,transformers] [--tiny]

On an H100 it takes about 4 minutes: 70 to 90 s for SGLang, which starts in 35 s, 30 s for transformers. DIRECTORY holds
models and logs: 5 GB. ``--tiny`` is for a CPU: 2 minutes on two busy cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from own_process import about, collect, found, synchronize
from random_models import make_model, vocabulary_size
from torch import Tensor
from torch.distributed.tensor import DTensor

from kdflow.contracts import EngineContext, Pair, RolloutEngine, Sampling, Side, Tokens
from kdflow.data.packing import collate
from kdflow.runtime.prepare import make_algorithm, prepare
from kdflow.runtime.processes import Processes
from kdflow.runtime.student import Student
from kdflow.runtime.tokenizers import open_tokenizers
from kdflow.validation import validate_options

PROMPTS, PROMPT, NEW = 16, 64, 32


@torch.no_grad()
def disturb(student: Student) -> None:
    """Move every weight by about half of what it was drawn with."""
    for _, parameter in student.trained():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.add_(torch.randn_like(local) * 0.01)


def gap(student: Student, engine: RolloutEngine, vocabulary: int, device: torch.device) -> dict[str, float]:
    """How far the engine's log-probabilities of what it draws lie from the student's."""
    prompts = np.random.default_rng(0).integers(1, vocabulary, (PROMPTS, PROMPT)).tolist()
    drawn = engine.generate(prompts, Sampling(max_new_tokens=NEW))
    pairs = []
    for prompt, one in zip(prompts, drawn, strict=True):
        targets = np.arange(len(prompt) - 1, len(prompt) + len(one.ids) - 1)
        pairs.append(Pair("", Tokens(np.array([*prompt, *one.ids]), targets, np.zeros_like(targets))))
    told = torch.tensor([value for one in drawn for value in one.log_probabilities])

    def log_probabilities(side: Side) -> tuple[Tensor, ...]:
        logits = side.head.logits(side.rows).float()
        return (logits.log_softmax(-1).gather(-1, side.tokens.labels[:, None])[:, 0],)

    (own,) = student.measure(collate(pairs, False).to(device), log_probabilities)
    difference = (own.float().cpu() - told).abs()
    return {"mean": float(difference.mean()), "largest": float(difference.max())}


def sync(arguments: argparse.Namespace, shape: str, name: str) -> dict[str, Any]:
    """Everything of one shape and engine, in this process."""
    model = str(arguments.directory / shape)
    config, plugins = prepare(
        {
            "student": {"model": model},
            "algorithm": {"name": "sft"},
            "data": {"train": [{"path": "none", "format": "text"}]},
            "output": str(arguments.directory / "run"),
        },
        (), (),
    )  # fmt: skip
    with Processes() as processes:
        algorithm = make_algorithm(config, plugins)
        tokenize, _ = open_tokenizers(config, plugins, algorithm)
        student = Student(config.student, config.training, algorithm, tokenize.student.bytes_of, None, None, processes)
        options: dict[str, Any] = {}
        if name == "sglang":
            options = {"cache_tokens": 16384, "attention_backend": arguments.attention_backend}
        cls: type[RolloutEngine] = plugins.find(name, "rollout engine").cls
        started = time.perf_counter()
        engine = cls(
            model, validate_options(cls.Options, options, name), EngineContext(processes.device, torch.bfloat16)
        )
        start = time.perf_counter() - started
        disturb(student)
        vocabulary = vocabulary_size(shape)
        stale = gap(student, engine, vocabulary, processes.device)
        seconds, alone = list[float](), list[float]()
        for _ in range(1 + arguments.rounds):
            synchronize()
            started = time.perf_counter()
            engine.update_weights(student.weights())
            synchronize()
            seconds.append(time.perf_counter() - started)
        for _ in range(3):
            synchronize()
            started = time.perf_counter()
            size = sum(tensor.to(torch.bfloat16).nbytes for _, tensor in student.weights())
            synchronize()
            alone.append(time.perf_counter() - started)
        fresh = gap(student, engine, vocabulary, processes.device)
        engine.close()
    median = statistics.median(seconds[1:])
    return {
        "gigabytes": size / 1e9, "median_seconds": median, "gigabytes_per_second": size / 1e9 / median,
        "first_seconds": seconds[0], "weights_seconds": statistics.median(alone), "gap": fresh, "gap_before": stale,
        "start_seconds": start, "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    """Process after process, and print and keep what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/weight-sync.json"))
    parser.add_argument("--shapes", default="0.6B,1.7B")
    parser.add_argument("--engines", default="sglang,transformers")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--attention-backend", default="triton", help="SGLang's; it comes with torch")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shapes, arguments.rounds = "tiny", 3
    if not torch.cuda.is_available():
        arguments.attention_backend = None
    if arguments.one:
        kind, _, shape = arguments.one.partition("-")
        if kind == "make":
            make_model(arguments.directory / shape, shape)
        found(arguments.one, arguments.directory, {} if kind == "make" else sync(arguments, shape, kind))
        return
    kinds = ("make", *arguments.engines.split(","))
    names = [f"{kind}-{shape}" for shape in arguments.shapes.split(",") for kind in kinds]
    collect(names, arguments.directory, 240, arguments.out, about())


if __name__ == "__main__":
    main()
