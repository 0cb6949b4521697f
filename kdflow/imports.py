"""How large libraries are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_frozen = False


@contextmanager
def large_imports() -> Iterator[None]:
    """While torch, transformers and the like are imported, the garbage collector rests; what they make stays.

    That is half a million objects. To look through them again and again, while they are made and whenever a library
    asks for it afterwards, took a third of a short run's time. Only the first import of a process is one of libraries
    alone, so that others change nothing.
    """
    global _frozen
    if _frozen:
        yield
        return
    _frozen = True
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
