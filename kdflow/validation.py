"""What is wrong with options and with keys of a run file, in sentences."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import pydantic

from kdflow.contracts import KdflowError, Options


def validate_options(model: type[Options], values: Mapping[str, Any], owner: str) -> Any:
    """Make ``model`` from ``values``.

    Raises:
        KdflowError: an option is unknown (with the nearest one), of the wrong type or out of range.
    """
    try:
        return model(**values)
    except pydantic.ValidationError as error:
        told = (": ".join(part for part in (owner, key, text) if part) for key, text in faults(error, model))
        raise KdflowError("\n".join(told)) from None


def faults(
    error: pydantic.ValidationError, model: type[pydantic.BaseModel], also: Iterable[str] = ()
) -> list[tuple[str, str]]:
    """The faults of a validation as ``(dotted key, sentence)``; keys of ``also`` stand beside those of ``model``."""
    found = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            fields = [*_fields_at(model, fault["loc"][:-1]), *also]
            hint = nearest(str(fault["loc"][-1]), fields) or f"; known keys: {', '.join(fields) or 'none'}"
            found.append((key, f"unknown key{hint}"))
        elif fault["type"] == "missing":
            found.append((key, "this key is needed"))
        else:
            text = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "model_type":
                text = f"must be a section with the keys {', '.join(_fields_at(model, fault['loc']))}"
            given = fault["input"]
            if isinstance(given, str | int | float | None) and ", not " not in text:
                text += f", not {given!r}"
            found.append((key, f"{text[:1].lower()}{text[1:]}"))
    return found


def _fields_at(model: type[pydantic.BaseModel], path: Sequence[str | int]) -> list[str]:
    """Names of the fields of the model that stands at ``path`` inside ``model``."""
    for part in path:
        if (field := model.model_fields.get(str(part))) is None:
            continue  # a list's number, a mapping's key, or which member of a union was tried
        inner = next(_models(field.annotation), None)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _models(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    """Those that a type holds, as ``dict[str, Part] | None`` holds ``Part``."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def require_sound(options: type[Options], owner: str) -> None:
    """Check what holds for options that are written out in a run's own file, and read from there again."""
    fields = options.model_fields.items()
    if aliased := [key for key, field in fields if field.alias or field.validation_alias or field.serialization_alias]:
        raise ValueError(f"{owner} gives {', '.join(aliased)} an alias: an option has the name of its field alone")
    if computed := sorted(options.model_computed_fields):
        raise ValueError(f"{owner} computes {', '.join(computed)}, which no run file can set: make it a property alone")
    defaults = {key: field.default for key, field in fields if not field.is_required() and not field.default_factory}
    try:
        options(**defaults)
    except pydantic.ValidationError as error:  # what has no default is missing, and may be
        if told := [f"{key}: {text}" for key, text in faults(error, options) if key.partition(".")[0] in defaults]:
            raise ValueError(f"{owner} does not take its own default of {'; '.join(told)}") from None
    except KdflowError:  # of a plugin that is named and not loaded yet: a run asks again
        pass


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean …?"`` with the known name that is nearest, or nothing."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    near = near or [other for other in known if other.replace("_", "") == name.replace("_", "").lower()]
    return f"; did you mean '{near[0]}'?" if near else ""
