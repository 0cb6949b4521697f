"""How tables are shown."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Column, Table

_WIDE = 200


def stdout() -> Console:
    """A console as wide as the terminal, and wide where a program reads: nothing is cut off in a pipe."""
    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else _WIDE)


def table(name: str, *columns: str) -> Table:
    """An empty table whose first column is never broken, and whose others are broken rather than cut off."""
    return Table(Column(name, no_wrap=True), *(Column(column, overflow="fold") for column in columns))
