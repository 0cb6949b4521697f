"""``kdflow evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kdflow.cli import app
from kdflow.cli.console import stdout, table
from kdflow.cli.options import Json, Overrides
from kdflow.imports import large_imports


@app.command()
def evaluate(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN.YAML", help="The run file, whose 'evaluation' is asked.")],
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A run directory or a checkpoint; by default the run file's own output.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Ask this directory or hub id instead.")] = None,
    as_json: Json = False,
) -> None:
    """Ask a trained student, or any model, the questions of a run file's evaluators."""
    with large_imports():
        from kdflow.runtime.evaluate import evaluate as evaluate_run

    found = evaluate_run(run, overrides or [], checkpoint=checkpoint, model=model, block=ctx.obj)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = table("evaluator", "data", "figure", "value", "95 % interval", "of")
    for result in found["results"]:
        for name, figure in result["figures"].items():
            share = "interval" in figure
            value = "-" if figure["value"] is None else format(figure["value"], ".1%" if share else ".4g")
            interval = "{:.1%} to {:.1%}".format(*figure["interval"]) if share else "-"
            of = f"{figure['count']:,}"
            rows.add_row(result["name"], escape(result["path"]), escape(name), value, interval, of)
    console = stdout()
    console.print(escape(found["model"]), soft_wrap=True)
    console.print(rows)
