"""How tables are shown."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Column, Table

_WIDE = 200
_OTHERS = 9  # of a terminal's columns, for each column but the first: six for a figure, the rest for its frame


def stdout() -> Console:
    """A console as wide as the terminal, and wide where a program reads: nothing is cut off in a pipe."""
    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else _WIDE)


def table(name: str, *columns: str) -> Table:
    """An empty table whose first column is never broken, and whose others are broken rather than cut off.

    In a narrow terminal the first column is cut off: figures without a whole name tell more than names without figures.
    """
    width = stdout().width
    first = Column(name, no_wrap=True, max_width=max(width // 3, width - 4 - _OTHERS * len(columns)))
    return Table(first, *(Column(column, overflow="fold") for column in columns))
