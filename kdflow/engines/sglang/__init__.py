"""SGLang as a teacher, whose hidden states arrive without a detour, and as what lets the student write.

The processes, and what is between them::

    student (the run) ──ids, over a socket──► engine (server.py) ──► schedulers, a process a GPU
          ▲                                                              │ forward hook (exporter.py)
          └──────────── slots (slots.py): memory of the student ◄── target rows

An engine that writes (rollout.py), and a teacher that follows the student, get its weights through memory that both map
(weights.py). Nothing of this needs sglang before an engine is made.
"""

from __future__ import annotations

from collections.abc import Iterable

from kdflow.contracts import RolloutEngine, TeacherEngine
from kdflow.engines.sglang.rollout import SGLangRollout
from kdflow.engines.sglang.teacher import SGLangTeacher
from kdflow.hookspecs import hookimpl


@hookimpl
def kdflow_teachers() -> Iterable[type[TeacherEngine]]:
    """The teacher engine of this module."""
    return [SGLangTeacher]


@hookimpl
def kdflow_rollouts() -> Iterable[type[RolloutEngine]]:
    """The rollout engine of this module."""
    return [SGLangRollout]
