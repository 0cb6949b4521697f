"""kdflow distils large language models: a minimal FSDP2 + SGLang runtime in which every algorithm is a plugin.

The names below are imported when they are first used, so that ``import kdflow`` stays quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kdflow._version import __version__

if TYPE_CHECKING:
    from kdflow import ops as ops
    from kdflow import testing as testing
    from kdflow import tokenizers as tokenizers
    from kdflow.contracts import Algorithm as Algorithm
    from kdflow.contracts import Aligner as Aligner
    from kdflow.contracts import DatasetReader as DatasetReader
    from kdflow.contracts import Divergence as Divergence
    from kdflow.contracts import Evaluator as Evaluator
    from kdflow.contracts import Head as Head
    from kdflow.contracts import KdflowError as KdflowError
    from kdflow.contracts import Options as Options
    from kdflow.contracts import RolloutEngine as RolloutEngine
    from kdflow.contracts import TeacherEngine as TeacherEngine
    from kdflow.contracts import Tracker as Tracker
    from kdflow.hookspecs import hookimpl as hookimpl
    from kdflow.plugins import get_algorithm as get_algorithm
    from kdflow.plugins import get_aligner as get_aligner
    from kdflow.plugins import get_divergence as get_divergence
    from kdflow.runtime.run import RunResult as RunResult
    from kdflow.runtime.run import train as train

_NAMES = {
    **dict.fromkeys(("Algorithm", "Aligner", "DatasetReader", "Divergence", "Evaluator", "Head", "KdflowError",
                     "Options", "RolloutEngine", "TeacherEngine", "Tracker"), "kdflow.contracts"),
    **dict.fromkeys(("get_algorithm", "get_aligner", "get_divergence"), "kdflow.plugins"),
    **dict.fromkeys(("RunResult", "train"), "kdflow.runtime.run"),
    "hookimpl": "kdflow.hookspecs",
}  # fmt: skip
_ROOMS = ("ops", "testing", "tokenizers")

__all__ = ["__version__", *_NAMES, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"kdflow.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'kdflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
