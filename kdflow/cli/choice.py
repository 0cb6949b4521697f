"""A plugin, with options of its own, as the option of a command."""

from __future__ import annotations

from kdflow.config import Choice
from kdflow.config.yaml_file import parse
from kdflow.contracts import KdflowError
from kdflow.validation import validate_options


def choice(text: str, option: str, example: str) -> Choice:
    """What ``option`` was given: a plugin's name, or a mapping of its name and options such as ``example``.

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
