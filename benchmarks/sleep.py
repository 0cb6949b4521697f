"""Engines that sleep while the student learns: seconds to fall asleep and to wake, and what each gives back.

Qwen3's shapes with random weights in bf16; each engine in a process of its own, alone on the device. ``rollout`` writes
16 responses of 32 tokens, ``teacher`` scores 8 × 1024 tokens; ``same`` says whether what it does after it woke is what
it did before, token by token or bit by bit.

    python benchmarks/sleep.py DIRECTORY [--out benchmarks/results/sleep.json] [--shapes 0.6B,4B]
        [--engines sglang,transformers] [--tiny]

An engine of SGLang takes about a minute, most of it to start. ``--tiny`` is for a CPU, where transformers' sleep alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from own_process import about, collect, found
from random_models import make_model, vocabulary_size

from kdflow.contracts import EngineContext, Pair, Sampling, Tokens
from kdflow.data.packing import collate
from kdflow.plugins import load
from kdflow.runtime.turns import rest, wake
from kdflow.validation import validate_options

SEQUENCES, LENGTH = 8, 1024


def free() -> int:
    """Bytes of the device that no process has."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def turns(arguments: argparse.Namespace, name: str, use: str, shape: str) -> dict[str, Any]:
    """Of one engine, in this process."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    length = 64 if arguments.tiny else LENGTH
    ids = np.random.default_rng(0).integers(1, vocabulary_size(shape), (2 * SEQUENCES, length))
    places = np.arange(length - 1)
    pairs = [Pair("", Tokens(one, places, np.zeros_like(places))) for one in ids[:SEQUENCES]]
    batch = collate(pairs, False).to(device).student
    cls = load().find(name, f"{use} engine").cls
    chosen = {} if name == "transformers" else {"attention_backend": arguments.attention_backend}
    options = validate_options(cls.Options, chosen, name)
    context = EngineContext(device, torch.bfloat16, max_tokens=SEQUENCES * length, sleeps=True)
    engine = cls(str(arguments.directory / shape), options, context)

    def work() -> Any:
        if use == "rollout":
            return [one.ids for one in engine.generate(ids[:, :64].tolist(), Sampling(32, temperature=0))]
        lease = engine.score(batch)
        rows = lease.rows.clone()
        lease.release()
        return rows

    before, asleep, awake, given = work(), list[float](), list[float](), list[float]()
    for _ in range(arguments.rounds):
        had = free()
        started = time.perf_counter()
        rest(engine)
        asleep.append(time.perf_counter() - started)
        given.append((free() - had) / 2**30)
        started = time.perf_counter()
        wake(engine)
        awake.append(time.perf_counter() - started)
    after = work()
    same = bool(torch.equal(before, after)) if isinstance(before, torch.Tensor) else before == after
    engine.close()
    return {
        "sleep_seconds": statistics.median(asleep), "wake_seconds": statistics.median(awake),
        "gib_given_back": statistics.median(given), "same": same, "all": {"sleep": asleep, "wake": awake},
    }  # fmt: skip


def main() -> None:
    """Engine after engine, and print and keep what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sleep.json"))
    parser.add_argument(
        "--shapes", default="0.6B,4B", help="of what writes, and of the teacher; nothing leaves one out"
    )
    parser.add_argument("--engines", default="sglang,transformers")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--attention-backend", default="triton", help="SGLang's; it comes with torch")
    parser.add_argument("--tiny", action="store_true", help="small models, for a CPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shapes, arguments.engines, arguments.rounds = "tiny,tiny-wide", "transformers", 2
    if arguments.one:
        kind, _, shape = arguments.one.partition("-")
        if kind == "make":
            make_model(arguments.directory / shape, shape)
            found(arguments.one, arguments.directory, {})
        else:
            name, use = kind.split("+")
            found(arguments.one, arguments.directory, turns(arguments, name, use, shape))
        return
    names = []
    for use, shape in zip(("rollout", "teacher"), arguments.shapes.split(","), strict=True):
        kinds = ("make", *(f"{name}+{use}" for name in arguments.engines.split(",")))
        names += [f"{kind}-{shape}" for kind in kinds if shape]
    collect(names, arguments.directory, 240, arguments.out, about())


if __name__ == "__main__":
    main()
