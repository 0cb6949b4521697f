"""``kdflow cache``."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from kdflow.cli import app
from kdflow.cli.console import stdout
from kdflow.cli.options import Json, Overrides, choice
from kdflow.cli.progress import ProgressBar
from kdflow.imports import large_imports

if TYPE_CHECKING:
    from kdflow.runtime.capture import CaptureProgress, Plan

_LINES_EVERY = 10.0  # seconds, where there is no terminal


@app.command()
def cache(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN.YAML", help="The run file, whose teacher scores its data.")],
    overrides: Overrides = None,
    *,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", show_default=False,
            help="The directory to write, or to go on with: teacher.engine.path of runs that train from it. By default "
            "one in kdflow's cache, where such runs look.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="The teacher engine that scores, or '{name: sglang, tensor_parallel: 2}'. By default the run file's, "
            "or transformers where that is cache.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Store the teacher's hidden states of a run's data, for 'teacher.engine.name=cache'; goes on where it stopped."""
    with large_imports():
        from kdflow.runtime.capture import capture

    scorer = None if engine is None else choice(engine, "--engine", "{name: transformers}")
    with ProgressBar("samples") as bar:
        plan, progress = capture(
            run, overrides or [], output=output, engine=scorer, block=ctx.obj, report=_Report(bar)
        )  # fmt: skip
    if as_json:
        told = {f"captured_{name}": value for name, value in dataclasses.asdict(progress).items()}
        print(json.dumps({**dataclasses.asdict(plan), "needed_bytes": plan.needed_bytes, **told}, indent=2))
    else:
        _summarise(plan, progress)


class _Report:
    """Shows what is to be written, and then how far it is."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar, self._last = bar, 0.0

    def __call__(self, plan: Plan, progress: CaptureProgress) -> None:
        total, now = plan.samples - plan.stored_samples, time.monotonic()
        if progress.samples == 0:
            self._bar.print(_planned(plan))
        elif self._bar.is_drawn or progress.samples == total or now - self._last > _LINES_EVERY:
            figures = f"{progress.target_tokens:,} target tokens · {_speed(progress):,.0f} a second"
            self._bar.show(progress.samples, total, figures, progress.seconds)
        else:
            return
        self._last = now


def _planned(plan: Plan) -> str:
    lines = [f"{plan.path}: {plan.samples:,} samples, {plan.target_tokens:,} target tokens"]
    if plan.stored_samples:
        lines[0] += f"; {plan.stored_samples:,} samples are there"
    lines.append(
        f"{plan.bytes_per_token:,} bytes per target token; {decimal(plan.needed_bytes)} to be written, the teacher's "
        f"head included; {decimal(plan.free_bytes)} are free"
    )
    return "\n".join(lines)


def _speed(progress: CaptureProgress) -> float:
    return progress.target_tokens / progress.seconds if progress.seconds else 0.0


def _summarise(plan: Plan, progress: CaptureProgress) -> None:
    rows = Table(show_header=False)
    rows.add_column(no_wrap=True)
    rows.add_column(justify="right")
    rows.add_row("samples", f"{plan.samples:,}")
    rows.add_row("captured now", f"{progress.samples:,}")
    rows.add_row("target tokens", f"{plan.target_tokens:,}")
    rows.add_row("bytes per target token", f"{plan.bytes_per_token:,}")
    rows.add_row("target tokens/s", f"{_speed(progress):,.1f}")
    console = stdout()
    console.print(escape(plan.path), soft_wrap=True)
    console.print(rows)
