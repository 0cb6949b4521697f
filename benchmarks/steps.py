"""Whole off-policy steps on one GPU: tokens a second and peak memory of `kdflow train` with a run file.

The setting of TRL's measured peers: Qwen3's shapes, 0.6B learns from 4B, random weights, bf16 compute with fp32 master
weights; a step is 32,768 tokens in four micro-batches. ``full``: sixteen samples of 2048 tokens, half of them targets.
``ragged``: lengths are log-normal with a mean of 700, at most 4096, and a step's last sample reaches beyond its tokens:
micro-batches may have 9216, so that four hold them, too. Each run is a process of its own.
``no_compile`` compiles nothing: the start is shown. ``trl_full``, ``trl_ragged`` and ``trl_jsd`` (of the full samples)
are TRL's GKDTrainer on the same samples, where trl is installed: as many to a micro-batch as the longest allows in 8192
tokens, JSD in half of that, padded, with gradient checkpointing; padding is not counted. ``sglang`` and ``sglang_fp8``:
the teacher in SGLang on the same GPU, whose memory is not in the peak, that of the student's process.

    python benchmarks/steps.py DIRECTORY [--out benchmarks/results/steps.json] [--runs forward_kl,ragged,trl_ragged]
        [--profile] [--attention-backend fa3] [KEY=VALUE]...
    python benchmarks/steps.py DIRECTORY --tiny --out OUT.json     # a smoke test on a CPU

DIRECTORY holds models, data and runs: 20 GB. Figures are medians over the steps after the fourth. With ``--profile``
two steps of the first run are traced: time on the device by what it was for.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from own_process import about
from random_models import make_model, vocabulary_size
from workload import (
    WARM,
    device_work,
    ragged,
    run_file,
    span_and_gaps,
    to_host,
    tracing,
    train,
    write_text,
)  # fmt: skip

import kdflow
from kdflow.runtime.check import check

KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    "matrix products": r"gemm|nvjet|xmma|cutlass|matmul",
    "divergence": r"divergence_rows",
    "optimizer": r"adam|lpnorm",
    "copies and collectives": r"nccl|memcpy|chunk_cat|catarray|split_with_sizes|fsdp",
    "compiled element-wise": r"triton",
}


SGLANG = {"name": "sglang"}
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "forward_kl": ("full", {"name": "forward_kl"}, {}),
    "jsd": ("full", {"name": "jsd", "beta": 0.5}, {}),
    "adaptive_kl": ("full", {"name": "adaptive_kl"}, {}),
    "ragged": ("ragged", {"name": "forward_kl"}, {}),
    "no_compile": ("full", {"name": "forward_kl"}, {}),
    "sglang": ("full", {"name": "forward_kl"}, SGLANG),
    "sglang_fp8": ("full", {"name": "forward_kl"}, {**SGLANG, "quantization": "fp8"}),
}
# Data, β, and which share of a micro-batch's tokens TRL has memory for.
TRL = {"trl_full": ("full", 0.0, 1.0), "trl_ragged": ("ragged", 0.0, 1.0), "trl_jsd": ("full", 0.5, 0.5)}
# Runs whose speed is a share of another's.
SHARES = (("ragged", "forward_kl"), ("trl_ragged", "trl_full"), ("trl_full", "forward_kl"), ("trl_jsd", "jsd"),
          ("jsd", "forward_kl"), ("sglang", "forward_kl"),
          ("sglang_fp8", "forward_kl"))  # fmt: skip


def sizes(arguments: argparse.Namespace) -> tuple[str, str, int]:
    """Shapes of student and teacher, and tokens of a full sample."""
    return ("tiny", "tiny-wide", 32) if arguments.tiny else ("0.6B", "4B", 2048)


def longest(data: str, full: int) -> int:
    """Tokens of the longest sample."""
    return full if data == "full" else 2 * full


def make(arguments: argparse.Namespace) -> None:
    """Models and data, unless they are there."""
    directory, (student, teacher, full) = arguments.directory, sizes(arguments)
    for seed, (name, shape) in enumerate({"student": student, "teacher": teacher}.items()):
        make_model(directory / name, shape, seed)
    lengths: dict[str, Iterator[int]] = {"full": itertools.repeat(full), "ragged": ragged(2 * full)}
    for name, drawn in lengths.items():
        write_text(directory / f"{name}.jsonl", drawn, 16 * full * (arguments.steps + 1), vocabulary_size(student))


def make_run(name: str, arguments: argparse.Namespace, steps: int) -> dict[str, Any]:
    """The run file."""
    (data, algorithm, engine), full, directory = RUNS[name], sizes(arguments)[2], arguments.directory
    run = run_file(
        directory / "run", directory / "student", directory / "teacher", str(directory / f"{data}.jsonl"),
        length=longest(data, full), micro_batch=9 * full // 2, step=16 * full, steps=steps,
        compile=not arguments.tiny and name != "no_compile",
    )  # fmt: skip
    backend = arguments.attention_backend if torch.cuda.is_available() else None
    teacher = {**run["teacher"], **({"engine": {**engine, "attention_backend": backend}} if engine else {})}
    return {**run, "algorithm": algorithm, "teacher": teacher}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The plan, and what training took."""
    run = make_run(name, arguments, arguments.steps)
    file = arguments.directory / "run.yaml"
    file.write_text(yaml.safe_dump(run), encoding="utf-8")
    planned = check(file, arguments.overrides, (), 1)
    found = train(run, arguments.overrides)
    return {
        "peak_gib": found.pop("peak_bytes") / 2**30,
        **found,
        "planned_gib": planned["memory"]["bytes"]["total"] / 2**30,
    }


def measure_trl(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """TRL in this process: tokens a second, padding not counted."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    full, on_gpu = sizes(arguments)[2], torch.cuda.is_available()
    data_name, beta, part = TRL[name]
    most, directory = longest(data_name, full), arguments.directory
    batch = round(part * 4 * full) // most
    per_step = 16 * full // most // batch  # micro-batches
    tokenizer = AutoTokenizer.from_pretrained(directory / "student")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    lines = (directory / f"{data_name}.jsonl").read_text("utf-8").splitlines()[: 16 * full // most * arguments.steps]
    samples = [[tokenizer(text)["input_ids"] for text in json.loads(line).values()] for line in lines]
    counts: list[int] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pairs = [row["pair"] for row in rows]
        width, prompt = max(len(p) + len(r) + 1 for p, r in pairs), max(len(p) for p, _ in pairs)
        ids, labels = torch.zeros(len(pairs), width, dtype=torch.long), torch.full((len(pairs), width), -100)
        mask, prompts = torch.zeros_like(ids), torch.zeros(len(pairs), prompt, dtype=torch.long)
        for row, (asked, answer) in enumerate(pairs):
            whole = torch.tensor([*asked, *answer, tokenizer.eos_token_id])
            ids[row, -len(whole) :], mask[row, -len(whole) :] = whole, 1
            labels[row, width - len(answer) - 1 :] = whole[len(asked) :]
            prompts[row, -len(asked) :] = whole[: len(asked)]
        counts.append(int(mask.sum()))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "prompts": prompts,
                "prompt_attention_mask": (prompts != 0).long()}  # fmt: skip

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.told: list[dict[str, float]] = []

        def on_log(self, *_: Any, **told: Any) -> None:
            if "loss" in told["logs"]:
                self.told.append(told["logs"])

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    clock = Clock()
    models = [AutoModelForCausalLM.from_pretrained(directory / side, dtype=torch.bfloat16)
              for side in ("student", "teacher")]  # fmt: skip
    message = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = Dataset.from_dict({"pair": samples, "messages": [message] * len(samples)})
    settings = GKDConfig(
        output_dir=str(directory / "trl"), per_device_train_batch_size=batch,
        gradient_accumulation_steps=per_step, max_steps=arguments.steps, lmbda=0.0, beta=beta, logging_steps=1,
        bf16=on_gpu, use_cpu=not on_gpu, gradient_checkpointing=True,
        learning_rate=1e-5, report_to=[], save_strategy="no", optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
    )  # fmt: skip
    GKDTrainer(model=models[0], teacher_model=models[1], args=settings, train_dataset=data, callbacks=[clock],
               processing_class=tokenizer, data_collator=collate).train()  # fmt: skip
    tokens = [sum(counts[step * per_step : (step + 1) * per_step]) for step in range(arguments.steps)]
    seconds = [after - before for before, after in itertools.pairwise(clock.times)]
    first = min(WARM, len(seconds)) - 1
    return {
        "tokens_per_second": sum(tokens[first + 1 :]) / sum(seconds[first:]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "samples_to_a_micro_batch": batch, "tokens": tokens, "seconds": seconds,
        "losses": [logs["loss"] for logs in clock.told], "gradient_norms": [logs["grad_norm"] for logs in clock.told],
    }  # fmt: skip


def profile(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trace two steps of a run in this process."""
    from torch.profiler import ProfilerActivity, record_function

    from kdflow.ops import fused
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

    mark(Teacher, "_score_all", "teacher")
    mark(fused, "fused_parts", "head")
    mark(Student, "clip", "clip and optimizer")
    mark(Student, "step", "clip and optimizer")
    mark(Loop, "micro_batches", "data")
    tracer = torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    run = make_run(name, arguments, WARM + 4)  # the last step begins none after it
    shutil.rmtree(run["output"], ignore_errors=True)
    with tracing(tracer, WARM + 1, WARM + 3):
        kdflow.train(run, arguments.overrides)
    shutil.rmtree(run["output"])
    trace = arguments.directory / "trace.json"
    tracer.export_chrome_trace(str(trace))
    return table(json.loads(trace.read_text())["traceEvents"], steps=2)


def table(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Milliseconds a step of the device's work by region and kind, of its idle time, and of the longest kernels."""
    work = device_work(events)
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
    whole, gaps = span_and_gaps(work)
    copies = to_host(work)

    def per_step(found: Counter[str], most: int | None = None) -> dict[str, float]:
        return {name: round(microseconds / 1000 / steps, 3) for name, microseconds in found.most_common(most)}

    return {
        "milliseconds_a_step": whole / 1000 / steps,
        "idle_milliseconds_a_step": sum(gaps) / 1000 / steps,
        "longest_gaps_milliseconds": [round(gap / 1000, 3) for gap in sorted(gaps, reverse=True)[:12]],
        "copies_to_host_a_step": len(copies) / steps,
        "bytes_to_host_a_step": sum(int(event["args"]["bytes"]) for event in copies) / steps,
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
    parser.add_argument("--attention-backend", default="triton", help="SGLang's; it comes with torch")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    names = arguments.runs.split(",")
    if arguments.one == "make":
        make(arguments)
        return
    if arguments.one is not None:
        print(
            json.dumps(measure_trl(arguments.one, arguments) if arguments.one in TRL else profile(names[0], arguments))
        )
        return
    arguments.directory.mkdir(parents=True, exist_ok=True)
    again = [sys.executable, __file__, *sys.argv[1:], "--one"]
    subprocess.run([*again, "make"], check=True)

    def alone(what: str) -> dict[str, Any]:
        done = subprocess.run([*again, what], stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    results: dict[str, Any] = about(overrides=arguments.overrides)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        found = results[name] = alone(name) if name in TRL else measure(name, arguments)
        for one, other in SHARES:
            if name in (one, other) and {one, other} <= results.keys():
                share = results[one]["tokens_per_second"] / results[other]["tokens_per_second"]
                results[f"{one}_over_{other}"] = share
                print(f"{one}: {share:.1%} of the tokens/s of {other}")
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        shown = [f"{name}: {found['tokens_per_second']:,.0f} tokens/s, {found['peak_gib'] or 0:.1f} GiB"]
        shown += [f"{key} {found[key][0]:.4g} … {found[key][-1]:.4g}" for key in ("losses", "gradient_norms")]
        if name not in TRL:
            shown += [
                f"planned {found['planned_gib']:.1f}, {found['flops_utilisation']:.1%} of what the GPU could do",
                f"phases {found['phases']}", f"seconds to the first step {found['seconds_to_the_first_step']}",
            ]  # fmt: skip
        print("; ".join(shown), flush=True)
    if arguments.profile:
        found = results["profile"] = alone("profile")
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        for key, value in found.items():
            if key not in ("regions", "kernels"):
                print(f"{key}: {value}")
        for name, ms in found["regions"].items():
            print(f"{ms:10.2f} ms  {name}")
        for name, (ms, count) in found["kernels"].items():
            print(f"{ms:10.2f} ms {count:6d} × {name}")


if __name__ == "__main__":
    main()
