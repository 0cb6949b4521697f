"""A measurement in a process of its own, with a time limit: what it found, or its last words."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

_LAST_WORDS = 4000
_PACKAGES = ("kdflow", "torch", "transformers", "sglang", "trl", "accelerate")


def environment() -> dict[str, str]:
    """What the process is given: no hub, and SGLang for a CPU where there is no GPU."""
    # As kdflow's engines have it: else a plain one would refuse their arguments, a longer context than the model's.
    sglang = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    if not torch.cuda.is_available():
        sglang["SGLANG_USE_CPU_ENGINE"] = "1"
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **sglang}


def run(command: list[str], log: Path, limit: float) -> str | None:
    """Run a command to its end; what went wrong, with the end of its log, or None.

    It leads a process group, which is killed when ``limit`` seconds have passed; kdflow's engines end with it.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
    if code == 0:
        return None
    how = f"killed after {limit:g} s" if code is None else f"exit code {code}"
    return f"{how}: …{log.read_text(errors='replace')[-_LAST_WORDS:]}"


def measure(name: str, directory: Path, limit: float) -> dict[str, Any]:
    """Start this script again with ``--one NAME``, and read what it found; ``{"failed": why}`` if it does not end well.

    The script writes with :func:`found`; what it prints stands in ``directory/NAME.log``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{name}.json"
    file.unlink(missing_ok=True)
    failed = run([sys.executable, *sys.argv, "--one", name], directory / f"{name}.log", limit)
    # An engine that makes noise when it ends has been measured all the same.
    return json.loads(file.read_text("utf-8")) if file.exists() else {"failed": failed}


def collect(names: Iterable[str], directory: Path, limit: float, out: Path, results: dict[str, Any]) -> None:
    """Measure each, print and keep it; of what makes models (``make-…``) only what goes wrong."""
    for name in names:
        told = measure(name, directory, limit)
        if not name.startswith("make-") or "failed" in told:
            results[name] = told
            keep(out, results)
            show(name, told)


def found(name: str, directory: Path, result: Mapping[str, Any]) -> None:
    """Leave what was found, in the process of its own."""
    (directory / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")


def about(**more: Any) -> dict[str, Any]:
    """Device, versions, and what else a file of results begins with."""
    versions: dict[str, str | None] = {"cuda": torch.version.cuda}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    shared = {"multi_process_service": True} if "CUDA_MPS_PIPE_DIRECTORY" in os.environ else {}
    return {"device": device, "versions": versions, "revision": _revision(), **shared, **more}


def _revision() -> str | None:
    """The commit of this checkout, where it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def keep(out: Path, results: Mapping[str, Any]) -> None:
    """Write the results so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def show(name: str, told: Mapping[str, Any]) -> None:
    """Print what a process found, rounded; long lists are left to the file of results."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {text(one)}" for key, one in value.items())
        if isinstance(value, list):
            return f"[{' '.join(map(text, value))}]"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    print(
        f"{name}:",
        *(f"  {key}: {text(value)}" for key, value in told.items() if key != "seconds"),
        sep="\n",
        flush=True,
    )


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """Seconds of a call to its end on the device."""

    def run() -> float:
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        return time.perf_counter() - started

    return run


def in_turns(runs: Mapping[str, Callable[[], float]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each, as it tells them itself, taken in turns, so that all see the device equally warm."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warm + rounds):
        for name, call in runs.items():
            took = call()
            if number >= warm:
                seconds[name].append(took)
    return seconds
