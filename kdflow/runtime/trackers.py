"""The trackers that kdflow brings: ``console`` for people and ``jsonl`` for programs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import pydantic
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kdflow.contracts import KdflowError, Tracker
from kdflow.hookspecs import hookimpl
from kdflow.runtime.run_directory import finite


class JsonLines(Tracker):
    """Appends every event to ``metrics.jsonl``, one object a line; floats read back exactly."""

    name = "jsonl"
    _file: IO[str]

    def start(self, directory: Path, run: Mapping[str, Any], first_step: int) -> None:
        """Open the file.

        Raises:
            KdflowError: it cannot be.
        """
        self._path = directory / "metrics.jsonl"
        try:
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise KdflowError(
                f"{self._path} cannot be written to: {error.strerror}; mend it, or give another output"
            ) from None

    def event(self, event: Mapping[str, Any]) -> None:
        """Append a line.

        Raises:
            KdflowError: the disk is full, or gone.
        """
        try:
            self._file.write(json.dumps(finite(event)) + "\n")
        except OSError as error:
            raise KdflowError(f"{self._path} cannot be written to: {error.strerror}; mend it") from None

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # of a full disk, which an event has told of
            self._file.close()


class ConsoleTracker(Tracker):
    """A progress display with loss, tokens/s, time left and memory; plain lines where there is no terminal."""

    name = "console"

    def __init__(self, options: pydantic.BaseModel | None = None) -> None:
        super().__init__(options)
        self._console = Console(stderr=True, emoji=False)
        self._progress: Progress | None = None

    def start(self, directory: Path, run: Mapping[str, Any], first_step: int) -> None:
        """Say what runs, and show the progress bar."""
        self._steps = run["training"]["steps"]
        teacher = run["teacher"]["model"] if run["teacher"] else "no teacher"
        models = escape(f"{run['student']['model']} ← {teacher} · {directory}")
        self._say(f"[bold]{run['algorithm']['name']}[/] · {models}")
        # About forty plain lines a run, whatever its length.
        self._every = max(1, self._steps // 40)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console,
            )  # fmt: skip
            self._task = self._progress.add_task("step", total=self._steps, completed=first_step - 1, figures="")
            self._progress.start()

    def event(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        show = getattr(self, f"_{event['event']}", None)
        if show is not None:
            show(event)

    def close(self) -> None:
        """Take the progress bar down."""
        if self._progress is not None:
            self._progress.stop()

    def _step(self, event: Mapping[str, Any]) -> None:
        speed = event["tokens"] / event["seconds"]
        figures = f"loss {event['loss']:.4f} · {speed:,.0f} tokens/s · {event['memory_bytes'] / 2**30:.1f} GiB"
        if self._progress is not None:
            self._progress.update(self._task, completed=event["step"], figures=figures)
        elif event["step"] % self._every == 0 or event["step"] in (1, self._steps):
            left = (self._steps - event["step"]) * event["seconds"]
            self._say(f"step {event['step']}/{self._steps} · {figures} · about {left:.0f} s left")

    def _ready(self, event: Mapping[str, Any]) -> None:
        parts = [f"{name} {seconds:.1f}" for name, seconds in event["parts"].items() if seconds >= 0.05]
        self._say(" · ".join([f"ready after {event['seconds']:.1f} s", *parts]))

    def _eval(self, event: Mapping[str, Any]) -> None:
        shown = [f"{name.replace('_', ' ')} {event[name]:.4g}" for name in
                 ("divergence", "perplexity", "bits_per_byte", "agreement") if event[name] is not None]  # fmt: skip
        self._say(f"held out after step {event['step']}: " + " · ".join(shown))

    def _resumed(self, event: Mapping[str, Any]) -> None:
        self._say(f"resumed after step {event['step']}")

    def _warning(self, event: Mapping[str, Any]) -> None:
        self._say(f"[yellow]warning[/]: {escape(event['message'])}")

    def _say(self, text: str) -> None:
        (self._progress.console if self._progress else self._console).print(text, highlight=False, soft_wrap=True)


@hookimpl
def kdflow_trackers() -> Iterable[type[Tracker]]:
    """The trackers of this module."""
    return [ConsoleTracker, JsonLines]
