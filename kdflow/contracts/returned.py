"""What plugins return, looked at before it is used: types and shapes alone, since values may lie on a device."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING

from kdflow.contracts.algorithms import STEP_FIGURES, Algorithm, LossSum
from kdflow.contracts.data import Pair
from kdflow.contracts.engines import Lease, TeacherEngine
from kdflow.contracts.options import KdflowError

if TYPE_CHECKING:
    import torch


def require_loss(algorithm: Algorithm, returned: object) -> LossSum:
    """What an algorithm's ``loss`` returned.

    Raises:
        KdflowError: it is no :class:`LossSum`, or one without a scalar tensor, or its metrics are not pairs of a sum
            and a count under names of their own.
    """
    must = f"algorithm '{algorithm.name}': loss must return a kdflow.contracts.LossSum whose"
    if not isinstance(returned, LossSum):
        raise KdflowError(f"{must} value is a scalar tensor, but returned {_shown(returned)}")
    if not _is_tensor(returned.value, 0):
        raise KdflowError(f"{must} value is a scalar tensor, but its value is {_shown(returned.value)}")
    must += " metrics map names to pairs of a sum, which is a scalar tensor, and a count, which is a number, but"
    if not isinstance(returned.metrics, Mapping):
        raise KdflowError(f"{must} they are {_shown(returned.metrics)}")
    for name, metric in returned.metrics.items():
        if not isinstance(name, str) or not _is_sum_and_count(metric):
            raise KdflowError(f"{must} {name!r} maps to {_shown(metric)}")
    if taken := sorted(STEP_FIGURES & returned.metrics.keys()):
        raise KdflowError(
            f"algorithm '{algorithm.name}': its metrics {', '.join(taken)} have names of a step's own figures, which "
            f"are {', '.join(sorted(STEP_FIGURES))}; give them others"
        )
    return returned


def require_module(algorithm: Algorithm, returned: object) -> torch.nn.Module | None:
    """What an algorithm's ``build`` returned.

    Raises:
        KdflowError: it is neither a module nor None.
    """
    import torch

    if returned is None or isinstance(returned, torch.nn.Module):
        return returned
    raise KdflowError(
        f"algorithm '{algorithm.name}': build must return a torch.nn.Module that holds its parameters, or None, but "
        f"returned {_shown(returned)}"
    )


def require_prepared(algorithm: Algorithm, pair: Pair, returned: object) -> Pair:
    """What an algorithm's ``prepare`` made of a pair.

    Raises:
        KdflowError: it is no :class:`Pair`, or the student's targets are not what they were: the loss is a mean over
            them, and they were counted before.
    """
    import numpy as np

    must = f"algorithm '{algorithm.name}': prepare must return a kdflow.contracts.Pair"
    if not isinstance(returned, Pair):
        raise KdflowError(f"{must}, but returned {_shown(returned)}")
    if not np.array_equal(returned.student.targets, pair.student.targets):
        raise KdflowError(
            f"{must} with the student's targets as they are, but changed those of {pair.id}: a step's loss is divided "
            "by all of them. Drop targets of the teacher alone, with pair.with_teacher_targets, and leave the "
            "student's out in loss"
        )
    return returned


def require_leases(engine: TeacherEngine, returned: object, hidden_size: int) -> list[Lease]:
    """What a teacher engine's ``score_all`` returned.

    Raises:
        KdflowError: it is no list of leases on rows of ``hidden_size`` numbers.
    """
    if not isinstance(returned, list):
        raise KdflowError(
            f"teacher engine '{engine.name}': score_all must return a list of kdflow.contracts.Lease, but returned "
            f"{_shown(returned)}"
        )
    for lease in returned:
        must = f"teacher engine '{engine.name}': score must return a kdflow.contracts.Lease of rows [N, {hidden_size}]"
        if not isinstance(lease, Lease):
            raise KdflowError(f"{must}, but returned {_shown(lease)}")
        if not _is_tensor(lease.rows, 2) or lease.rows.shape[1] != hidden_size:
            raise KdflowError(f"{must}, but its rows are {_shown(lease.rows)}")
    return returned


def _is_sum_and_count(metric: object) -> bool:
    match metric:
        case (total, Real()):
            return _is_tensor(total, 0)
    return False


def _is_tensor(value: object, dimensions: int) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.ndim == dimensions


def _shown(value: object) -> str:
    shape = getattr(value, "shape", None)
    return reprlib.repr(value) if shape is None else f"a {type(value).__name__} of the shape {list(shape)}"
