"""How tables are shown."""

from __future__ import annotations

from rich.console import Console

_WIDE = 200


def stdout() -> Console:
    """A console that wraps to the terminal, and does not where a program reads: nothing is cut off in a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDE)
