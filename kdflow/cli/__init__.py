"""The command line: one file a command.

Nothing here imports torch before a command needs it, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kdflow.contracts import KdflowError


class _Commands(TyperGroup):
    """Accepts ``-p no:NAME`` before the command and after it, as pytest does."""

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a :class:`~kdflow.contracts.KdflowError` becomes a message and an exit code."""
    # Threads that wait by spinning make each other several times slower where something else runs on the same cores.
    # Read when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Where torchao is installed, transformers imports it, and each of its kernels that does not fit is told of.
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="kdflow")
    except KdflowError as error:
        if not _left_to_the_launcher(error):
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _left_to_the_launcher(error: KdflowError) -> bool:
    if "RANK" not in os.environ:
        return False
    from kdflow.runtime.launch import leave_last_word

    return leave_last_word(error)


# Each module registers its command on import, in the order in which --help shows them.
from kdflow.cli import quickstart, train, export, plugins, algorithms  # noqa: E402, F401, I001
