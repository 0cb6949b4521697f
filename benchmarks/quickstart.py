"""Where the time of the quickstart's steps goes, on the CPU: shares of operators, by what they are for.

    python benchmarks/quickstart.py [--out benchmarks/results/quickstart.json] [KEY=VALUE]...

Ten steps of ``examples/quickstart.yaml`` in this process, of which the last three are traced.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
from own_process import about
from torch.profiler import ProfilerActivity, profile
from workload import tracing

import kdflow

STEPS, TRACED = 10, 3
KINDS = {
    "matrix products": r"::(add)?mm",
    "attention": r"attention",
    "kernel of the head": r"^_Fused$",
    "optimizer": r"adam|norm$|clip",
    "copies and casts": r"copy|cat|_to_copy|fill|zero",
}


def main() -> None:
    """Train, trace, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quickstart.json"))
    arguments = parser.parse_intermixed_args()
    tracer = profile(activities=[ProfilerActivity.CPU])
    with tempfile.TemporaryDirectory() as folder, tracing(tracer, STEPS - TRACED, STEPS) as traced:
        mine = [f"training.steps={STEPS}", f"output={folder}/run", "data.eval=[]", "tracking=[console]"]
        kdflow.train("examples/quickstart.yaml", [*mine, *arguments.overrides])
    times: Counter[str] = Counter()
    for event in tracer.key_averages():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "everything else")
        times[kind] += event.self_cpu_time_total
    whole = sum(times.values())
    results = about(threads=torch.get_num_threads()) | {
        "seconds_a_step": sum(step["seconds"] for step in traced) / TRACED,
        "tokens_per_second": sum(step["tokens"] for step in traced) / sum(step["seconds"] for step in traced),
        "phases": {name: sum(step["phases"][name] for step in traced) / TRACED for name in traced[0]["phases"]},
        "shares": {kind: time / whole for kind, time in times.most_common()},
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{results['seconds_a_step']:.2f} s a step, {results['tokens_per_second']:.0f} tokens/s")
    for kind, share in results["shares"].items():
        print(f"{share:7.1%}  {kind}")


if __name__ == "__main__":
    main()
