"""Functions that numba translates into machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: the function is compiled when it is called first, in some seconds, and runs without the GIL.

    The machine code is kept on disk, beside the function's module or in the user's cache; where neither can be written
    to, every process makes its own.

    Args:
        options: of ``numba.njit``.
    """
    import numba  # here, since it takes a while, and most runs compile nothing

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(function, cache=True, nogil=True, **options)
        except RuntimeError:
            return numba.njit(function, nogil=True, **options)

    return decorate
