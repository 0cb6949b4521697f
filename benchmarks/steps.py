"""Whole off-policy steps on one GPU: tokens a second and peak memory of `kdflow train` with a run file.

The setting of TRL's measured peers: Qwen3's shapes, 0.6B learns from 4B, random weights, bf16 compute with fp32 master
weights; a step is four micro-batches of 8192 tokens, here packed. ``full``: sixteen samples of 2048 tokens, half of
them targets. ``ragged``: lengths are log-normal with a mean of 700, at most 4096. Each run is a process of its own.

    python benchmarks/steps.py DIRECTORY [--out benchmarks/results/steps.json] [--runs forward_kl,jsd] [--profile]
        [KEY=VALUE]...

DIRECTORY holds models, data and runs: 20 GB. Figures are medians over the steps after the fourth. With ``--profile``
two steps of the first run are traced: time on the device by what it was for.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from random_models import make_model, words

import kdflow

TOKENS_PER_STEP, MICRO_BATCH, WARM = 32768, 8192, 4
PEAK = 989e12  # bf16, as NVIDIA's data sheet of the H100 SXM says
KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    "matrix products": r"gemm|nvjet|xmma|cutlass|matmul",
    "divergence": r"divergence_rows",
    "optimizer": r"adam|lpnorm",
    "copies and collectives": r"nccl|memcpy|chunk_cat|catarray|split_with_sizes|fsdp",
    "compiled element-wise": r"triton",
}


def make(directory: Path, steps: int) -> None:
    """Models and data, unless they are there."""
    for seed, (name, shape) in enumerate({"student": "0.6B", "teacher": "4B"}.items()):
        make_model(directory / name, shape, seed)
    draw, vocabulary = random.Random(0), words()
    for name in ("full", "ragged"):
        lines, tokens = [], 0
        while tokens < TOKENS_PER_STEP * (steps + 1):
            length = 2048 if name == "full" else max(16, min(4096, round(draw.lognormvariate(6.15, 0.9))))
            tokens += length
            prompt, response = (draw.choices(vocabulary, k=k) for k in (length // 2, length - length // 2 - 1))
            lines.append(json.dumps({"prompt": " " + " ".join(prompt), "response": " " + " ".join(response)}) + "\n")
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def run_file(directory: Path, data: str, algorithm: dict[str, Any], steps: int) -> dict[str, Any]:
    """The run file."""
    return {
        "student": {"model": str(directory / "student")},
        "teacher": {"model": str(directory / "teacher")},
        "algorithm": algorithm,
        "data": {
            "train": [{"path": str(directory / f"{data}.jsonl"), "format": "prompt_response"}],
            "max_length": 2048 if data == "full" else 4096,
            "max_tokens": MICRO_BATCH,
        },
        "training": {
            "steps": steps, "tokens_per_step": TOKENS_PER_STEP, "learning_rate": 1e-5, "compile": True,
            "checkpoint_every": None, "evaluate_every": None,
        },
        "output": str(directory / "run"),
    }  # fmt: skip


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "forward_kl": ("full", {"name": "forward_kl"}),
    "jsd": ("full", {"name": "jsd", "beta": 0.5}),
    "adaptive_kl": ("full", {"name": "adaptive_kl"}),
    "ragged": ("ragged", {"name": "forward_kl"}),
}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in a process of its own through the command line, and read what it left behind."""
    directory: Path = arguments.directory
    file, output = directory / "run.yaml", directory / "run"
    shutil.rmtree(output, ignore_errors=True)
    file.write_text(yaml.safe_dump(run_file(directory, *RUNS[name], arguments.steps)), encoding="utf-8")
    cli = [sys.executable, "-m", "kdflow"]
    checked = subprocess.run(
        [*cli, "check", str(file), *arguments.overrides, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    subprocess.run([*cli, "train", str(file), *arguments.overrides], check=True)
    planned, summary = json.loads(checked.stdout), json.loads((output / "summary.json").read_text("utf-8"))
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    every = [event for event in events if event["event"] == "step"]
    steady = every[WARM:]
    seconds, tokens = (statistics.median(event[key] for event in steady) for key in ("seconds", "tokens"))
    shutil.rmtree(output)
    return {
        "tokens_per_second": statistics.median(event["tokens"] / event["seconds"] for event in steady),
        "peak_gib": summary["peak_memory_bytes"] / 2**30,
        "planned_gib": planned["memory"]["bytes"]["total"] / 2**30,
        "flops_utilisation": planned["flops_per_step"] * tokens / TOKENS_PER_STEP / seconds / PEAK,
        "phases": {name: statistics.median(event["phases"][name] for event in steady) for name in every[0]["phases"]},
        "seconds_before_and_after_steps": summary["wall_seconds"] - summary["seconds"],
        "seconds": [event["seconds"] for event in every],
        "losses": [event["loss"] for event in every],
        "gradient_norms": [event["grad_norm"] for event in every],
    }


def profile(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trace two steps of a run in this process."""
    from torch.profiler import ProfilerActivity, record_function

    from kdflow.ops import fused
    from kdflow.runtime.events import Events
    from kdflow.runtime.loop import Loop
    from kdflow.runtime.student import Student
    from kdflow.runtime.teacher import Teacher

    def mark(owner: Any, function: str, region: str) -> None:
        known: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(known)
        def marked(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"region {region}"):
                return known(*args, **kwargs)

        setattr(owner, function, marked)

    mark(Teacher, "score", "teacher")
    mark(fused, "fused_parts", "head")
    mark(Student, "clip", "clip and optimizer")
    mark(Student, "step", "clip and optimizer")
    mark(Loop, "micro_batches", "data")
    tracer = torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    emit, trace = Events.emit, arguments.directory / "trace.json"

    def watch(self: Events, event: str, **fields: Any) -> None:
        emit(self, event, **fields)
        if event == "step" and fields["step"] == WARM + 1:
            torch.cuda.synchronize()
            tracer.start()
        if event == "step" and fields["step"] == WARM + 3:
            torch.cuda.synchronize()
            tracer.stop()
            tracer.export_chrome_trace(str(trace))

    Events.emit = watch  # type: ignore[method-assign]
    run = run_file(arguments.directory, *RUNS[name], WARM + 3)
    shutil.rmtree(run["output"], ignore_errors=True)
    kdflow.train(run, arguments.overrides)
    shutil.rmtree(run["output"])
    return table(json.loads(trace.read_text())["traceEvents"], steps=2)


def table(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Milliseconds a step of the device's work by region and kind, of its idle time, and of the longest kernels."""
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    marks = [event for event in events if event.get("cat") == "gpu_user_annotation" and "region" in event["name"]]
    regions: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in work:
        inside = [m for m in marks if m["tid"] == event["tid"] and 0 <= event["ts"] - m["ts"] <= m["dur"]]
        region = min(inside, key=lambda m: float(m["dur"]))["name"].removeprefix("region ") if inside else "student"
        name = event["name"].lower()
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other element-wise")
        regions[f"{region}: {kind}"] += event["dur"]
        kernels[event["name"][:100]] += event["dur"]
        counts[event["name"][:100]] += 1
    busy, end = 0.0, 0.0
    gaps: list[float] = []
    for event in sorted(work, key=lambda event: float(event["ts"])):
        start, stop = event["ts"], event["ts"] + event["dur"]
        if end and start > end:
            gaps.append(start - end)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - min(event["ts"] for event in work)

    def per_step(found: Counter[str], most: int | None = None) -> dict[str, float]:
        return {name: round(microseconds / 1000 / steps, 3) for name, microseconds in found.most_common(most)}

    return {
        "milliseconds_a_step": whole / 1000 / steps,
        "idle_milliseconds_a_step": (whole - busy) / 1000 / steps,
        "longest_gaps_milliseconds": [round(gap / 1000, 3) for gap in sorted(gaps, reverse=True)[:12]],
        "regions": per_step(regions),
        "kernels": {name: [ms, counts[name] // steps] for name, ms in per_step(kernels, 40).items()},
    }


def main() -> None:
    """Make what is missing, measure run by run, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the run file, such as training.activation_checkpointing=true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/steps.json"))
    parser.add_argument("--runs", default="forward_kl,jsd,ragged")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--one", choices=["make", "profile"], help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    names = arguments.runs.split(",")
    if arguments.one == "make":
        make(arguments.directory, arguments.steps)
        return
    if arguments.one == "profile":
        print(json.dumps(profile(names[0], arguments)))
        return
    again = [sys.executable, __file__, *sys.argv[1:], "--one"]
    subprocess.run([*again, "make"], check=True)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "kdflow": kdflow.__version__}
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": versions}
    results["overrides"] = arguments.overrides
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        found = results[name] = measure(name, arguments)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        print(
            f"{name}: {found['tokens_per_second']:,.0f} tokens/s, {found['peak_gib']:.1f} GiB (planned "
            f"{found['planned_gib']:.1f}), {found['flops_utilisation']:.1%} of {PEAK / 1e12:.0f} TFLOP/s; losses "
            f"{found['losses'][0]:.4f} … {found['losses'][-1]:.4f}; phases {found['phases']}",
            flush=True,
        )
    if arguments.profile:
        done = subprocess.run([*again, "profile"], stdout=subprocess.PIPE, text=True, check=True)
        found = results["profile"] = json.loads(done.stdout.splitlines()[-1])
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        for key in ("milliseconds_a_step", "idle_milliseconds_a_step", "longest_gaps_milliseconds"):
            print(f"{key}: {found[key]}")
        for name, ms in found["regions"].items():
            print(f"{ms:10.2f} ms  {name}")
        for name, (ms, count) in found["kernels"].items():
            print(f"{ms:10.2f} ms {count:6d} × {name}")


if __name__ == "__main__":
    main()
