"""Engines, batches, and the processes behind them."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import torch

from kdflow.contracts import EngineContext
from kdflow.engines.sglang.process_group import held_files, members, schedulers
from kdflow.engines.sglang.teacher import SGLangTeacher, SGLangTeacherOptions
from tests.support.processes import children, until
from tests.support.runs import finish

CPU = torch.device("cpu")


def load(model: str, dtype: torch.dtype = torch.float32, max_tokens: int = 256, **options: object) -> SGLangTeacher:
    return SGLangTeacher(model, SGLangTeacherOptions(**options), EngineContext(CPU, dtype, max_tokens=max_tokens))  # type: ignore[arg-type]


def command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def engines_of(parent: int) -> list[int]:
    """Engine processes that a process has started; each leads a process group."""
    return [process for process in children(parent) if "kdflow.engines.sglang.server" in command(process)]


def engines_below(parent: int) -> list[int]:
    """Those of a process and of the ranks that it has started."""
    return [engine for process in (parent, *children(parent)) for engine in engines_of(process)]


def gone(group: int, held: set[str]) -> bool:
    """Whether nothing is left of an engine: no process, no file in /dev/shm."""
    return not members(group) and not any(Path(path).exists() for path in held)


__all__ = ["command", "engines_below", "engines_of", "gone", "held_files", "load", "members", "schedulers", "until"]


def killed_until_it_fails(process: subprocess.Popen[str]) -> str:
    """Kill a run's engines as soon as they come up, until it ends as it must; returns what it printed."""

    def kill() -> None:
        while process.poll() is None:
            for engine in engines_of(process.pid):
                os.kill(engine, signal.SIGKILL)
            time.sleep(0.1)

    killer = threading.Thread(target=kill)
    killer.start()
    printed = finish(process, code=2)
    killer.join()
    return printed
