"""A teacher whose target rows were stored beforehand: ``kdflow cache`` writes a capture, the engine reads it.

A capture is a directory::

    capture.json               whose rows these are: hashes of the teacher, engine and dtype
    head.safetensors           the teacher's head and, where the engine gave them, its input embeddings
    rows-00000.safetensors …   shards of target rows, sequence by sequence (shards.py)

Rows are found by the teacher's tokens, so that order, packing, ranks, student and loss of a run are free.
"""

from __future__ import annotations

from collections.abc import Iterable

from kdflow.contracts import TeacherEngine
from kdflow.engines.cache.teacher import CacheTeacher
from kdflow.hookspecs import hookimpl


@hookimpl
def kdflow_teachers() -> Iterable[type[TeacherEngine]]:
    """The teacher engine of this module."""
    return [CacheTeacher]
