"""A plugin, with options of its own, as the option of a command."""

from __future__ import annotations

import yaml

from kdflow.config import Choice
from kdflow.contracts import KdflowError
from kdflow.plugins import validate_options


def choice(text: str, option: str, example: str) -> Choice:
    """What ``option`` was given: a plugin's name, or a mapping of its name and options such as ``example``.

    Raises:
        KdflowError: it is neither.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, str | dict):
        raise KdflowError(f"{option} '{text}' must be a name, or a mapping such as '{example}'")
    values = {"name": value} if isinstance(value, str) else {str(key): item for key, item in value.items()}
    found: Choice = validate_options(Choice, values, option)
    return found
