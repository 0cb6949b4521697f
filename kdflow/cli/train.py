"""``kdflow train``."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from typing import Annotated

import typer

from kdflow.cli import app
from kdflow.cli.options import Overrides
from kdflow.contracts import KdflowError
from kdflow.imports import large_imports


class Resume(StrEnum):
    """How to go on with a run."""

    auto = "auto"


@app.command()
def train(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN.YAML", help="The run file.")],
    overrides: Overrides = None,
    resume: Annotated[
        Resume | None, typer.Option(help="auto: go on from the newest checkpoint, or start afresh where there is none.")
    ] = None,
    nproc_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes to start on this machine, one a GPU; torchrun does it on many.")
    ] = None,
) -> None:
    """Train a student as a run file says."""
    if nproc_per_node is not None:
        if "RANK" in os.environ:
            raise KdflowError(
                "--nproc-per-node: RANK is set, as a launcher sets it for processes that it has started; leave the "
                "option out, or unset RANK and WORLD_SIZE"
            )
        _launch(nproc_per_node, run, overrides or [], ctx.obj)
        return
    start(run, overrides or [], resume is not None, ctx.obj)


def start(run: str, overrides: list[str], resume: bool, block: tuple[str, ...]) -> None:
    """Train in this process, and show what came of it."""
    with large_imports():
        from kdflow.runtime.processes import STORE
        from kdflow.runtime.run import train as train_run

    try:
        result = train_run(run, overrides, resume="auto" if resume else None, block=block)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", "0")) == 0 and STORE not in os.environ:  # else the launcher says it
            print("interrupted: --resume auto goes on from the last checkpoint, if there is one", file=sys.stderr)
        raise
    if int(os.environ.get("RANK", "0")) == 0:
        from kdflow.cli.summary import show

        show(result.output)


def _launch(processes: int, run: str, overrides: list[str], block: tuple[str, ...]) -> None:
    """Start ``processes`` ranks on this machine through torch's elastic agent."""
    with large_imports():
        from kdflow.runtime.prepare import prepare

    prepare(run, overrides, block)  # so that a fault in the run file is told once, and not by every rank
    from kdflow.runtime.launch import launch

    # -P: a file of the current folder, such as datasets.py, is not taken for the library of its name.
    launch(processes, [sys.executable, "-P", "-m", "kdflow", *_without_launch(sys.argv[1:])])


def _without_launch(arguments: list[str]) -> list[str]:
    """The same command line for one rank."""
    kept, words = [], iter(arguments)
    for word in words:
        if word == "--nproc-per-node":
            next(words, None)
        elif not word.startswith("--nproc-per-node="):
            kept.append(word)
    return kept
