"""The run directory: what programs read of a run."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kdflow._version import __version__
from kdflow.config import RunConfig
from kdflow.contracts import KdflowError
from kdflow.files import replacing
from kdflow.plugins import Plugins

_PATIENCE = 5.0  # seconds that a process which was killed may take to be gone


class RunDirectory:
    """Paths and files of one run; rank 0 alone writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.run_file = self.path / "run.yaml"
        self.environment = self.path / "environment.json"
        self.rollouts = self.path / "rollouts"
        self.student = self.path / ".student"
        self._held: int | None = None  # the descriptor that locks it

    def create(self, resume: bool) -> None:
        """Make the directory, and keep other processes out of it.

        Raises:
            KdflowError: it cannot be written to, another process trains in it, or it holds what this run would write
                over.
        """
        self.require_free(resume)
        with self._disk_errors():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        self._lock()
        self.require_free(resume)  # another process may have trained here, and ended while this one waited

    def require_free(self, resume: bool = False) -> None:
        """Refuse to write over a run, unless it is resumed, and over a run file that no run has written.

        Raises:
            KdflowError: there is one, or it cannot be seen whether there is.
        """
        with self._disk_errors():
            if self.metrics.exists() or step_directories(self.checkpoints):
                if resume:
                    return
                raise KdflowError(
                    f"{self.path} holds a run already: go on with it by --resume auto, give another output, or "
                    "delete it"
                )
            # A run that was ended before its first step has written both.
            if self.run_file.exists() and not self.environment.exists():
                raise KdflowError(
                    f"output: {self.run_file} is there already, and no run has written it: give another output"
                )

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise KdflowError(f"output: {self.path} cannot be written to: {error.strerror}") from None

    @contextmanager
    def _written(self, file: Path) -> Iterator[None]:
        """Name a file that cannot be written, once the run directory is made."""
        try:
            yield
        except OSError as error:
            raise KdflowError(
                f"{file} cannot be written: {error.strerror}; mend it, and go on by --resume auto"
            ) from None

    def _lock(self) -> None:
        self._held = os.open(self.path, os.O_RDONLY)
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise KdflowError(
                        f"another process trains in {self.path}: wait for its end, or give another output"
                    ) from None
                time.sleep(0.1)
            except OSError:  # some network file systems lock no directories
                return

    def unlock(self) -> None:
        """Let other processes train in it."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def describe(self, config: RunConfig, plugins: Plugins) -> None:
        """Write what runs, and where; the run file last, by which :meth:`require_free` knows that it is a run's.

        Raises:
            KdflowError: they cannot be written.
        """
        with self._written(self.environment):
            write_atomically(self.environment, json.dumps(environment(plugins, self.path), indent=2) + "\n")
        with self._written(self.run_file):
            write_atomically(self.run_file, config.as_yaml())

    def forget_after(self, step: int, last_step: int, evaluates: bool) -> None:
        """Drop what will be told again: what was told after ``step`` (all, if nothing was saved), and the run's end.

        Of ``step`` itself its evaluation is told again, if the run ``evaluates`` before it goes on.

        Raises:
            KdflowError: a file cannot be written or taken away, or the metrics cannot be read.
        """
        if step < last_step or evaluates:  # else nothing more happens, and what was said last stays true
            with self._written(self.summary):
                self.summary.unlink(missing_ok=True)
        with self._written(self.rollouts):
            for responses in self.rollouts.glob(f"step-{'[0-9]' * 8}.jsonl"):
                if responses.name > f"step-{step:08d}.jsonl":
                    responses.unlink()
        if not self.metrics.exists():
            return
        known = (event for event in read_events(self.metrics) if step > 0 and event.get("step", step + 1) <= step)
        kept = [one for one in known if not (evaluates and one["step"] == step and one["event"] in ("eval", "sample"))]
        with self._written(self.metrics):
            write_atomically(self.metrics, "".join(json.dumps(event) + "\n" for event in kept))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the last word on a run.

        Raises:
            KdflowError: it cannot be written.
        """
        with self._written(self.summary):
            write_atomically(self.summary, json.dumps(finite(summary), indent=2) + "\n")


def step_directories(checkpoints: Path, prefix: str = "step-") -> list[Path]:
    """The directories that kdflow has named by a step, oldest first; whatever else lies beside them is the user's."""
    named = ((re.fullmatch(f"{re.escape(prefix)}([0-9]{{8,}})", path.name), path) for path in checkpoints.glob("*"))
    steps = sorted((int(match[1]), path) for match, path in named if match is not None and path.is_dir())
    return [path for _, path in steps]


def read_events(metrics: Path) -> Iterator[dict[str, Any]]:
    """The events of a ``metrics.jsonl``; a last line that a kill cut off is left out.

    Raises:
        KdflowError: the file cannot be read, or another line is no event; names it.
    """
    try:
        with metrics.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.endswith(b"\n"):
                    yield _event(line, f"{metrics}:{number}")
    except OSError as error:
        raise KdflowError(f"{metrics} cannot be read: {error.strerror}; move it away, or mend it") from None


def _event(line: bytes, where: str) -> dict[str, Any]:
    try:
        event = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise KdflowError(f"{where}: this line is no UTF-8: {error.reason}; take it out") from None
    except json.JSONDecodeError as error:
        raise KdflowError(f"{where}: this line is no JSON: {error.msg}; take it out") from None
    named = isinstance(event, dict) and isinstance(event.get("event"), str)
    if not named or not isinstance(event.get("step", 0), int):
        raise KdflowError(f"{where}: this line is no event of a run, which has a name and a step; take it out")
    return dict(event)


def write_atomically(path: Path, text: str) -> None:
    """Write a text in UTF-8: readers see the old content or the new, never a part."""
    with replacing(path) as stream:
        stream.write(text.encode())


def finite(value: Any) -> Any:
    """The same data with null for numbers that JSON cannot say."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, with both values."""
    return [f"{key} was {one!r} and is {other!r}" for key, one, other in differences(before, now)]


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, and both values."""
    for key in sorted({*one, *other}):
        ours, theirs = one.get(key), other.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from differences(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs:
            yield f"{prefix}{key}", ours, theirs


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest one above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))  # False if too long


def environment(plugins: Plugins, output: Path) -> dict[str, Any]:
    """Versions, plugins, command and hardware, and what is free on the disk of the run directory."""
    packages = ("torch", "transformers", "datasets", "tokenizers", "pluggy", "pydantic", "peft", "torchao", "sglang")
    versions = {"kdflow": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": sys.argv,
        "versions": versions,
        "plugins": [
            {"name": p.name, "distribution": p.distribution, "version": p.version, "status": p.status, "error": p.error}
            for p in plugins.plugins
        ],
        "hardware": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "free_disk_bytes": shutil.disk_usage(nearest_existing(output)).free,
        },
    }
