"""Tokens a second and peak memory of whole steps, against the length of samples, the vocabulary, and learnt tokens.

Qwen3's shapes, 0.6B learns from 1.7B, random weights, blocks compiled. Each point is a few steps of ``kdflow train`` in
a process of its own, a micro-batch of 32,768 tokens each: sixteen samples of 2,048 tokens, half of them learnt, against
a vocabulary of 151,936, but for what a sweep changes. OUT keeps models, results.json and a plot of each sweep; points
that are in results.json are not measured again.

    python benchmarks/scaling.py OUT [--sweeps length,vocabulary,learnt] [training.activation_checkpointing=true …]
    python benchmarks/scaling.py OUT --plot     # the plots alone, from results.json; needs matplotlib
    python benchmarks/scaling.py OUT --tiny     # a smoke test: on a CPU the peak is the whole process's
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from own_process import about
from random_models import VOCAB, make_model
from workload import run_file, train, write_text

TOKENS = 32768
LABELS = {
    "length": "tokens of a sample", "vocabulary": "tokens of the vocabulary", "learnt": "learnt tokens of a step (N)",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting: tokens of a sample, of the vocabulary, and learnt ones of a step."""

    length: int = 2048
    vocabulary: int = VOCAB
    learnt: int = TOKENS // 2

    @property
    def name(self) -> str:
        """As results name it."""
        return f"{self.length} {self.vocabulary} {self.learnt}"


def sweeps(tiny: bool) -> dict[str, list[Point]]:
    """The points of each, in ascending order; one of them is the same in all."""
    base = Point(32, 2048, 256) if tiny else Point()
    values: dict[str, tuple[int, ...]] = {
        "length": (8, 32, 128) if tiny else (512, 2048, 8192, 32768),
        "vocabulary": (1024, 2048) if tiny else (32768, 65536, VOCAB, 262144),
        "learnt": (64, 256) if tiny else (2048, 8192, TOKENS // 2, TOKENS - 16),
    }
    return {name: [dataclasses.replace(base, **{name: value}) for value in of] for name, of in values.items()}


def measure(point: Point, tokens: int, steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make models and text of a point, and train."""
    directory, shapes = arguments.directory, ("tiny", "tiny-wide") if arguments.tiny else ("0.6B", "1.7B")
    student, teacher = (directory / f"{shape}-{point.vocabulary}" for shape in shapes)
    for seed, (model, shape) in enumerate(zip((student, teacher), shapes, strict=True)):
        make_model(model, shape, seed, point.vocabulary)
    text = write_text(
        directory / "text.jsonl", itertools.repeat(point.length), tokens * (steps + 1), point.vocabulary,
        point.learnt / tokens,
    )  # fmt: skip
    run = run_file(
        directory / "run", student, teacher, text, length=point.length, micro_batch=tokens, step=tokens, steps=steps,
        compile=not arguments.tiny,
    )  # fmt: skip
    return {**dataclasses.asdict(point), **train(run, arguments.overrides)}


def plot(results: dict[str, Any], directory: Path) -> None:
    """An SVG of each sweep that was measured: tokens a second above, peak memory below."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kdflow"  # the same figures give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    for name, points in sweeps(results["tiny"]).items():
        found = [results["points"][point.name] for point in points if point.name in results["points"]]
        if not found:
            continue
        figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(6, 5), layout="constrained")
        at = [point[name] for point in found]
        for axis, key, unit, label in ((axes[0], "tokens_per_second", 1, "tokens/s"),
                                       (axes[1], "peak_bytes", 2**30, "peak GiB")):  # fmt: skip
            axis.plot(at, [point[key] / unit for point in found], marker="o")
            axis.set_ylabel(label)
            axis.set_ylim(0, 1.1 * max(point[key] / unit for point in found))
            axis.grid(alpha=0.3)
        axes[1].set_xscale("log", base=2)
        axes[1].set_xticks(at, [f"{value:,}" for value in at])
        axes[1].minorticks_off()
        axes[1].set_xlabel(LABELS[name])
        axes[0].set_title(results["device"])
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    """Measure point by point, keep and print the figures, and plot them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("overrides", nargs="*", help="of every run, such as training.activation_checkpointing=true")
    parser.add_argument("--sweeps", default=",".join(LABELS))
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_intermixed_args()
    directory: Path = arguments.directory
    file = directory / "results.json"
    if arguments.plot:
        plot(json.loads(file.read_text("utf-8")), directory)
        return
    directory.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {"points": {}}
    results |= {**about(), "overrides": arguments.overrides, "tiny": arguments.tiny}
    tokens, steps = (512, 6) if arguments.tiny else (TOKENS, 8)
    every = [point for name in arguments.sweeps.split(",") for point in sweeps(arguments.tiny)[name]]
    # Points of one vocabulary one after another: the models of the one before make room.
    for vocabulary, points in itertools.groupby(sorted(set(every), key=lambda p: p.vocabulary), lambda p: p.vocabulary):
        for point in points:
            if point.name in results["points"]:
                continue
            found = results["points"][point.name] = measure(point, tokens, steps, arguments)
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(
                f"length {point.length}, vocabulary {point.vocabulary}, learnt {point.learnt}: "
                f"{found['tokens_per_second']:,.0f} tokens/s, {found['peak_bytes'] / 2**30:.2f} GiB", flush=True,
            )  # fmt: skip
        for model in directory.glob(f"*-{vocabulary}"):
            shutil.rmtree(model)
    try:
        plot(results, directory)
    except ImportError:
        print(f"no plots without matplotlib: install it, and give --plot with {directory}")


if __name__ == "__main__":
    main()
