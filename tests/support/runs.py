"""Runs as a user starts them: processes, and what they leave in the run directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml

from kdflow.runtime.checkpoint import load_tensors

TRAJECTORY = ("loss", "grad_norm", "learning_rate", "samples", "target_tokens", "tokens")


def make_run(tiny: dict[str, str], **sections: Any) -> dict[str, Any]:
    """A run file over the tiny models, fast and in fp32; sections are merged into it."""
    run: dict[str, Any] = {
        "student": {"model": tiny["student"]},
        "teacher": {"model": tiny["teacher"]},
        "algorithm": {"name": "forward_kl"},
        "data": {
            "train": [{"path": tiny["train"], "format": "text"}],
            "eval": [{"path": tiny["eval"], "format": "text"}],
            "max_length": 128,
            "max_tokens": 256,
        },
        "training": {
            "steps": 4,
            "tokens_per_step": 400,
            "learning_rate": 1e-2,
            "dtype": "float32",
            "checkpoint_every": None,
            "evaluate_every": None,
        },
        "tracking": ["jsonl"],
    }
    for name, section in sections.items():
        both = isinstance(section, dict) and isinstance(run.get(name), dict)
        run[name] = {**run[name], **section} if both else section
    return run


def start(run: dict[str, Any], *arguments: str, directory: Path | None = None) -> subprocess.Popen[str]:
    """``kdflow train`` on a run file, as a process of its own."""
    output = Path(run["output"])
    file = (directory or output.parent) / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump(run), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "kdflow", "train", str(file), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a process and check how it ended; returns what it printed."""
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == code, printed
    return printed


def train(run: dict[str, Any], *arguments: str) -> str:
    """``kdflow train`` to its end."""
    return finish(start(run, *arguments))


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Kill a process, and all that it started, with SIGKILL as soon as ``condition`` holds."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the condition never came"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def events(output: Path | str, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's metrics; a line that a kill cut off is left out."""
    path = Path(output) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [event for line in lines if line.endswith("\n") and (event := json.loads(line))["event"] == kind]


def trajectory(output: Path | str, keys: Iterable[str] = TRAJECTORY) -> list[tuple[Any, ...]]:
    """Step numbers and what must be the same between equivalent runs."""
    return [(event["step"], *(event[key] for key in keys)) for event in events(output, "step")]


def losses(output: Path | str) -> list[float]:
    """The loss of each step."""
    return [loss for _, loss in trajectory(output, ["loss"])]


def interrupted(whole: Path, output: Path, step: int) -> Path:
    """A copy of a finished run that has just written the checkpoint of ``step``."""
    shutil.copytree(whole, output, symlinks=True)
    for checkpoint in (output / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return output


def saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    load_tensors(checkpoint, tensors)
    return tensors
