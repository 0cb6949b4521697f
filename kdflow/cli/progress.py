"""How far a long command is."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar:
    """A bar with figures and the time left on stderr; plain lines where there is no terminal."""

    def __init__(self, noun: str) -> None:
        self._noun, self._console = noun, Console(stderr=True, emoji=False)
        self._bar = Progress(
            TextColumn(noun), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
        )  # fmt: skip
        self._task = self._bar.add_task(noun, total=None, figures="")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_drawn:
            self._bar.stop()

    @property
    def is_drawn(self) -> bool:
        """Whether there is a terminal to draw a bar on."""
        return self._console.is_terminal

    def print(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def show(self, done: int, total: int, figures: str, seconds: float) -> None:
        """Show that ``done`` of ``total`` are done, which took ``seconds``."""
        if self.is_drawn:
            self._bar.start()
            self._bar.update(self._task, total=total, completed=done, figures=figures)
            return
        text = f"{self._noun} {done}/{total} · {figures}"
        if done:
            text += f" · about {(total - done) * seconds / done:.0f} s left"
        self.print(text)
