"""SGLang as a teacher on one GPU: prefill with hidden states leaving against prefill without, copies and bytes a row.

64 sequences of 1024 tokens in one call, Qwen3's shapes with random weights in bf16, each run in a process of its own:

``prefill``: in turns ``plain``, a `sglang.Engine` in this process with the arguments of kdflow's but its hook, whole
calls of ``generate`` without a new token, ``one_token``, the same with one, for which SGLang begins to decode another;
``nothing``, the requests of ``plain`` through kdflow's own engine, which exports nothing of them; and
`SGLangTeacher.score` with ``all`` tokens as targets, the second ``half`` of each sequence (what answers are), and every
second token, ``scattered``. Speeds are shares of that of ``plain``, or of ``nothing``. Rows are then compared with
those of transformers in bf16 (relative RMS).

``shared_memory``: the same without ``plain``, where the student's CUDA memory does not open: rows go through the host.

``bytes``: copies from device to host in one call, as the profilers of the engine's scheduler and of the student's
process count them, with rows through CUDA memory, and how long the device waits between the call's kernels; and stock
SGLang's ``return_hidden_states``, once. The engine's traces stay in DIRECTORY.

``kernels``: the same sequences as four micro-batches, scored together by SGLang and, compiled, by the teacher in the
student's process: seconds, and what the device did meanwhile. ``--sequences 16 --length 2048`` is a step of `steps.py`.

``fp8``: the answers' rows of an engine that holds its weights in 8 bits, beside one in bf16; how far its distributions
diverge from the other's, and the rows of both from transformers'.

    python benchmarks/sglang_teacher.py DIRECTORY [--out benchmarks/results/sglang-teacher.json] [--shapes 0.6B,4B]
        [--runs prefill,shared_memory,bytes,fp8,kernels] [--tiny]

On an H100 it takes 6 to 8 minutes: prefill 90 s and 150 s, the other runs, of the first shape alone, 60 to 80 s each;
an engine starts in about 30 s. DIRECTORY holds models and logs: 10 GB. ``--tiny`` is for a CPU: 5 minutes on
two busy cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import json
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from own_process import about, collect, found, in_turns, synchronize, timed
from random_models import make_model, vocabulary_size
from torch import Tensor
from workload import device_work, span_and_gaps, to_host

from kdflow.contracts import EngineContext, Options, Pair, TeacherEngine, TokenBatch, Tokens
from kdflow.data.packing import collate
from kdflow.engines.sglang import cuda_runtime, server
from kdflow.engines.sglang.options import SGLangOptions
from kdflow.engines.sglang.teacher import SGLangTeacher, SGLangTeacherOptions
from kdflow.engines.transformers.teacher import TransformersTeacher

NO_NEW_TOKEN = {"temperature": 0.0, "max_new_tokens": 0}
ONE_TOKEN = {"temperature": 0.0, "max_new_tokens": 1}
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
COMPARED = 3  # sequences whose rows are compared with transformers'
ROWS = 1024  # whose distributions are compared
_KERNELS = 20  # the longest, that are told
WARM = 2  # calls before those that count


class InProcess:
    """What `EngineProcess` is to a teacher, with the engine in this process, so that its profiler can be reached."""

    version, running = "in this process", True

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments

    def start(self) -> None:
        import sglang

        self.engine = sglang.Engine(**self._arguments)

    def ask(self, kind: str, *values: Any) -> Any:
        return server._ANSWERS[kind](self.engine, *values)

    def close(self) -> None:
        self.engine.shutdown()


@contextmanager
def memory_that_does_not_open() -> Iterator[None]:
    """The handles of the student's CUDA memory are no handles, as where processes may not share it."""
    allocate = cuda_runtime.allocate

    def wrong(size: int, device: torch.device) -> cuda_runtime.Allocation:
        made = allocate(size, device)
        made.handle = bytes(len(made.handle))
        return made

    with mock.patch.object(cuda_runtime, "allocate", wrong):
        yield


def batches(arguments: argparse.Namespace) -> dict[str, TokenBatch]:
    """The same tokens with different targets."""
    generator, length = np.random.default_rng(0), arguments.length
    ids = generator.integers(1, vocabulary_size(arguments.shape), (arguments.sequences, length))
    targets = {
        "all": np.arange(length - 1),
        "half": np.arange(length // 2, length - 1),
        "scattered": np.arange(0, length - 1, 2),
    }
    return {
        name: collate([Pair("", Tokens(one, chosen, np.zeros_like(chosen))) for one in ids], False).student.to(DEVICE)
        for name, chosen in targets.items()
    }  # fmt: skip


def load(arguments: argparse.Namespace, quantization: str | None = None) -> SGLangTeacher:
    """kdflow's engine, in its own process."""
    options = SGLangTeacherOptions(
        attention_backend=arguments.attention_backend, memory_fraction=arguments.memory_fraction,
        quantization=quantization,
    )  # fmt: skip
    context = EngineContext(DEVICE, torch.bfloat16, max_tokens=arguments.sequences * arguments.length)
    return SGLangTeacher(str(arguments.directory / arguments.shape), options, context)


def score(teacher: SGLangTeacher, batch: TokenBatch) -> None:
    """Until the rows are there; they are given back."""
    teacher.score(batch).release()


def of_kdflow(teacher: SGLangTeacher, made: dict[str, TokenBatch]) -> dict[str, Callable[[], Any]]:
    """Calls of kdflow's engine: with all kinds of targets, and with requests that are not for its hook."""
    # The other calls write the same ids to the same place.
    ids = [one.ids for one in teacher._rows.expect(0, list(made["all"].on_host.sequences()))]
    rids = [f"plain-{number}" for number in range(len(ids))]
    calls: dict[str, Callable[[], Any]] = {"nothing": lambda: teacher._engine.ask("prefill", ids, rids)}
    for name, batch in made.items():
        calls[name] = functools.partial(score, teacher, batch)
    return calls


def figures(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Medians, and speeds as shares of those without hidden states."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": seconds,
        "median_seconds": medians,
        "tokens_per_second": {name: tokens / value for name, value in medians.items()},
        **{
            f"speed_over_{base}": {name: medians[base] / value for name, value in medians.items()}
            for base in ("plain", "nothing")
            if base in medians
        },
    }


def in_the_engine(
    teacher: SGLangTeacher, calls: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of calls in turns, and the medians of those parts in which kdflow's engine was asked."""
    ask, asked = teacher._engine.ask, 0.0
    parts: dict[str, list[float]] = {name: [] for name in calls}

    def timing(*message: Any) -> Any:
        nonlocal asked
        started = time.perf_counter()
        answer = ask(*message)
        asked += time.perf_counter() - started
        return answer

    def watched(name: str) -> float:
        nonlocal asked
        asked = 0.0
        took = timed(calls[name])()
        parts[name].append(asked)
        return took

    with mock.patch.object(teacher._engine, "ask", timing):
        seconds = in_turns({name: functools.partial(watched, name) for name in calls}, rounds, warm=WARM)
    return seconds, {name: statistics.median(found[WARM:]) for name, found in parts.items()}


def transport(teacher: SGLangTeacher) -> dict[str, Any]:
    told = teacher.transport
    return {"transport": told.name, "copies_per_row": told.copies_per_row, "bytes_per_row": told.bytes_per_row,
            "why_not_cuda": teacher._slots.host.message}  # fmt: skip


@torch.no_grad()
def relative_rms(teacher: SGLangTeacher, batch: TokenBatch) -> list[float]:
    """Of the rows of some sequences against transformers' in bf16."""
    from transformers import AutoModelForCausalLM

    lease = teacher.score(batch)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(teacher.model, dtype=torch.bfloat16).to(DEVICE)
    differences, first = list[float](), 0
    for number, (ids, targets) in enumerate(batch.on_host.sequences()):
        rows = lease.rows[first : first + len(targets)].float()
        first += len(targets)
        if number % (len(batch.cu_seqlens) // COMPARED) == 0:
            states: Tensor = model.model(torch.from_numpy(ids)[None].to(DEVICE)).last_hidden_state[0]
            expected = states[torch.from_numpy(targets).to(DEVICE)].float()
            differences.append(float((rows - expected).norm() / expected.norm()))
    lease.release()
    return differences


@torch.no_grad()
def divergence(teacher: SGLangTeacher, other: SGLangTeacher, batch: TokenBatch) -> float:
    """Kullback-Leibler divergence of another's next-token distributions from a teacher's, in nats a token."""
    leases = [engine.score(batch) for engine in (teacher, other)]
    ours, theirs = (
        engine.head.logits(lease.rows[:ROWS]).float().log_softmax(-1)
        for engine, lease in zip((teacher, other), leases, strict=True)
    )
    for lease in leases:
        lease.release()
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def fp8(arguments: argparse.Namespace) -> dict[str, Any]:
    """An engine that holds and multiplies its weights in 8 bits, beside one in bf16."""
    teachers, made = {"bf16": load(arguments), "fp8": load(arguments, "fp8")}, batches(arguments)
    calls = {name: timed(functools.partial(score, one, made["half"])) for name, one in teachers.items()}
    seconds = in_turns(calls, arguments.rounds, warm=WARM)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "seconds": seconds,
        "tokens_per_second": {name: arguments.sequences * arguments.length / one for name, one in medians.items()},
        "speed_over_bf16": medians["bf16"] / medians["fp8"],
        "divergence": divergence(teachers["bf16"], teachers["fp8"], made["all"]),
        "relative_rms": {name: relative_rms(one, made["all"]) for name, one in teachers.items()},
    }
    for teacher in teachers.values():
        teacher.close()
    return result


def prefill(arguments: argparse.Namespace) -> dict[str, Any]:
    """kdflow's engine and a plain one in turns."""
    import sglang

    started = time.perf_counter()
    teacher = load(arguments)
    start = time.perf_counter() - started
    plain_arguments = dict(teacher._arguments(teacher.model, teacher.options))
    del plain_arguments["forward_hooks"]
    plain = sglang.Engine(**plain_arguments)
    made = batches(arguments)
    ids = [one.tolist() for one, _ in made["all"].on_host.sequences()]
    calls = {
        "plain": lambda: plain.generate(input_ids=ids, sampling_params=NO_NEW_TOKEN),
        "one_token": lambda: plain.generate(input_ids=ids, sampling_params=ONE_TOKEN),
        **of_kdflow(teacher, made),
    }
    seconds, parts = in_the_engine(teacher, calls, arguments.rounds)
    result = {
        **figures(seconds, arguments.sequences * arguments.length), **transport(teacher),
        "start_seconds": start, "median_seconds_in_the_engine": parts,
        "relative_rms": relative_rms(teacher, made["all"]),
    }  # fmt: skip
    teacher.close()
    return result


def shared_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows through host memory."""
    with memory_that_does_not_open():
        teacher = load(arguments)
    made = batches(arguments)
    seconds = in_turns({n: timed(call) for n, call in of_kdflow(teacher, made).items()}, arguments.rounds, warm=WARM)
    result = {
        **figures(seconds, arguments.sequences * arguments.length), **transport(teacher),
        "relative_rms": relative_rms(teacher, made["all"]),
    }  # fmt: skip
    teacher.close()
    return result


def of_trace(traces: Path) -> dict[str, Any]:
    """Copies to the host and their bytes in all traces of a folder; milliseconds of the device, without work, and of
    the longest kernels."""
    events: list[dict[str, Any]] = []
    for file in traces.glob("*.json*"):
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        events += json.loads(text)["traceEvents"]
    work = device_work(events)
    copies, (span, gaps) = to_host(work), span_and_gaps(work)
    kernels: Counter[str] = Counter()
    for event in work:
        kernels[event["name"][:100]] += event["dur"]
    return {
        "copies": len(copies), "bytes": sum(int(event["args"]["bytes"]) for event in copies),
        "device_ms": span / 1000, "idle_ms": sum(gaps) / 1000,
        "kernels_ms": {name: round(took / 1000, 3) for name, took in kernels.most_common(_KERNELS)},
    }  # fmt: skip


def profiled(engine: Any, call: Callable[[], Any], kept: Path) -> dict[str, dict[str, Any]]:
    """What goes from device to host during a call, in the engine's process and in this one."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    with tempfile.TemporaryDirectory() as ours:
        engine.start_profile(output_dir=str(kept), activities=["CPU", "GPU"], with_stack=False, record_shapes=False)
        with torch.profiler.profile(activities=activities) as profile:
            call()
            synchronize()
        engine.stop_profile()
        if not list(kept.iterdir()):
            raise RuntimeError("the engine's profiler left no trace")
        profile.export_chrome_trace(str(Path(ours, "trace.json")))
        return {"engine": of_trace(kept), "student": of_trace(Path(ours))}


def load_in_process(arguments: argparse.Namespace) -> tuple[SGLangTeacher, Any]:
    """kdflow's engine whose part is played in this process, and SGLang's engine."""

    def process(_: SGLangOptions, values: dict[str, Any], context: EngineContext) -> InProcess:
        return InProcess({**values, "enable_return_hidden_states": True})

    with mock.patch.object(SGLangOptions, "process", process):
        teacher = load(arguments)
    engine: Any = teacher._engine
    return teacher, engine.engine


def count_bytes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes from device to host, and the stock way."""
    teacher, engine = load_in_process(arguments)
    made, result = batches(arguments), transport(teacher)
    calls = of_kdflow(teacher, made)
    for name in ("nothing", "all", "half", "scattered"):
        calls[name]()
        found_bytes = profiled(engine, calls[name], arguments.directory / f"trace-{name}")
        rows = len(made[name].targets) * teacher.transport.bytes_per_row if name in made else 0
        copied = sum(side["bytes"] for side in found_bytes.values())
        result[name] = {**found_bytes, "bytes": copied, "bytes_of_rows": rows, "share": copied / rows if rows else None}
    ids = [one.tolist() for one, _ in made["all"].on_host.sequences()]
    stock = timed(lambda: engine.generate(input_ids=ids, sampling_params=ONE_TOKEN, return_hidden_states=True))
    result["stock_seconds"] = stock()
    result["nothing_seconds"] = statistics.median(timed(calls["nothing"])() for _ in range(3))
    result["stock_speed_over_nothing"] = result["nothing_seconds"] / result["stock_seconds"]
    teacher.close()
    return result


def kernels(arguments: argparse.Namespace) -> dict[str, Any]:
    """Four micro-batches through SGLang, and through the teacher in this process."""
    arguments.sequences //= 4
    teacher, engine = load_in_process(arguments)
    micro_batches = [batches(arguments)["half"]] * 4
    own = TransformersTeacher(teacher.model, Options(), dataclasses.replace(teacher.context, compile=True))
    result: dict[str, Any] = {}
    for name, one in {"sglang": teacher, "in_process": own}.items():

        def score_all(one: TeacherEngine = one) -> None:
            for lease in one.score_all(micro_batches):
                lease.release()
            synchronize()

        seconds = in_turns({name: timed(score_all)}, arguments.rounds, warm=WARM)[name]
        sides = profiled(engine, score_all, arguments.directory / f"trace-{name}")
        result[name] = {"median_seconds": statistics.median(seconds), **sides}
    teacher.close()
    return result


RUNS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "prefill": prefill,
    "shared_memory": shared_memory,
    "bytes": count_bytes,
    "fp8": fp8,
    "kernels": kernels,
}


def main() -> None:
    """Run after run in a process of its own, and print and keep what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sglang-teacher.json"))
    parser.add_argument("--shapes", default="0.6B,4B")
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--attention-backend", default="triton", help="SGLang's; it comes with torch")
    parser.add_argument("--memory-fraction", type=float, default=0.5)
    parser.add_argument("--tiny", action="store_true", help="small models and few tokens, for a CPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shapes, arguments.sequences, arguments.length, arguments.rounds = "tiny", 8, 64, 3
        arguments.memory_fraction = 0.1
    if DEVICE.type == "cpu":
        arguments.attention_backend = None
    shapes = arguments.shapes.split(",")
    if arguments.one:
        kind, _, arguments.shape = arguments.one.partition("-")
        if kind == "make":
            make_model(arguments.directory / arguments.shape, arguments.shape)
            result = {}
        else:
            result = RUNS[kind](arguments)
        found(arguments.one, arguments.directory, result)
        return
    results = about(sequences=arguments.sequences, length=arguments.length, attention=arguments.attention_backend)
    names = [
        f"{kind}-{shape}"
        for kind in ("make", *arguments.runs.split(","))
        for shape in (shapes if kind in ("make", "prefill", "fp8", "kernels") else shapes[:1])
    ]
    collect(names, arguments.directory, 300, arguments.out, results)


if __name__ == "__main__":
    main()
