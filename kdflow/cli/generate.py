"""``kdflow generate``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kdflow.cli import app
from kdflow.cli.console import stdout
from kdflow.cli.options import Overrides, choice
from kdflow.cli.progress import ProgressBar
from kdflow.contracts import Sampling
from kdflow.imports import large_imports

if TYPE_CHECKING:
    from kdflow.runtime.responses import Progress


class Keep(StrEnum):
    """Which responses are written."""

    all = "all"
    verified = "verified"


@app.command()
def generate(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN.YAML", help="The run file, whose teacher responds.")],
    overrides: Overrides = None,
    *,
    prompts: Annotated[Path, typer.Option(help="JSON lines with 'messages' or 'prompt', and maybe 'answer'.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file of responses to write, or to go on with.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="A run directory or a checkpoint: its student responds, not the teacher.")
    ] = None,
    n: Annotated[int, typer.Option(help="Responses to each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens that come to this probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the longest response.")] = 512,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    keep: Annotated[
        Keep, typer.Option(help="verified: of each prompt the first response with the final answer of its record.")
    ] = Keep.all,
    engine: Annotated[
        str, typer.Option(help="The rollout engine, or '{name: transformers, batch_tokens: 32768}'.")
    ] = "transformers",
) -> None:
    """Write a model's responses to a file of prompts, for 'sft' to train on; goes on where it was stopped."""
    sampling = Sampling(max_new_tokens, temperature, top_p, n, seed)
    with large_imports():
        from kdflow.runtime.generate import generate as generate_responses

    with ProgressBar("prompts") as bar:

        def show(progress: Progress, total: int) -> None:
            figures = f"{progress.responses} responses · {progress.speed:,.0f} tokens/s"
            bar.show(progress.prompts, total, figures, progress.seconds)

        progress = generate_responses(
            run, prompts, output, sampling, overrides or [], checkpoint=checkpoint, keep=keep.value,
            engine=choice(engine, "--engine", "{name: transformers}"), block=ctx.obj, report=show,
        )  # fmt: skip
    _summarise(output, progress, keep)


def _summarise(output: Path, progress: Progress, keep: Keep) -> None:
    rows = Table(title=escape(str(output)), title_justify="left", show_header=False)
    rows.add_column(no_wrap=True)
    rows.add_column(justify="right")
    rows.add_row("prompts", f"{progress.prompts:,}")
    rows.add_row("responses", f"{progress.responses:,}")
    rows.add_row("kept", f"{progress.kept:,}")
    if keep is Keep.verified:
        rows.add_row("prompts without a verified response", f"{progress.unsolved:,}")
    rows.add_row("cut off by length", f"{progress.truncated:,}")
    rows.add_row("empty, left out", f"{progress.empty:,}")
    rows.add_row("tokens", f"{progress.tokens:,}")
    rows.add_row("tokens/s", f"{progress.speed:,.1f}")
    stdout().print(rows)
