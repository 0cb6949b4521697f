"""What a run came to, for people: a table, a sample of the student's text, and where to go next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from kdflow.cli.console import stdout

_FIGURES = {
    "divergence": ("divergence from the teacher (nats)", "{:.3f}"),
    "cross_entropy": ("cross-entropy (nats)", "{:.3f}"),
    "perplexity": ("perplexity", "{:,.1f}"),
    "bits_per_byte": ("bits per byte", "{:.3f}"),
    "agreement": ("top-1 agreement with the teacher", "{:.1%}"),
}


def show(output: Path) -> None:
    """Show the summary of the run in ``output``."""
    console = stdout()
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    if summary["evaluation"]:
        console.print(_table(summary["evaluation"]))
    console.print(_counts(summary))
    metrics = output / "metrics.jsonl"
    if metrics.exists():
        for step, sample in _samples(metrics):
            title = "before training" if step == 0 else f"after step {step}"
            text = f"[dim]{escape(sample['prompt'])}[/]{escape(sample['text'])}"
            console.print(Panel(text, title=f"the student's text, {title}", title_align="left"))
    quoted = shlex.quote(str(output))
    report = f"      kdflow report {quoted}   (its curves, a page)\n" if metrics.exists() else ""
    steps = f"{metrics}   (every step)   " if metrics.exists() else ""
    export = f"kdflow export {quoted} -o DIR   (a Hugging Face directory)\n"
    console.print(
        f"[bold]Next[/]: {escape(f'{export}{report}      {steps}{output}/run.yaml   (every option)')}",
        soft_wrap=True,
    )


def _table(evaluation: dict[str, Any]) -> Table:
    table = Table("held out")
    for when in evaluation:
        table.add_column(when, justify="right")
    for row in evaluation_rows(evaluation):
        table.add_row(*row)
    return table


def evaluation_rows(evaluation: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A line for each figure that some evaluation has: its name, and what each says of it."""
    rows = []
    for key, (label, form) in _FIGURES.items():
        values = [figures[key] for figures in evaluation.values()]
        if any(value is not None for value in values):
            rows.append([label, *("-" if value is None else form.format(value) for value in values)])
    return rows


def _counts(summary: dict[str, Any]) -> str:
    """On two lines of their own: beside a table they would be broken to its width."""
    speed = summary["tokens"] / summary["seconds"] if summary["seconds"] else 0.0
    samples = summary["samples"]
    dropped = sum(count for reason, count in samples.items() if reason.startswith("dropped"))
    return (
        f"{summary['steps']} steps, {summary['tokens']:,} tokens, {speed:,.0f} tokens/s\n"
        f"samples: {samples['drawn']} drawn, {samples['trained']} trained ({samples['truncated']} cut), "
        f"{dropped} dropped"
    )


def _samples(metrics: Path) -> list[tuple[int, dict[str, Any]]]:
    from kdflow.runtime.run_directory import read_events

    return [(event["step"], event) for event in read_events(metrics) if event["event"] == "sample"]
