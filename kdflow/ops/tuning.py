"""Block sizes of Triton's kernel: the fastest of a few, measured once on a machine and kept in kdflow's cache.

Sums in another order end in other last bits. What is kept lets a run that is resumed, and every rank, go on with the
blocks that the machine's first one chose; others are chosen only where they are plainly faster.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdflow.cache import cache_folder
from kdflow.contracts import KdflowError
from kdflow.files import aside

_log = logging.getLogger("kdflow")


class Blocks(NamedTuple):
    """How a kernel divides a row.

    Attributes:
        lanes: of a block; each takes 8 columns.
        warps: of a program.
    """

    lanes: int
    warps: int


# The first are taken where nothing is measured. Larger ones find more of what a row read last still in the cache.
CANDIDATES: tuple[Blocks, ...] = (Blocks(256, 8), Blocks(512, 16), Blocks(1024, 16), Blocks(2048, 32))
# Logits of fewer elements are done before a measurement would pay.
_WORTHWHILE = 2**27
_ROUNDS = 9
# Of the first ones' time, which others must not exceed: two measurements of the same differ by less than the rest.
_PLAINLY_FASTER = 0.98

chosen: dict[str, Blocks] = {}  # by this process, for each key


def fastest(key: Mapping[str, Any], elements: int, run: Callable[[Blocks], object]) -> Blocks:
    """The blocks for a kernel: the fastest, as this machine found them to be when it first measured them, maybe now.

    Args:
        key: what the kernel is compiled for; plain data.
        elements: of the logits that it is run on.
        run: queues on the current CUDA stream the kernel and what is around it in a step, with which it shares clocks
            and cache.
    """
    if elements < _WORTHWHILE or len(CANDIDATES) == 1:
        return CANDIDATES[0]
    told = json.dumps({**key, **_machine(torch.cuda.current_device()), "candidates": CANDIDATES}, sort_keys=True)
    if told not in chosen:
        try:
            path = cache_folder("kernels") / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"
            chosen[told] = read(path) or keep(path, told, measure(run))
        except (OSError, KdflowError) as error:  # a run that is resumed could not know what this one has chosen
            _log.warning(f"the kernel's block sizes are not tuned, since what is chosen cannot be kept: {error}")
            chosen[told] = CANDIDATES[0]
    return chosen[told]


@functools.cache
def _machine(device: int) -> dict[str, str]:
    import triton

    return {"gpu": torch.cuda.get_device_name(device), "triton": triton.__version__}


def measure(run: Callable[[Blocks], object]) -> dict[Blocks, float]:
    """Milliseconds with each of the candidates that the GPU can run, in turns; medians."""
    from triton.errors import TritonError

    events: dict[Blocks, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
    for blocks in CANDIDATES:
        with contextlib.suppress(TritonError):  # such as too many warps; the first ones fail where they are used
            run(blocks)  # which compiles
            events[blocks] = []
    for _ in range(_ROUNDS):
        for blocks, pairs in events.items():
            pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))  # type: ignore[no-untyped-call]
            pairs[-1][0].record()
            run(blocks)
            pairs[-1][1].record()
    torch.cuda.synchronize()
    return {
        blocks: statistics.median(start.elapsed_time(end) for start, end in pairs) for blocks, pairs in events.items()
    }


def choose(taken: Mapping[Blocks, float]) -> Blocks:
    """The fastest; the first ones, unless others are plainly faster."""
    first = CANDIDATES[0]
    best = min(taken, key=lambda blocks: taken[blocks], default=first)
    return best if best != first and taken[best] < _PLAINLY_FASTER * taken.get(first, math.inf) else first


def read(path: Path) -> Blocks | None:
    """What is kept, if it is there and whole."""
    try:
        blocks = Blocks(*json.loads(path.read_text("utf-8"))["blocks"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return CANDIDATES[CANDIDATES.index(blocks)] if blocks in CANDIDATES else None


def keep(path: Path, key: str, taken: Mapping[Blocks, float]) -> Blocks:
    """Write down what was measured, and the choice; of several processes that do, the first one's stays, for all."""
    milliseconds = {f"{lanes},{warps}": time for (lanes, warps), time in taken.items()}
    text = json.dumps({"blocks": choose(taken), "ms": milliseconds, "key": json.loads(key)}, indent=1)
    with aside(path) as whole:
        whole.write_text(text, encoding="utf-8")
        try:
            os.link(whole, path)
        except FileExistsError:
            if read(path) is None:  # broken
                whole.replace(path)
    blocks = read(path) or CANDIDATES[0]
    times = ", ".join(f"{name}: {time:.3g} ms" for name, time in milliseconds.items())
    _log.info(f"blocks of {8 * blocks.lanes} columns for the head's kernel, kept in {path}; lanes, warps: {times}")
    return blocks
