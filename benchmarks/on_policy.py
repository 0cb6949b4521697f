"""Whole on-policy steps on one GPU: every response written by the student, `kdflow train` beside TRL's trainer.

The setting of the measured peers: Qwen3's shapes, 0.6B learns from 4B, random weights, bf16 compute with fp32 master
weights, JSD with β = 0.5; prompts of 256 tokens, 256 sampled tokens each, 16 or 128 prompts a step. Random models
hardly ever draw an end: ``mean_response`` tells how long responses were. Each system in a process of its own:

``ROLLOUT+TEACHER``: `kdflow train` with a run file and these two engines; micro-batches of 8192 tokens, compiled
    blocks. Medians over the steps after the third; ``phases`` are shares of a step; memory is that of the student's
    process, and that of the whole device where nvidia-smi tells it.
``trl``: TRL's stable DistillationTrainer in the same visit, where trl is installed; micro-batches of 16, which were its
    fastest, gradient checkpointing.
``sampling``: the same requests alone, in turns: a plain `sglang.Engine` in this process (``plain``; with the
    log-probabilities that training needs, ``plain_logprobs``) and kdflow's rollout engine (``kdflow``).

    python benchmarks/on_policy.py DIRECTORY [--out benchmarks/results/on-policy.json] [--prompts 16,128]
        [--systems sglang+sglang,sglang+transformers,transformers+transformers,trl,sampling] [--tiny] [KEY=VALUE]...

On an H100, with starts of engines (35 s each) and compiling (25 s): sglang+sglang 130 s, sglang+transformers 100 s,
transformers+transformers 140 s with 16 prompts and 250 s with 128, trl 60 s and 80 s, sampling 100 s in all, and a
minute for models: 17 minutes altogether, two calls of at most 10. The file of results keeps what another call has found
of systems that are not in ``--systems``. DIRECTORY holds models, runs and logs: 20 GB. ``--tiny`` is for a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from own_process import about, found, in_turns, keep, measure, run, show
from random_models import make_model, vocabulary_size, words

WARM = 3
LIMIT = 420.0
SYSTEMS = "sglang+sglang,sglang+transformers,transformers+transformers,trl,sampling"


class Setting:
    """Sizes; those for a CPU are small."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        tiny = arguments.tiny
        self.directory: Path = arguments.directory
        self.shapes = {"student": "tiny", "teacher": "tiny-wide"} if tiny else {"student": "0.6B", "teacher": "4B"}
        self.prompt, self.new = (16, 16) if tiny else (256, 256)
        self.micro_batch = 4 if tiny else 16  # sequences of kdflow's and of TRL's
        self.attention: str | None = arguments.attention_backend
        self.steps: int = arguments.steps

    def model(self, side: str) -> Path:
        return self.directory / self.shapes[side]

    def prompts(self, count: int, seed: int = 0) -> list[str]:
        """Texts of ``prompt`` tokens."""
        draw, vocabulary = random.Random(seed), words(vocabulary_size(self.shapes["student"]))
        return [" " + " ".join(draw.choices(vocabulary, k=self.prompt)) for _ in range(count)]

    def engine(self, name: str, **options: Any) -> dict[str, Any]:
        """A section ``engine``."""
        return {"name": name, "attention_backend": self.attention, **options} if name == "sglang" else {"name": name}

    def cache_tokens(self, prompts: int) -> int:
        """Twice what they come to: SGLang lets as many run at a time as it thinks fit."""
        return 2 * prompts * (self.prompt + self.new)

    def run_file(self, system: str, prompts: int) -> dict[str, Any]:
        """The run file; the response of a record fills a sample up to ``prompt + new`` tokens, and is never used."""
        rollout, teacher = system.split("+")
        length = self.prompt + self.new
        records = [
            {"prompt": text, "response": " " + " ".join(["a"] * (self.new - 1))}
            for text in self.prompts(prompts * self.steps)
        ]
        data = self.directory / f"prompts-{prompts}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return {
            "student": {"model": str(self.model("student"))},
            "teacher": {"model": str(self.model("teacher")), "engine": self.engine(teacher, memory_fraction=0.4)},
            "algorithm": {"name": "jsd", "beta": 0.5},
            "rollout": {
                "fraction": 1.0,
                "max_new_tokens": self.new,
                "temperature": 1.0,
                "engine": self.engine(rollout, cache_tokens=self.cache_tokens(prompts)),
            },
            "data": {
                "train": [{"path": str(data), "format": "prompt_response"}],
                "max_length": length,
                "max_tokens": self.micro_batch * length,
            },
            "training": {
                "steps": self.steps, "tokens_per_step": prompts * length, "learning_rate": 1e-5,
                "compile": torch.cuda.is_available(), "checkpoint_every": None, "evaluate_every": None,
            },
            "output": str(self.directory / "run"),
        }  # fmt: skip


@contextmanager
def device_memory() -> Iterator[dict[str, float]]:
    """The most memory of the device that was in use during the block, in GiB, all processes together."""
    told: dict[str, float] = {}
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=200"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        yield told
        return

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError):
                told["device_gib"] = max(told.get("device_gib", 0.0), float(line) / 1024)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield told
    finally:
        process.kill()
        thread.join()
        process.wait()


def kdflow(system: str, prompts: int, setting: Setting, overrides: list[str]) -> dict[str, Any]:
    """Train through the command line, and read what the run left behind."""
    output = setting.directory / "run"
    shutil.rmtree(output, ignore_errors=True)
    file = setting.directory / f"{system}-{prompts}.yaml"
    file.write_text(yaml.safe_dump(setting.run_file(system, prompts)), encoding="utf-8")
    started = time.perf_counter()
    with device_memory() as told:
        failed = run([sys.executable, "-m", "kdflow", "train", str(file), *overrides], file.with_suffix(".log"), LIMIT)
    wall = time.perf_counter() - started
    if failed is not None:
        return {"failed": failed}
    summary = json.loads((output / "summary.json").read_text("utf-8"))
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    shutil.rmtree(output)
    every = [event for event in events if event["event"] == "step"]
    (ready,) = (event for event in events if event["event"] == "ready")
    steady = every[WARM:]
    seconds = statistics.median(event["seconds"] for event in steady)
    phases = {
        name: statistics.median(event["phases"][name] / event["seconds"] for event in steady)
        for name in every[0]["phases"]
    }
    return {
        "seconds_a_step": seconds,
        "tokens_per_second": statistics.median(event["tokens"] / event["seconds"] for event in steady),
        "phases": phases,
        "phase_seconds": {name: share * seconds for name, share in phases.items()},
        "mean_response": sum(event["rollout_tokens"] for event in steady) / sum(event["rollouts"] for event in steady),
        "rollout_gap": statistics.median(event["rollout_gap"] for event in steady),
        "peak_gib": summary["peak_memory_bytes"] / 2**30,
        **told,
        "losses": [event["loss"] for event in every],
        "gradient_norms": [event["grad_norm"] for event in every],
        "steps_seconds": [event["seconds"] for event in every],
        "wall_seconds": wall,
        "start_seconds": {**ready["parts"], "first step": every[0]["seconds"]},
    }


def trl(prompts: int, setting: Setting) -> dict[str, Any]:
    """TRL's trainer in this process."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

        on_train_end = on_step_begin

    device = "cuda" if torch.cuda.is_available() else "cpu"
    auto: Any = AutoModelForCausalLM
    student, teacher = (
        auto.from_pretrained(setting.model(side), dtype=torch.bfloat16, attn_implementation="sdpa").to(device)
        for side in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(setting.model("student"), padding_side="left")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    steps, micro = 4, min(setting.micro_batch, prompts)
    config = DistillationConfig(
        output_dir=str(setting.directory / "trl"), per_device_train_batch_size=micro,
        gradient_accumulation_steps=prompts // micro, max_steps=steps, max_completion_length=setting.new, beta=0.5,
        temperature=1.0, generation_kwargs={"min_new_tokens": setting.new}, bf16=True, gradient_checkpointing=True,
        learning_rate=1e-5, optim="adamw_torch_fused", report_to=[], logging_steps=1, save_strategy="no",
        use_cpu=device == "cpu",
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=config, callbacks=[Clock()], processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": setting.prompts(prompts * steps)}),
    )  # fmt: skip
    with device_memory() as told:
        trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(moments)]
    median = statistics.median(seconds[1:])
    history = trainer.state.log_history
    lengths = [logged["completions/mean_length"] for logged in history if "completions/mean_length" in logged]
    return {
        "seconds_a_step": median,
        "tokens_per_second": prompts * (setting.prompt + statistics.mean(lengths)) / median,
        "mean_response": statistics.mean(lengths),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        **told,
        "losses": [logged["loss"] for logged in history if "loss" in logged],
        "gradient_norms": [logged["grad_norm"] for logged in history if "grad_norm" in logged],
        "steps_seconds": seconds,
    }


def sampling(counts: list[int], setting: Setting, rounds: int) -> dict[str, Any]:
    """A plain engine and kdflow's in turns, on the same prompts."""
    import sglang
    from transformers import AutoTokenizer

    from kdflow.contracts import EngineContext, Sampling
    from kdflow.engines.sglang.rollout import SGLangRollout, SGLangRolloutOptions

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    context, model = EngineContext(device, torch.bfloat16), str(setting.model("student"))
    options = SGLangRolloutOptions(
        attention_backend=setting.attention, memory_fraction=0.4, cache_tokens=setting.cache_tokens(max(counts))
    )
    started = time.perf_counter()
    engine = SGLangRollout(model, options, context)
    start = time.perf_counter() - started
    plain = sglang.Engine(**engine._engine._arguments)
    tokenizer = AutoTokenizer.from_pretrained(model)
    parameters = {"temperature": 1.0, "max_new_tokens": setting.new, "ignore_eos": True}
    wanted, result = Sampling(max_new_tokens=setting.new), dict[str, Any](start_seconds=start)
    for count in counts:
        serial = iter(range(10**6))

        def ids(count: int = count, serial: Iterator[int] = serial) -> list[list[int]]:
            # Other prompts each time: nothing of them is in a cache.
            found: list[list[int]] = tokenizer(setting.prompts(count, seed=1 + next(serial)))["input_ids"]
            return found

        def timed(with_logprobs: bool | None, ids: Any = ids) -> float:
            prompts = ids()
            started = time.perf_counter()
            if with_logprobs is None:
                engine.generate(prompts, wanted)
            else:
                plain.generate(input_ids=prompts, sampling_params=parameters, return_logprob=with_logprobs)
            return time.perf_counter() - started

        calls = {"plain": lambda: timed(False), "plain_logprobs": lambda: timed(True), "kdflow": lambda: timed(None)}
        seconds = in_turns(calls, rounds)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        result[str(count)] = {
            "median_seconds": medians,
            "speed_over_plain": {name: medians["plain"] / value for name, value in medians.items()},
            "all_seconds": seconds,
        }
    engine.close()
    return result


def one(name: str, arguments: argparse.Namespace, setting: Setting, counts: list[int]) -> dict[str, Any]:
    """What ``--one`` names, in this process."""
    system, _, prompts = name.partition("-")
    if system == "make":
        for seed, shape in enumerate(setting.shapes.values()):
            make_model(setting.directory / shape, shape, seed)
        return {}
    if system == "trl":
        return trl(int(prompts), setting)
    return sampling(counts, setting, arguments.rounds)


def main() -> None:
    """System after system, and print and keep what they did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("overrides", nargs="*", help="of kdflow's run file, such as training.head_chunk=4096")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/on-policy.json"))
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--prompts", default="16,128", help="a step")
    parser.add_argument("--steps", type=int, default=9, help=f"of kdflow; the first {WARM} are left out")
    parser.add_argument("--rounds", type=int, default=5, help="of sampling alone")
    parser.add_argument("--attention-backend", default="triton", help="SGLang's; it comes with torch")
    parser.add_argument("--tiny", action="store_true", help="small models and few tokens, for a CPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.tiny:
        arguments.prompts, arguments.steps, arguments.rounds = "4,8", 4, 2
    if not torch.cuda.is_available():
        arguments.attention_backend = None
    setting, counts = Setting(arguments), [int(count) for count in arguments.prompts.split(",")]
    if arguments.one:
        found(arguments.one, setting.directory, one(arguments.one, arguments, setting, counts))
        return
    before = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    results = {**before, **about(overrides=arguments.overrides, steps=arguments.steps)}
    if "failed" in (made := measure("make", setting.directory, LIMIT)):
        sys.exit(made["failed"])
    systems = arguments.systems.split(",")
    if "trl" in systems and importlib.util.find_spec("trl") is None:
        print("trl is not installed, and left out")
        systems.remove("trl")
    for system in systems:
        for prompts in counts if system != "sampling" else (None,):
            name = system if prompts is None else f"{system}-{prompts}"
            if "+" in system:
                told = kdflow(system, prompts or 0, setting, arguments.overrides)
            else:
                told = measure(name, setting.directory, LIMIT)
            results[name] = told
            keep(arguments.out, results)
            show(name, told)
    for prompts in counts:
        rival = results.get(f"trl-{prompts}", {}).get("seconds_a_step")
        for system in systems:
            ours = results.get(f"{system}-{prompts}", {}).get("seconds_a_step")
            if rival and ours and system != "trl":
                print(
                    f"{prompts} prompts: {system} is {rival / ours:.2f} × as fast as TRL ({rival:.3f} / {ours:.3f} s)"
                )


if __name__ == "__main__":
    main()
