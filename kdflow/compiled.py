"""Functions that numba translates into machine code."""

from __future__ import annotations

import importlib
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

    _use_whole_vectors()

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(function, cache=True, nogil=True, **options)
        except RuntimeError:
            return numba.njit(function, nogil=True, **options)

    return decorate


def _use_whole_vectors() -> None:
    """Let LLVM use AVX-512's registers whole, unless the user has said what it may use.

    For Intel's CPUs it prefers halves, by which the head's kernel takes 1.4 times as long (a Xeon of 2023).
    """
    codegen: Any = importlib.import_module("numba.core.codegen")
    if codegen.config.CPU_FEATURES is None and "+avx512f" in (features := codegen.get_host_cpu_features()):
        codegen.config.CPU_FEATURES = f"{features},-prefer-256-bit"
