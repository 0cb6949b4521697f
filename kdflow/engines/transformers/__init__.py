"""The embedded default: a Hugging Face model in the same process, on CPU or GPU, exact."""

from __future__ import annotations

from collections.abc import Iterable

from kdflow.contracts import RolloutEngine, TeacherEngine
from kdflow.engines.transformers.rollout import TransformersRollout
from kdflow.engines.transformers.teacher import TransformersTeacher
from kdflow.hookspecs import hookimpl


@hookimpl
def kdflow_teachers() -> Iterable[type[TeacherEngine]]:
    """The teacher engine of this module."""
    return [TransformersTeacher]


@hookimpl
def kdflow_rollouts() -> Iterable[type[RolloutEngine]]:
    """The rollout engine of this module."""
    return [TransformersRollout]
