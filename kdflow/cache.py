"""Where kdflow keeps what it fetched or computed once."""

from __future__ import annotations

import hashlib
import inspect
import os
from pathlib import Path

from kdflow.contracts import KdflowError


def cache_directory() -> Path:
    """``$KDFLOW_CACHE``, or ``~/.cache/kdflow``."""
    return Path(os.environ.get("KDFLOW_CACHE") or "~/.cache/kdflow").expanduser()


def cache_folder(name: str) -> Path:
    """A folder of it, which is made.

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
    """What a class is, by name and by the source of its module, so that a plugin that changed is run again."""
    module = inspect.getmodule(cls)
    source = inspect.getsource(module) if module is not None else ""
    return f"{cls.__module__}.{cls.__qualname__} {hashlib.sha256(source.encode()).hexdigest()}"
