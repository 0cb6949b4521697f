"""What is wrong with options and with keys of a run file, in sentences."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pydantic

from kdflow.contracts import KdflowError, Options

_UNIONS = (Union, UnionType)  # Union[A, B], and A | B


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
        keys, there = _at(model, fault["loc"])
        key = ".".join(keys)
        if fault["type"] == "extra_forbidden":
            _, owner = _at(model, fault["loc"][:-1])
            fields = [*_fields(owner), *also]
            hint = nearest(keys[-1], fields) or f"; known keys: {', '.join(fields) or 'none'}"
            found.append((key, f"unknown key{hint}"))
        elif fault["type"] == "missing":
            found.append((key, "this key is needed"))
        else:
            text = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "model_type":
                text = f"must be a section with the keys {', '.join(_fields(there))}"
            given = fault["input"]
            if isinstance(given, str | int | float | None) and ", not " not in text:
                text += f", not {given!r}"
            found.append((key, f"{text[:1].lower()}{text[1:]}"))
    return found


def _at(annotation: Any, path: Sequence[str | int]) -> tuple[list[str], Any]:
    """The keys that a user writes for pydantic's ``path`` inside a type, and the type that is there, if it can be told.

    The path also names which member of a union it goes through, and that is no key.
    """
    keys = []
    for part in path:
        annotation = _bare(annotation)
        if get_origin(annotation) in _UNIONS:
            name = str(part).partition("[")[0]  # such as "list[Part]"
            annotation = next((one for one in get_args(annotation) if _name(one) == name), None)
            continue
        keys.append(str(part))
        if _is_model(annotation):
            field = annotation.model_fields.get(part)
            annotation = field and field.annotation
        else:
            held = [one for one in get_args(annotation) if one is not ...]
            annotation = held[-1] if held else None  # of a list's items, of a mapping's values
    return keys, _bare(annotation)


def _bare(annotation: Any) -> Any:
    """A type without what is said about it, and without None beside it, for which pydantic's paths have no part."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in _UNIONS:
        members = [one for one in get_args(annotation) if one is not NoneType]
        return _bare(members[0]) if len(members) == 1 else annotation
    return annotation


def _name(annotation: Any) -> str | None:
    bare = _bare(annotation)
    return getattr(get_origin(bare) or bare, "__name__", None)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)


def _fields(annotation: Any) -> list[str]:
    return list(annotation.model_fields) if _is_model(annotation) else []


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
