"""Which way of distilling between tokenizers helps: a cut SmolLM2 learns from Gemma 3 on Jane Austen's novels.

Each method trains the student, 22 of the 30 layers of SmolLM2-135M-Instruct, on the same samples for the same steps;
what is measured is bits per byte on another novel, which does not depend on the tokenizer. ``sft`` has no teacher; in
all others the loss is half the method's own and half the cross-entropy that is all of ``sft``; in ``overlap_alone`` it
is the method's own. Each runs once more with the teacher's hidden states permuted among the positions of the
micro-batch, and its embeddings among the tokens: where this control is no worse, the gain does not come from what the
teacher says.

The layers that are left out stand apart from one another, in the middle of the model. Such a student begins at two bits
per byte and is near 1.6 after 12 steps: it has something to learn, and follows a text closely enough for it to matter
what the teacher says at which position. One of every third layer begins at 4.5, learns how frequent tokens are, and
learns that from a permuted teacher as well.

    python benchmarks/cross_tokenizer.py OUT [--methods sft,uld] [--seeds 3] [--steps 12]

Every run is a process of its own. Goes on where it was stopped; raw results are kept in OUT/results.json, and the table
is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import kdflow
from kdflow.contracts import Lease, TokenBatch
from kdflow.engines.transformers.teacher import TransformersTeacher

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
LAYERS = [layer for layer in range(30) if layer not in range(8, 24, 2)]
PASSAGES = {"train": 200, "eval": 6}
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},
    "uld": {"name": "uld", "ce_weight": 0.5},
    "min_edit": {"name": "min_edit", "ce_weight": 0.5},
    "dskd_cma": {"name": "dskd", "alignment": "cma", "projector_learning_rate": 1e-3, "ce_weight": 0.5},
    "dskd_eta": {"name": "dskd", "alignment": "eta", "projector_learning_rate": 1e-3, "ce_weight": 0.5},
    "overlap": {"name": "overlap", "ce_weight": 0.5},
    "overlap_alone": {"name": "overlap"},
}
# Student's t at 97.5 %, for 1, 2, … degrees of freedom.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class PermutedTeacher(TransformersTeacher):
    """The control: what it lends of a position is another one's of the micro-batch, and of a token another token's."""

    name = "permuted"

    def score(self, batch: TokenBatch) -> Lease:
        lease = super().score(batch)
        generator = torch.Generator().manual_seed(int(batch.digest[:8], 16))
        return Lease(lease.rows[torch.randperm(len(lease.rows), generator=generator)], batch.digest)

    def embed(self, ids: Tensor) -> Tensor:
        # By token, not by position: attention looks for embeddings wherever they stand, and would find them again.
        others = torch.randperm(self.spec.vocab_size, generator=torch.Generator().manual_seed(0))
        return super().embed(others[ids])


@kdflow.hookimpl
def kdflow_teachers() -> Iterable[type[kdflow.TeacherEngine]]:
    return [PermutedTeacher]


def environment(out: Path) -> dict[str, str]:
    """Where this file is an installed plugin: a distribution in OUT whose entry point names it."""
    info = out / "plugin" / "kdflow_permuted-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kdflow-permuted\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[kdflow]\npermuted = {Path(__file__).stem}\n", encoding="utf-8")
    path = [str(info.parent.resolve()), str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def write_data(out: Path) -> None:
    """The first 700 characters or so of each passage: short enough that neither tokenizer makes a cut of its own."""
    for name, passages in PASSAGES.items():
        lines = (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()[:passages]
        texts = [json.loads(line)["text"] for line in lines]
        blocks = [json.dumps({"text": text[: text.rindex(" ", 0, 700)]}) + "\n" for text in texts]
        (out / f"{name}.jsonl").write_text("".join(blocks), encoding="utf-8")


def run_file(method: str, permuted: bool, seed: int, steps: int, out: Path, name: str) -> dict[str, Any]:
    """A run; everything but algorithm, teacher and seed is the same for all."""
    teacher = {"model": "google/gemma-3-270m", "engine": {"name": "permuted" if permuted else "transformers"}}
    return {
        "student": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "keep_layers": LAYERS},
        **({} if method == "sft" else {"teacher": teacher}),
        "algorithm": METHODS[method],
        "data": {
            "train": [{"path": str(out / "train.jsonl"), "format": "text"}],
            "eval": [{"path": str(out / "eval.jsonl"), "format": "text"}],
            "max_length": 256,
            "max_tokens": 512,
        },
        "training": {
            "steps": steps,
            "tokens_per_step": 150,
            "learning_rate": 3e-4,
            "warmup": 0.05,
            "dtype": "float32",
            "head_chunk": 64,
            "evaluate_every": None,
            "checkpoint_every": None,
        },
        "output": str(out / "runs" / name),
        "seed": seed,
    }


def measure(run: dict[str, Any], env: dict[str, str]) -> dict[str, float]:
    """Train in a process of its own, and keep the figures, not the weights."""
    output = Path(run["output"])
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(run), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "kdflow", "train", str(file), "--resume", "auto"], env=env, check=True)
    summary = json.loads((output / "summary.json").read_text("utf-8"))
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    shutil.rmtree(output / "checkpoints")
    return {
        **{when: summary["evaluation"][when]["bits_per_byte"] for when in ("before", "after")},
        "target_tokens": sum(event["target_tokens"] for event in events if event["event"] == "step"),
        "seconds": summary["seconds"],
    }


def main() -> None:
    """Run each method with each seed, the controls too, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, len(QUANTILES) + 2), metavar="N")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"no such method: {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    out: Path = arguments.out
    env, file = environment(out), out / "results.json"
    write_data(out)
    results = json.loads(file.read_text("utf-8")) if file.exists() else {}
    found: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for method in methods:
            for permuted in (False, True) if method != "sft" else (False,):
                name = f"{method}{'-permuted' if permuted else ''}-{arguments.steps}-{seed}"
                if name not in results:
                    run = run_file(method, permuted, seed, arguments.steps, out, name)
                    results[name] = measure(run, env)
                    file.write_text(json.dumps(results, indent=1), encoding="utf-8")
                found.setdefault((method, permuted), []).append(results[name])
    print_table(found, methods)


def print_table(found: dict[tuple[str, bool], list[dict[str, float]]], methods: Sequence[str]) -> None:
    """Mean and 95 % interval over seeds; differences are between runs with the same seed, below zero where it helps."""
    after = {key: [result["after"] for result in results] for key, results in found.items()}
    before = found[methods[0], False][0]["before"]
    print(f"| method | bits per byte (before: {before:.3f}) | less `sft` | less its control | target tokens/s |")
    print("| --- | --- | --- | --- | ---: |")
    for method in methods:
        others = [after.get(other) for other in (("sft", False), (method, True))]
        differences = [
            "-" if other is None or other is after[method, False] else interval(
                [mine - theirs for mine, theirs in zip(after[method, False], other, strict=True)], "+"
            )
            for other in others
        ]  # fmt: skip
        results = found[method, False]
        speed = sum(result["target_tokens"] for result in results) / sum(result["seconds"] for result in results)
        print(f"| {method} | {interval(after[method, False])} | {' | '.join(differences)} | {speed:.0f} |")


def interval(values: Sequence[float], sign: str = "") -> str:
    """The mean, and its 95 % interval where there are several."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:{sign}.3f}"
    half = QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:{sign}.3f} ({mean - half:{sign}.3f} to {mean + half:{sign}.3f})"


if __name__ == "__main__":
    main()
