"""Where kdflow keeps what it fetched or computed once."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from pathlib import Path

from kdflow.contracts import KdflowError


def cache_directory() -> Path:
    """``$KDFLOW_CACHE``, or ``~/.cache/kdflow``.

    Raises:
        KdflowError: there is no home.
    """
    try:
        return Path(os.environ.get("KDFLOW_CACHE") or "~/.cache/kdflow").expanduser()
    except RuntimeError as error:
        raise KdflowError(f"no folder for kdflow's cache: {error} Set KDFLOW_CACHE or HOME") from None


def cache_folder(name: str) -> Path:
    """A folder of the cache, made if it is missing.

    Raises:
        KdflowError: it cannot be made.
    """
    folder = cache_directory() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KdflowError(f"{folder} cannot be made: {error.strerror}; mend it, or set KDFLOW_CACHE") from None
    return folder


def code_of(cls: type) -> str:
    """What a class is, by name and by the source that it runs, so that a plugin that changed is run again.

    Of a class of kdflow that is its module alone: else any change of kdflow would empty every cache. Of another one it
    is all of its package, read from disk, since what is imported where it is used is not loaded yet, and the modules of
    the classes that it inherits from.
    """
    package = _package(cls)
    code = hashlib.sha256(_source(cls))
    if package != "kdflow":
        for folder in getattr(sys.modules.get(package), "__path__", ()):
            for file in sorted(Path(folder).rglob("*.py")):
                if file.is_file():  # an editor's lock may be a link to nowhere
                    code.update(file.read_bytes())
        seen = {package, "kdflow", *sys.stdlib_module_names}
        for base in cls.__mro__:
            if _package(base) not in seen:
                code.update(_source(base))
    return f"{cls.__module__}.{cls.__qualname__} {code.hexdigest()}"


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _source(cls: type) -> bytes:
    module = inspect.getmodule(cls)
    try:
        return inspect.getsource(module).encode() if module is not None else b""
    except (OSError, TypeError):  # compiled, or typed into a session
        return b""
