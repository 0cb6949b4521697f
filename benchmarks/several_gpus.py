"""The same steps on one GPU and on two: ranks over NCCL, teachers that share or have GPUs, weights on their way.

The setting of ``steps.py``: Qwen3's shapes, 0.6B learns from 4B, random weights, bf16 with fp32 masters, steps of
16 samples of 2048 tokens, half of them targets. Each run is `kdflow train` in a process of its own:

``one``, ``two``, ``four``: as many ranks, the teacher in process on each. Speed over ``one`` and per rank, and how far
    the losses lie from those of ``one``, whose steps are the same samples.
``replicas``: two ranks that hold a whole student each.
``shared``: two ranks, one teacher in SGLang with tensor parallelism 2. ``each``: a teacher in SGLang for each.
``colocated``, ``dedicated``: one rank, its teacher in SGLang on the same GPU, in turns with the student, or on another
    one, where it scores a micro-batch while the student learns from the one before. The phases of ``colocated`` tell
    what each takes alone, and a step of ``dedicated`` cannot be shorter than the longer of them.
``on_policy``: two ranks, each with an engine of SGLang that writes 64 answers of 256 tokens a step to prompts of 256;
    ``sync`` is all weights, gathered over the ranks and copied into both engines.

    python benchmarks/several_gpus.py DIRECTORY [--out benchmarks/results/several-gpus.json] [--runs one,two,dedicated]
        [--tiny] [KEY=VALUE]...

A run takes 50 to 80 s on H100s: compiling is most of it. DIRECTORY holds models, data and runs: 20 GB. ``--tiny`` is
for CPUs, and for a look at whether everything runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from own_process import about, environment, found, keep, measure, show
from random_models import make_model, vocabulary_size
from workload import run_file, train, write_text

RANKS = {"one": 1, "two": 2, "four": 4, "replicas": 2, "shared": 2, "each": 2, "colocated": 1, "dedicated": 1,
         "on_policy": 2}  # fmt: skip
TEACHERS: dict[str, dict[str, Any]] = {
    "shared": {"tensor_parallel": 2},
    "each": {},
    "colocated": {},
    "dedicated": {"placement": "dedicated"},
}


def shapes(arguments: argparse.Namespace) -> dict[str, str]:
    return {"student": "tiny", "teacher": "tiny-wide"} if arguments.tiny else {"student": "0.6B", "teacher": "4B"}


def make(arguments: argparse.Namespace) -> None:
    """Models and data, unless they are there."""
    full, directory = 32 if arguments.tiny else 2048, arguments.directory
    for seed, (side, shape) in enumerate(shapes(arguments).items()):
        make_model(directory / side, shape, seed)
    vocabulary, steps = vocabulary_size(shapes(arguments)["student"]), arguments.steps + 2
    write_text(directory / "full.jsonl", itertools.repeat(full), 16 * full * steps, vocabulary)
    write_text(directory / "prompts.jsonl", itertools.repeat(full // 4), 16 * full * steps, vocabulary)


def one(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run and what it left behind."""
    full, directory = 32 if arguments.tiny else 2048, arguments.directory
    engine = {"name": "sglang", "attention_backend": arguments.attention_backend, "memory_fraction": 0.4}
    text, length = ("prompts", full // 4) if name == "on_policy" else ("full", full)
    run = run_file(
        directory / "run", directory / "student", directory / "teacher", str(directory / f"{text}.jsonl"),
        length=length, micro_batch=4 * full, step=16 * full, steps=arguments.steps, compile=torch.cuda.is_available(),
    )  # fmt: skip
    if name in TEACHERS:
        run["teacher"]["engine"] = {**engine, **TEACHERS[name]}
    if name == "replicas":
        run["training"]["replicas"] = 2
    if name == "on_policy":
        writes = {**engine, "cache_tokens": 64 * full}
        run["rollout"] = {"fraction": 1.0, "max_new_tokens": length // 2, "temperature": 1.0, "engine": writes}
    try:
        told = train(run, [*arguments.overrides, "--nproc-per-node", str(RANKS[name])])
    except RuntimeError as error:
        return {"failed": str(error)}
    told["peak_gib"] = told.pop("peak_bytes") / 2**30
    told["seconds_a_step"] = told["tokens_per_step"] / told["tokens_per_second"]
    if name == "on_policy":
        size = sum(file.stat().st_size for file in (directory / "student").glob("*.safetensors")) / 1e9
        told |= {"gigabytes": size, "gigabytes_per_second": size / told["phases"]["sync"]}
    return told


def compare(results: Mapping[str, Any], name: str) -> dict[str, float]:
    """Beside ``one``: speed, speed a rank, and losses; ``dedicated`` beside ``colocated``: the longer phase."""
    told, alone, in_turns = results[name], results.get("one", {}), results.get("colocated", {})
    figures: dict[str, float] = {}
    if "losses" in alone and name not in ("one", "on_policy"):
        ratio = told["tokens_per_second"] / alone["tokens_per_second"]
        differences = [abs(a - b) / b for a, b in zip(told["losses"], alone["losses"], strict=True)]
        figures |= {"speed_over_one": ratio, "efficiency": ratio / RANKS[name], "losses_differ": max(differences)}
    if name == "dedicated" and "phases" in in_turns:
        longer = max(in_turns["phases"]["teacher"], in_turns["phases"]["student"])
        figures |= {"longer_phase_seconds": longer, "seconds_over_longer_phase": told["seconds_a_step"] / longer}
    return figures


def main() -> None:
    """Run after run, and print and keep what they did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the run file, such as training.head_chunk=4096")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/several-gpus.json"))
    parser.add_argument("--runs", default="one,two,replicas,shared,each,colocated,dedicated,on_policy")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--attention-backend", default="triton", help="SGLang's; it comes with torch")
    parser.add_argument("--tiny", action="store_true", help="small models and short samples")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if not torch.cuda.is_available():
        arguments.attention_backend = None
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if arguments.one is not None:
        make(arguments)
        found(arguments.one, arguments.directory, {})
        return
    names = arguments.runs.split(",")
    if unknown := set(names) - set(RANKS):
        parser.error(f"no such run: {', '.join(sorted(unknown))}; there are {', '.join(RANKS)}")
    os.environ.update(environment())
    before = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    results = {**before, **about(overrides=arguments.overrides, gpus=torch.cuda.device_count())}
    if "failed" in (made := measure("make", arguments.directory, 300)):
        sys.exit(made["failed"])
    for name in names:
        results[name] = one(name, arguments)
        if "failed" not in results[name]:
            results[name] |= compare(results, name)
        keep(arguments.out, results)
        show(name, results[name])


if __name__ == "__main__":
    main()
