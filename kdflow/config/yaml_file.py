"""YAML 1.2 with the line of each key; what stands twice is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kdflow.contracts import KdflowError

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(0|[1-9][\d_]*)$|0x[\da-fA-F]+$")
_FLOAT = re.compile(r"[-+]?(\.\d+|\d[\d_]*(\.\d*)?)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_CIRCLE = "an alias (*NAME) stands inside the value that it repeats"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2: ``1e-5`` is a number; ``on``, ``1:30`` and ``2026-01-31`` are words."""

    yaml_implicit_resolvers: Any = {  # noqa: RUF012 - PyYAML's own name
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{_TAG}null", f"{_TAG}merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Keys are texts, as they are written: also ``null:``, ``true:`` and ``1:``."""
        self.flatten_mapping(node)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = f"{_TAG}str"
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(f"{_TAG}bool", _BOOL, list("tTfF"))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes a text such as ``'1e5'``, which only :class:`_Loader` takes for a number."""


_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


class _Twice(ValueError):
    """A key that stands twice, and the lines."""

    def __init__(self, key: str, line: int, first: int) -> None:
        super().__init__(f"the key '{key}' stands twice; keep one")
        self.key, self.line, self.first = key, line, first


def read(path: Path) -> tuple[Any, dict[str, int]]:
    """The content of a file, and the line of each dotted key.

    Raises:
        KdflowError: it is missing, is no YAML, or has a key twice; names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise KdflowError(f"{path}: there is no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise KdflowError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        where, character = f"{path}:{_line(text, error.position)}", repr(chr(error.character))
        raise KdflowError(f"{where}: the character {character} may not stand in YAML; take it out") from None
    lines: dict[str, int] = {}
    try:
        content = _content(loader, text, lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{_line(text, mark.index)}" if mark else str(path)
        raise KdflowError(f"{where}: this is no YAML: {_problem(error)}") from None
    except _Twice as error:
        told = f"the key '{error.key}' stands here and in line {error.first}; keep one"
        raise KdflowError(f"{path}:{error.line}: {told}") from None
    except ValueError as error:  # as of '!!int three'
        raise KdflowError(f"{path}: a value does not fit its tag: {error}") from None
    except RecursionError:
        raise KdflowError(f"{path}: {_CIRCLE}") from None
    return content, lines


def parse(text: str) -> Any:
    """The value that a text stands for.

    Raises:
        ValueError: it is no YAML, or has a key twice.
    """
    try:
        return _content(_Loader(text), text, {})
    except yaml.YAMLError as error:
        raise ValueError(_problem(error)) from None
    except RecursionError:
        raise ValueError(_CIRCLE) from None


def dump(value: Any) -> str:
    """A value as YAML that :func:`read` gives back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flow(value: Any) -> str:
    """A value on one line, as it can stand behind a key or in an override."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=1e9)
    return text.removesuffix("\n").removesuffix("\n...")


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error)


def _line(text: str, index: int) -> int:
    """The line of a character, as editors count: to YAML, U+2028 and others break lines too."""
    return text.count("\n", 0, index) + 1


def _content(loader: _Loader, text: str, lines: dict[str, int]) -> Any:
    """What ``text`` holds; the line of each key is noted in ``lines``."""
    try:
        node = loader.get_single_node()
        _scan(node, "", text, lines)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _scan(node: yaml.Node | None, prefix: str, text: str, lines: dict[str, int]) -> None:
    """Note the line of each key, and refuse a key that stands twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", _line(text, key.start_mark.index)
            if name in lines:
                raise _Twice(name, line, lines[name])
            lines[name] = line
            _scan(value, f"{name}.", text, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines.setdefault(f"{prefix}{index}", _line(text, item.start_mark.index))
            _scan(item, f"{prefix}{index}.", text, lines)
