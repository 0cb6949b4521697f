"""Peak memory of training, option by option, beside what ``kdflow check`` plans; and the largest student that fits.

For each size of the student, Qwen3's shapes with random weights, and each option a few steps of ``kdflow train`` in a
process of its own: two micro-batches of 8,192 tokens a step, four samples of 2,048 each, half of them learnt. The
teacher has the 0.6B shape. What does not fit is planned alone. Then, from plans alone, the largest of five sizes that
fits a device of 80 GB. OUT keeps models and results.json; what is in it is neither measured nor planned again.

    python benchmarks/memory.py OUT [--sizes 0.6B,1.7B,4B] [--options "adamw;lora"] [training.compile=true …]
    python benchmarks/memory.py OUT --sizes none  # plans alone, which need no GPU
    python benchmarks/memory.py OUT --tiny        # a smoke test: on a CPU the peak is the whole process's

It needs the extras lora and torchao.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from own_process import about
from random_models import SHAPES, make_config, make_model, vocabulary_size
from rich.console import Console
from rich.table import Table
from workload import run_file, train, write_text

from kdflow.runtime import memory
from kdflow.runtime.check import check
from kdflow.runtime.prepare import prepare

AGAIN = ["training.activation_checkpointing=true"]
OPTIONS: dict[str, list[str]] = {
    "adamw, nothing again": [],
    "adamw, every second": ["training.activation_checkpointing=2"],
    "adamw": AGAIN,
    "bf16": [*AGAIN, "training.parameters=bfloat16"],
    "8bit": [*AGAIN, "training.optimizer=adamw_8bit"],
    "8bit bf16": [*AGAIN, "training.optimizer=adamw_8bit", "training.parameters=bfloat16"],
    "lora": [*AGAIN, "student.lora={}"],
}
DEVICE = 80e9  # bytes: what is sold as 80 GB has 85e9, of which CUDA and the room between tensors take some


def measure(run: dict[str, Any], overrides: list[str], planned: dict[str, Any]) -> dict[str, Any]:
    """The plan and, where that fits this device, what training took."""
    total = planned["bytes"]["total"]
    found: dict[str, Any] = {"planned": planned["bytes"], "fullest": planned["fullest"]}
    if torch.cuda.is_available() and total > planned["capacity"]:
        return {**found, "skipped": "does not fit"}
    try:
        taken = train(run, overrides)["peak_bytes"]
    except RuntimeError as error:
        return {**found, "failed": str(error)}
    return {**found, "peak_bytes": taken, "ratio": total / taken}


def plan(run: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """What ``kdflow check --json`` says of memory."""
    file = Path(run["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(run), encoding="utf-8")
    planned: dict[str, Any] = check(file, overrides, (), 1)["memory"]
    return planned


def plan_size(run: dict[str, Any], overrides: list[str]) -> int:
    """The same total from the sizes of the models alone, without tokenizers and data."""
    config, _ = prepare(run, overrides, ())
    assert config.teacher is not None
    teacher = memory.model_shape(config.teacher.model, torch.bfloat16)
    learnt = config.data.max_tokens // 2
    load = memory.Load(devices=1, targets=learnt, micro_batches=2, head="kernel",
                       engines={"teacher": teacher.parameters * torch.bfloat16.itemsize})  # fmt: skip
    total = memory.estimate(config, memory.student_shape(config), teacher, load)[1]["total"]
    assert total is not None
    return total


def show(results: dict[str, Any]) -> None:
    """Both tables."""
    console = Console()
    measured = Table("student", "option", "planned GiB", "taken GiB", "planned / taken", "fullest", title="peak memory")
    for name, found in results["measured"].items():
        taken = f"{found['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in found else found.get("skipped", "failed")
        ratio = f"{found['ratio']:.3f}" if "ratio" in found else "-"
        planned = f"{found['planned']['total'] / 2**30:.2f}"
        measured.add_row(*name.split(": "), planned, taken, ratio, found["fullest"])
    console.print(measured)
    if results["device"] == "CPU":
        console.print("on a CPU, what was taken is the whole process's memory, and not comparable with the plan")
    fits = Table("option", *results["sizes"], "largest that fits", title=f"planned GiB, of {DEVICE / 2**30:.1f}")
    for option, found in results["plans"].items():
        fitting = [size for size, total in found.items() if total <= DEVICE]
        fits.add_row(option, *(f"{total / 2**30:.1f}" for total in found.values()), fitting[-1] if fitting else "none")
    console.print(fits)


def main() -> None:
    """Make what is missing, measure, plan, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("overrides", nargs="*", help="of every run, such as training.compile=true")
    parser.add_argument("--sizes", help="those that are measured; 0.6B,1.7B,4B where none are given")
    parser.add_argument("--options", default=";".join(OPTIONS), help="separated by semicolons")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_intermixed_args()
    directory: Path = arguments.directory
    directory.mkdir(parents=True, exist_ok=True)
    shapes = [name for name in SHAPES if name.startswith("tiny") == arguments.tiny]
    sizes = [name for name in shapes if name in (arguments.sizes or "tiny,tiny-wide,0.6B,1.7B,4B").split(",")]
    length, steps = 64 if arguments.tiny else 2048, 3
    micro, vocabulary = 4 * length, vocabulary_size(shapes[0])
    text = write_text(directory / "text.jsonl", itertools.repeat(length), 2 * micro * (steps + 1), vocabulary)

    def run(size: str, weights: bool) -> dict[str, Any]:
        make = make_model if weights else make_config
        make(directory / "teacher", shapes[0])
        make(directory / size, size)
        return run_file(directory / "run", directory / size, directory / "teacher", text, length=length,
                        micro_batch=micro, step=2 * micro, steps=steps)  # fmt: skip

    file = directory / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"measured": {}}
    results |= {**about(), "overrides": arguments.overrides, "sizes": shapes}
    for size, option in itertools.product(sizes, arguments.options.split(";")):
        name, overrides = f"{size}: {option}", [*OPTIONS[option], *arguments.overrides]
        if name not in results["measured"]:
            results["measured"][name] = measure(run(size, True), overrides, plan(run(size, True), overrides))
            file.write_text(json.dumps(results, indent=1) + "\n")
            print(
                name, {key: value for key, value in results["measured"][name].items() if key != "planned"}, flush=True
            )
    if "plans" not in results:
        results["plans"] = {
            option: {size: plan_size(run(size, False), [*overrides, *arguments.overrides]) for size in shapes}
            for option, overrides in OPTIONS.items()
        }
    file.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
