"""TensorBoard: a run's curves, its warnings and the student's text, as event files in the run directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kdflow
from kdflow.contracts import Tracker, scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# The event whose numbers are drawn → the group of charts that they stand in.
_CHARTS = {"step": "train", "eval": "eval"}


class TensorBoard(Tracker):
    """Writes event files to ``tensorboard`` in the run directory: ``tensorboard --logdir runs`` shows all runs there.

    A resumed run takes back what it is about to tell again: charts show each step once.
    """

    name = "tensorboard"
    _writer: SummaryWriter

    def start(self, directory: Path, run: Mapping[str, Any], first_step: int) -> None:
        """Open an event file, and tell what runs."""
        from torch.utils.tensorboard import SummaryWriter  # imports torch, for which listing plugins need not wait

        # Where nothing was saved, the evaluation before the first step is told again too.
        again = first_step if first_step > 1 else 0
        self._writer = SummaryWriter(directory / "tensorboard", purge_step=again, flush_secs=10)
        self._writer.add_text("run", _block(json.dumps(run, indent=2, ensure_ascii=False)), first_step - 1)

    def event(self, event: Mapping[str, Any]) -> None:
        """Write one event; those without a chart or a text are left out."""
        kind = event["event"]
        if kind in _CHARTS:
            for name, value in scalars(event).items():
                self._writer.add_scalar(f"{_CHARTS[kind]}/{name}", value, event["step"])
        elif kind == "sample":
            self._writer.add_text("sample", _block(event["prompt"] + event["text"]), event["step"])
        elif kind == "warning":
            self._writer.add_text("warning", _block(event["message"]), event["step"])
        elif kind == "checkpoint":
            self._writer.flush()  # a run that is killed goes on from here, and does not tell again what came before

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._writer.close()


def _block(text: str) -> str:
    """``text`` as Markdown that shows it as it is: indented, whatever it holds."""
    return "".join(f"    {line}\n" for line in text.splitlines())


@kdflow.hookimpl
def kdflow_trackers() -> Iterable[type[Tracker]]:
    """The tracker of this package."""
    return [TensorBoard]
