"""What several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

from kdflow.config import Choice
from kdflow.config.yaml_file import parse
from kdflow.contracts import KdflowError
from kdflow.validation import validate_options

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the run file, such as training.dtype=float32."),
]


def choice(text: str, option: str, example: str) -> Choice:
    """The plugin that ``option`` was given: a name, or a mapping of its name and options such as ``example``.

    Raises:
        KdflowError: it is neither, or has a key twice.
    """
    try:
        value, why = parse(text), ""
    except ValueError as error:
        value, why = None, f": {error}"
    if not isinstance(value, str | dict):
        raise KdflowError(f"{option} '{text}' must be a name, or a mapping such as '{example}'{why}")
    found: Choice = validate_options(Choice, {"name": value} if isinstance(value, str) else value, option)
    return found
