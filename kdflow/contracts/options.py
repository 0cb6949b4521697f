"""What every plugin has: options, and errors that a user can mend."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar, get_args

import pydantic
from pydantic_core import CoreSchema


class KdflowError(Exception):
    """Something that the user can mend. The message says what was given, what was expected and what to do."""

    exit_code = 2


class TrainingStopped(KdflowError):
    """A run that had to stop: its message says at which step, why, and what was in the step."""

    exit_code = 1


class Options(pydantic.BaseModel):
    """Base of every plugin's options: strict about names, numbers coerced by the declared type, frozen."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    operational: ClassVar[frozenset[str]] = frozenset()
    """Names of options that change time and memory alone, and no number that comes of them."""

    def binding(self) -> dict[str, Any]:
        """The others: what is gone on with, such as a capture, must have been begun with the same."""
        return self.model_dump(exclude=set(self.operational))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: pydantic.GetCoreSchemaHandler) -> CoreSchema:
        # Numbers alone are looked at: a field that tells the members of a union apart may have nothing before it.
        for field in cls.model_fields.values():
            number = _mentions(field.annotation, int, float) and not _mentions(field.annotation, bool)
            if number and _NO_BOOLEAN not in field.metadata:  # which a subclass inherits
                field.metadata.append(_NO_BOOLEAN)
        return handler(source)


def _refuse_booleans(value: Any) -> Any:
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, bool):
            raise ValueError(f"must be a number, not {str(item).lower()}")
    return value


_NO_BOOLEAN = pydantic.BeforeValidator(_refuse_booleans)


def _mentions(annotation: Any, *kinds: type) -> bool:
    return annotation in kinds or any(_mentions(part, *kinds) for part in get_args(annotation))


class Configured(ABC):
    """Base of what a run file selects by name.

    Attributes:
        name: what it is selected by.
        paper: where it was defined.
        Options: its options, a pydantic model.
        options: those of this instance.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: pydantic.BaseModel | None = None) -> None:
        self.options: Any = self.Options() if options is None else options
