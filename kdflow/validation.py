"""What is wrong with options and with keys of a run file, in sentences."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

import pydantic
from pydantic_core import to_jsonable_python

from kdflow.contracts import KdflowError, Options

_SECRETS = (pydantic.Secret, pydantic.SecretStr, pydantic.SecretBytes)


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
        inner = next((kind for kind in _types(field.annotation) if issubclass(kind, pydantic.BaseModel)), None)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _types(annotation: Any) -> Iterator[type]:
    """Classes that a type holds, as ``dict[str, Part] | None`` holds ``Part``."""
    if isinstance(kind := get_origin(annotation) or annotation, type):
        yield kind
    for argument in get_args(annotation):
        yield from _types(argument)


def require_sound(options: type[Options], owner: str) -> None:
    """Check what holds for options that are written out in a run's own file, and read from there again."""
    fields = options.model_fields.items()
    if aliased := [key for key, field in fields if field.alias or field.validation_alias or field.serialization_alias]:
        raise ValueError(f"{owner} gives {', '.join(aliased)} an alias: an option has the name of its field alone")
    if computed := sorted(options.model_computed_fields):
        raise ValueError(f"{owner} computes {', '.join(computed)}, which no run file can set: make it a property alone")
    if secret := [key for key, field in fields if any(issubclass(kind, _SECRETS) for kind in _types(field.annotation))]:
        raise ValueError(
            f"{owner} has secrets, {', '.join(secret)}, which would be written as asterisks and read back as such: "
            "take them from the environment"
        )
    defaults = {key: field.default for key, field in fields if not field.is_required() and not field.default_factory}
    try:
        made = _with_defaults(options, defaults, f"{owner} does not take its own default of")
        written = _written(made or options.model_construct(**defaults), defaults, owner)
        read = _with_defaults(options, written, f"{owner} does not read back from a run's own file its default of")
    except KdflowError:  # of a plugin that is named and not loaded yet: a run asks again
        return
    for key in defaults if made and read else ():
        if (before := getattr(made, key)) != (after := getattr(read, key)):
            raise ValueError(
                f"{owner} reads its default of {key}, {before!r}, back from a run's own file as {after!r}: give it a "
                "type that JSON holds"
            )


def _with_defaults(options: type[Options], values: Mapping[str, Any], refused: str) -> Options | None:
    """Options of these values; None where those alone do not make any, as where one has no default.

    Raises:
        ValueError: one of the values does not fit; begins with ``refused``.
    """
    try:
        return options(**values)
    except pydantic.ValidationError as error:
        if told := [f"{key}: {text}" for key, text in faults(error, options) if key.partition(".")[0] in values]:
            raise ValueError(f"{refused} {'; '.join(told)}") from None
        return None


def _written(made: Options, keys: Iterable[str], owner: str) -> dict[str, Any]:
    """The values of options as a run's own file holds them.

    Raises:
        ValueError: one of them cannot be written.
    """
    written = {}
    for key in keys:
        try:
            (written[key],) = to_jsonable_python(made.model_dump(include={key}, warnings=False)).values()
        except ValueError:
            raise ValueError(
                f"{owner} has a default of {key} that cannot be written to a run's own file, {getattr(made, key)!r}: "
                "give it a type that JSON holds, such as its name"
            ) from None
    return written


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean …?"`` with the known name that is nearest, or nothing."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    near = near or [other for other in known if other.replace("_", "") == name.replace("_", "").lower()]
    return f"; did you mean '{near[0]}'?" if near else ""
