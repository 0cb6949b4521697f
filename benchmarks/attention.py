"""Attention over packed samples on a GPU, torch's own and FlashAttention 3's or 4's, forward and backward, in turns.

Qwen3's shapes, 128 numbers a head, 8 heads of keys: the student's 16 heads of queries and the teacher's 32; 8192 tokens
in bf16, as four samples of 2048 (``full``) and with the log-normal lengths of ``steps.py`` (``ragged``). TFLOP/s count
the visible half of the scores; errors are those of output and gradients beside torch's in fp32, as shares of the norm.

    python benchmarks/attention.py [--out benchmarks/results/attention.json]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from own_process import about, in_turns, keep, timed
from torch import Tensor, nn
from workload import ragged

from kdflow.models import attention
from kdflow.models.attention import packed_attention
from kdflow.models.flash import has_flash

TOKENS, SIZE, KEYS = 8192, 128, 8
CALLS = 8  # at a time, so that launching them costs little beside


def ragged_lengths() -> list[int]:
    """Of one micro-batch."""
    lengths, left = list[int](), TOKENS
    for length in ragged():
        lengths.append(min(length, left))
        left -= lengths[-1]
        if not left:
            return lengths
    raise AssertionError("unreachable")


def attend(name: str, inputs: list[Tensor], bounds: Tensor, longest: int) -> Tensor:
    """By ``flash`` or ``torch``."""
    query, key, value = inputs
    with mock.patch.object(attention, "has_flash", return_value=name == "flash"):
        return packed_attention(nn.Module(), query, key, value, None, cu_seqlens=bounds, longest=longest)[0]


def measure(heads: int, lengths: list[int], rounds: int) -> dict[str, Any]:
    """One shape."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = [
        torch.randn(1, TOKENS, count, SIZE, device="cuda", generator=generator) for count in (heads, KEYS, KEYS, heads)
    ]
    *inputs, weight = (x.bfloat16().transpose(1, 2) for x in made)
    weight = weight.transpose(1, 2)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    longest = max(lengths)
    exact_inputs = [x.float().detach().requires_grad_() for x in inputs]
    output = attend("torch", exact_inputs, bounds, longest)
    exact = [output.detach(), *torch.autograd.grad((output * weight.float()).sum(), exact_inputs)]
    flops = 2 * 2 * heads * SIZE * sum(length * length / 2 for length in lengths)
    runs: dict[str, Callable[[], float]] = {}
    found: dict[str, Any] = {name: {} for name in ("torch", *(("flash",) if has_flash(SIZE) else ()))}
    for name in found:
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = attend(name, leaves, bounds, longest)
        results = [output.detach(), *torch.autograd.grad(output, leaves, weight, retain_graph=True)]
        found[name]["errors"] = [float((x.float() - y).norm() / y.norm()) for x, y in zip(results, exact, strict=True)]

        def forward(name: str = name) -> None:
            with torch.no_grad():
                for _ in range(CALLS):
                    attend(name, inputs, bounds, longest)

        def backward(output: Tensor = output, leaves: list[Tensor] = leaves) -> None:
            for _ in range(CALLS):
                torch.autograd.grad(output, leaves, weight, retain_graph=True)

        runs |= {f"{name} forward": timed(forward), f"{name} backward": timed(backward)}
    seconds = in_turns(runs, rounds, warm=2)
    for run, values in seconds.items():
        name, direction = run.split()
        one = statistics.median(values) / CALLS
        found[name][direction] = {
            "ms": 1000 * one,
            "tflops": flops * (2.5 if direction == "backward" else 1) / one / 1e12,
        }
    return {"samples": len(lengths), "longest": longest, **found}


def main() -> None:
    """Shape after shape, and print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention.json"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    results = about(tokens=TOKENS)
    for side, heads in {"student": 16, "teacher": 32}.items():
        for data, lengths in {"full": [2048] * (TOKENS // 2048), "ragged": ragged_lengths()}.items():
            told = results[f"{side}, {data}"] = measure(heads, lengths, arguments.rounds)
            keep(arguments.out, results)
            for name in ("torch", "flash"):
                if name in told:
                    ways = ", ".join(
                        f"{way} {told[name][way]['ms']:.3f} ms ({told[name][way]['tflops']:.0f} TFLOP/s)"
                        for way in ("forward", "backward")
                    )
                    print(
                        f"{side}, {data}: {name}: {ways}; errors {' '.join(f'{e:.1e}' for e in told[name]['errors'])}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
