"""The distillation head, on a GPU or a CPU: time and memory against the four products that every exact method must do.

Each contender runs in a process of its own, in turns with the four products (student's and teacher's logits, and both
gradients, in bf16, 2048 and 4096 rows at a time): × floor is over the faster of these two, × 2048 over the former.
Memory is the peak above the inputs, told of a GPU alone. Beside the time stand the loss, the norms of both gradients,
and for 256 rows the relative errors of value and gradients against fp64, with those of the plain bf16 implementation:
full logits, fp32 softmax, autograd. ``--seed`` draws other inputs. ``trl_forward_kl`` and ``trl_jsd`` are what TRL's
DistillationTrainer does, where trl is installed. On a CPU freed memory is kept, as in a run. ``--block 512,16`` gives
the GPU's kernel these lanes and warps; without, those of kdflow's cache, or what it finds to be the fastest ones.

    python benchmarks/head.py [--out benchmarks/results/head.json] [--contenders forward_kl,full]
    python benchmarks/head.py --rows 448 --vocab 49152 --student 576 --teacher 576    # the quickstart's, on its CPU
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from own_process import about, in_turns, keep, timed
from torch import Tensor
from torch.nn.functional import cross_entropy

import kdflow
from kdflow import Head, ops
from kdflow.contracts import Batch, ModelSpec
from kdflow.ops import tuning
from kdflow.runtime.processes import keep_freed_memory
from kdflow.testing.raw import by_number, make, side

DIVERGENCES = ("forward_kl", "reverse_kl", "tvd", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl")
# Algorithms between tokenizers, here one-to-one over equal vocabularies, so that as many rows meet; with their options.
BETWEEN: dict[str, dict[str, Any]] = {
    "uld": {}, "min_edit": {}, "overlap": {}, "dskd same": {"alignment": "same"}, "dskd cma": {}, "dskd eta":
    {"alignment": "eta"},
}  # fmt: skip
TRL = {"trl_forward_kl": 0.0, "trl_jsd": 0.5}  # β
RESPONSE = 256  # tokens that dskd's attention goes over
CONTENDERS = (
    "full", *(TRL if importlib.util.find_spec("trl") else ()), *DIVERGENCES, "squared", "sorted_l1", *BETWEEN
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "small chunk": {"chunk": 2048},
    "chunk 4096": {"chunk": 4096},
    "temperature 2": {"temperature": 2.0},
    "ce_weight 0.1": {"ce_weight": 0.1},
    "softcap 30": {"softcap": 30.0},
    "padded": {"padding": 293},
}
GIB = 2**30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Squared(kdflow.Divergence):
    """The README's: what somebody writes in plain torch."""

    name = "squared"

    def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).square().sum(-1)


def medians(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of each, taken in turns."""
    seconds = in_turns({name: timed(run) for name, run in runs.items()}, repeats, warm=2)
    return {name: 1000 * statistics.median(found) for name, found in seconds.items()}


def peak_gib(fn: Callable[[], Any]) -> float | None:
    if DEVICE.type == "cpu":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


class Sides:
    """Random hidden states and heads, the same for every contender; logits have a standard deviation of 2."""

    def __init__(self, rows: int, vocab: int, student: int, teacher: int, seed: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=DEVICE, generator=generator) * scale).bfloat16()

        self.rows, self.teacher_rows = normal(rows, student), normal(rows, teacher)
        self.weight = normal(vocab, student, scale=2 * student**-0.5).requires_grad_()
        self.teacher_weight = normal(vocab, teacher, scale=2 * teacher**-0.5)
        self.labels = torch.randint(0, vocab - 1000, (rows,), device=DEVICE, generator=generator)

    def four_products(self, chunk: int) -> None:
        """The floor."""
        weight, gradient = self.weight.detach(), torch.zeros_like(self.weight, requires_grad=False)
        for start in range(0, len(self.rows), chunk):
            rows = self.rows[start : start + chunk]
            logits = rows @ weight.T
            self.teacher_rows[start : start + chunk] @ self.teacher_weight.T
            logits @ weight
            gradient.addmm_(logits.T, rows)


def heads(sides: Sides, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Head, Head]:
    """The student's, whose weight is a leaf of its own, and the teacher's."""
    softcap, padding, vocab = options.get("softcap"), options.get("padding", 0), len(sides.weight)
    weight = sides.weight.detach().to(dtype).requires_grad_()
    return (
        Head(weight, softcap=softcap, valid_vocab=vocab - padding),
        Head(sides.teacher_weight.to(dtype), softcap=softcap, valid_vocab=vocab - 2 * padding),
    )


def ours(sides: Sides, divergence: kdflow.Divergence, count: int, options: dict[str, Any]) -> list[Tensor]:
    """Loss and gradients for rows and weight, of the mean over the first ``count`` rows."""
    rows = sides.rows[:count].detach().requires_grad_()
    student, teacher = heads(sides, torch.bfloat16, options)
    with ops.chunk_rows(options.get("chunk")):
        loss = ops.divergence_sum(
            rows, student, sides.teacher_rows[:count], teacher, divergence, temperature=options.get("temperature"),
            targets=sides.labels[:count], ce_weight=options.get("ce_weight", 0.0),
        )  # fmt: skip
    return [loss.detach() / count, *torch.autograd.grad(loss / count, (rows, student.weight))]


def between(sides: Sides, name: str) -> Callable[[], list[Tensor]]:
    """The same of an algorithm between tokenizers; gradients of its own parameters are computed too."""
    rows, responses = sides.rows.detach().requires_grad_(), torch.arange(len(sides.rows), device=DEVICE) // RESPONSE
    student, teacher = (
        side({"hidden": of_side, "head": weight, "labels": sides.labels, "response": responses,
              "embed": weight.detach().__getitem__})
        for of_side, weight in ((rows, sides.weight), (sides.teacher_rows, sides.teacher_weight))
    )  # fmt: skip
    algorithm = make(name.split()[0], BETWEEN[name])
    module = algorithm.build(
        *(ModelSpec(one.rows.shape[1], one.head.vocab_size, one.head) for one in (student, teacher))
    )
    own: list[Tensor] = []
    if module is not None:
        algorithm.module = module.to(DEVICE, rows.dtype)
        own = list(module.parameters())
    batch = Batch(student.tokens, teacher.tokens, alignment=by_number(algorithm, student, teacher))

    def run() -> list[Tensor]:
        loss = algorithm.loss(student, teacher, batch).value / len(rows)
        return [loss.detach(), *torch.autograd.grad(loss, (rows, sides.weight, *own))[:2]]

    return run


def full(
    sides: Sides, divergence: kdflow.Divergence, count: int, dtype: torch.dtype, options: dict[str, Any]
) -> list[Tensor]:
    """The same, plainly."""
    rows = sides.rows[:count].detach().to(dtype).requires_grad_()
    student, teacher = heads(sides, dtype, options)
    logits, share = student.logits(rows), options.get("ce_weight", 0.0)
    shared = min(student.valid_vocab or 0, teacher.valid_vocab or 0)
    others = teacher.logits(sides.teacher_rows[:count].to(dtype))
    loss = (1 - share) * divergence.at(options.get("temperature", 1.0))(logits[:, :shared], others[:, :shared]).sum()
    if share:
        valid = logits[:, : student.valid_vocab]
        valid = valid.float() if dtype == torch.bfloat16 else valid
        loss = loss + share * cross_entropy(valid, sides.labels[:count], reduction="sum")
    return [loss.detach() / count, *torch.autograd.grad(loss / count, (rows, student.weight))]


def of_trl(sides: Sides, beta: float) -> list[Tensor]:
    """The same by TRL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    rows, weight = (x.detach().requires_grad_() for x in (sides.rows, sides.weight))
    found, _ = ChunkedDivergenceFunction.apply(
        rows, weight, None, sides.teacher_rows, sides.teacher_weight, None, beta, 1.0, 1.0, None, 1.0, None
    )
    loss = found.sum() / len(rows)
    return [loss.detach(), *torch.autograd.grad(loss, (rows, weight))]


def errors(sides: Sides, divergence: kdflow.Divergence, options: dict[str, Any]) -> dict[str, list[float]]:
    """Relative errors of loss, rows' gradient and weight's gradient against fp64: ours, and the plain bf16 ones."""
    exact = full(sides, divergence, 256, torch.float64, options)
    found = {
        "ours": ours(sides, divergence, 256, options),
        "plain": full(sides, divergence, 256, torch.bfloat16, options),
    }
    return {
        name: [float((x.double() - y).norm() / y.norm()) for x, y in zip(values, exact, strict=True)]
        for name, values in found.items()
    }


def measure(contender: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of one contender, in this process."""
    if DEVICE.type == "cpu":
        keep_freed_memory()
    if arguments.block:
        tuning.CANDIDATES = (tuning.Blocks(*map(int, arguments.block.split(","))),)
    sides = Sides(arguments.rows, arguments.vocab, arguments.student, arguments.teacher, arguments.seed)
    count = arguments.rows
    variants: dict[str, dict[str, Any]] = {"": {}}
    runs: dict[str, Callable[[], list[Tensor]]]
    if contender == "full":
        divergence = kdflow.get_divergence("forward_kl")
        runs = {"": functools.partial(full, sides, divergence, count, torch.bfloat16, {})}
    elif contender in TRL:
        runs = {"": functools.partial(of_trl, sides, TRL[contender])}
    elif contender in BETWEEN:
        runs = {"": between(sides, contender)}
    else:
        divergence = Squared() if contender == "squared" else kdflow.get_divergence(contender)
        if contender in DIVERGENCES:
            variants = VARIANTS
        runs = {name: functools.partial(ours, sides, divergence, count, options) for name, options in variants.items()}

    def four_products(chunk: int) -> Callable[[], None]:
        return lambda: sides.four_products(chunk)

    floors, found = {"2048": four_products(2048), "4096": four_products(4096)}, {}
    for name, run in runs.items():
        loss, *gradients = (float(x.float().norm()) for x in run())
        times = medians({**floors, "run": run}, arguments.repeats)
        floor = {chunk: times[chunk] for chunk in floors}
        found[name] = {
            "ms": times["run"],
            "floor_ms": floor,
            "over_floor": times["run"] / min(floor.values()),
            "over_floor_2048": times["run"] / floor["2048"],
            "peak_gib": peak_gib(run),
            "loss": loss,
            "gradient_norms": gradients,
        }
        if contender not in ("full", *TRL, *BETWEEN):
            found[name]["errors"] = errors(sides, divergence, variants[name])
    return {"runs": found}


def main() -> None:
    """Start a process for each contender, and print and keep what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/head.json"))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    for name, size in {"rows": 16384, "vocab": 151936, "student": 1024, "teacher": 2560}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block", help="lanes and warps of the GPU's kernel")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    sizes = {name: getattr(arguments, name) for name in ("rows", "vocab", "student", "teacher")}
    threads = torch.get_num_threads() if DEVICE.type == "cpu" else None
    results: dict[str, Any] = about(sizes=sizes, threads=threads, seed=arguments.seed, block=arguments.block)
    print(f"{'contender':34}{'ms':>8}{'× floor':>9}{'× 2048':>8}{'GiB':>7}{'loss':>10}  gradient norms")
    for contender in arguments.contenders.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", contender]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        failed: dict[str, Any] = {"failed": done.returncode, "runs": {}}
        found = results[contender] = failed if done.returncode else json.loads(done.stdout.splitlines()[-1])
        keep(arguments.out, results)
        if done.returncode:
            print(f"{contender}: failed")
        for name, run in found["runs"].items():
            norms = " ".join(f"{norm:.5g}" for norm in run["gradient_norms"])
            print(
                f"{contender + (', ' + name if name else ''):34}{run['ms']:8.1f}{run['over_floor']:9.2f}"
                f"{run['over_floor_2048']:8.2f}{run['peak_gib'] or 0:7.2f}{run['loss']:10.5f}  {norms}"
            )
            for of, values in run.get("errors", {}).items():
                print(f"    relative errors, {of}: {' '.join(f'{value:.3e}' for value in values)}", flush=True)
    if any("failed" in results[contender] for contender in arguments.contenders.split(",")):
        sys.exit(1)


if __name__ == "__main__":
    main()
