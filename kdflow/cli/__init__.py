"""The command line: one file a command.

Nothing here imports torch before a command needs it, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from kdflow.contracts import KdflowError
from kdflow.runtime.lifetime import end_with_launcher


class _Commands(TyperGroup):
    """Accepts ``-p no:NAME`` and ``-v`` before the command and after it, as pytest does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first: list[str] = []
        rest: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--":
                rest += [word, *words]
            elif word == "-p":
                first += [word, next(words, "")]
            elif word.startswith("-p") and word.removeprefix("-p").startswith("no:"):
                first += ["-p", word.removeprefix("-p")]
            elif word == "--verbose" or re.fullmatch("-v+", word):
                first.append(word)
            else:
                rest.append(word)
        return super().parse_args(ctx, first + rest)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Distil large language models: a minimal FSDP2 + SGLang runtime in which every algorithm is a plugin.",
)


def _version(value: bool) -> None:
    if value:
        from kdflow.cli.plugins import print_versions

        print_versions()
        raise typer.Exit


@app.callback()
def _main(
    ctx: typer.Context,
    plugin: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="no:NAME", help="Block a plugin, by entry point or distribution. May be repeated."),
    ] = None,
    verbose: Annotated[
        int,
        typer.Option(
            "-v",
            "--verbose",
            count=True,
            show_default=False,
            metavar="",
            help="Say what is done, with the time. Twice: in detail.",
        ),
    ] = 0,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the versions of kdflow and of plugins."),
    ] = False,
) -> None:
    block = []
    for value in plugin or ():
        if not value.startswith("no:") or value == "no:":
            raise typer.BadParameter(f"'-p {value}' must be '-p no:NAME': plugins are loaded unless they are blocked")
        block.append(value.removeprefix("no:"))
    ctx.obj = tuple(block)
    if verbose:
        _be_verbose(verbose)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at the time: above the progress bar, while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _be_verbose(times: int) -> None:
    """Show what kdflow logs, and the second time what other libraries log too."""
    rank = f"rank {os.environ['RANK']} " if "RANK" in os.environ else ""
    logging.basicConfig(format=f"%(asctime)s {rank}%(levelname)s %(name)s: %(message)s", force=True,
                        level=logging.WARNING if times == 1 else logging.INFO, handlers=[_StderrHandler()])  # fmt: skip
    logging.getLogger("kdflow").setLevel(logging.INFO if times == 1 else logging.DEBUG)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a :class:`~kdflow.contracts.KdflowError` becomes a message and an exit code."""
    end_with_launcher()
    # Threads that wait by spinning make each other several times slower where something else runs on the same cores.
    # Read when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[_StderrHandler()])
    # Where torchao is installed, transformers imports it, and each of its kernels that does not fit is told of.
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="kdflow")
    except KdflowError as error:
        if not _left_to_the_launcher(error):
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if not _left_to_the_launcher(error):
            raise
        raise SystemExit(1) from None


def _left_to_the_launcher(error: Exception) -> bool:
    if "RANK" not in os.environ:
        return False
    from kdflow.runtime.launch import leave_last_word

    return leave_last_word(error)


# Each module registers its command on import, in the order in which --help shows them.
from kdflow.cli import quickstart, check, train, evaluate, generate, cache, export, report, align, plugins, algorithms  # noqa: E402, F401, I001
