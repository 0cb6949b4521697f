"""SGLang as a teacher: an engine in a process of its own, whose hidden states arrive without a detour.

The processes, and what is between them::

    student (the run) ──ids, over a socket──► engine (server.py) ──► schedulers, a process a GPU
          ▲                                                              │ forward hook (exporter.py)
          └──────────── slots (slots.py): memory of the student ◄── target rows

Nothing of this needs sglang before a teacher is made.
"""

from __future__ import annotations

from collections.abc import Iterable

from kdflow.contracts import TeacherEngine
from kdflow.engines.sglang.teacher import SGLangTeacher
from kdflow.hookspecs import hookimpl


@hookimpl
def kdflow_teachers() -> Iterable[type[TeacherEngine]]:
    """The teacher engine of this module."""
    return [SGLangTeacher]
