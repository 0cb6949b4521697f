"""Options that several algorithms have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pydantic
import torch
from torch import Tensor

import kdflow
from kdflow.contracts import LEAST_TEMPERATURE, Divergence, LossSum, Pair, Side
from kdflow.ops import cross_entropy_sum
from kdflow.ops.cross_entropy import weighted
from kdflow.ops.kd import CEOptions


class DivergenceChoice(CEOptions):
    """A divergence that an algorithm uses on distributions of its own making."""

    divergence: str | dict[str, Any] = "forward_kl"
    """A registered divergence, by its name or, with options, as a section: {name: jsd, beta: 0.3}."""
    temperature: float = pydantic.Field(1.0, ge=LEAST_TEMPERATURE)
    """Both sides' logits are divided by it, in fp32."""

    @pydantic.field_validator("divergence")
    @classmethod
    def _names_one(cls, divergence: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(divergence, dict) and "name" not in divergence:
            raise ValueError("a section needs the key name, such as {name: jsd, beta: 0.3}")
        return require_own_options(divergence, "temperature")

    def make_divergence(self) -> Divergence:
        """The divergence, at this temperature.

        Raises:
            KdflowError: there is none of this name, or it has no such option.
        """
        section = {"name": self.divergence} if isinstance(self.divergence, str) else self.divergence
        return kdflow.get_divergence(**section, temperature=self.temperature)


def require_own_options(divergence: str | dict[str, Any], *shared: str) -> str | dict[str, Any]:
    """A divergence as an option names it, whose section holds none of the options that stand beside it."""
    if twice := [name for name in shared if name in divergence] if isinstance(divergence, dict) else []:
        raise ValueError(f"{', '.join(twice)} stands beside divergence, not in its section")
    return divergence


def mixed(kd: Tensor, pairs: int, student: Side, ce_weight: float, metrics: Mapping[str, Any] | None = None) -> LossSum:
    """``(1 - ce_weight) · kd + ce_weight · CE`` over all of the student's targets, and both parts as metrics.

    Args:
        kd: the sum of the distillation's terms.
        pairs: how many terms it is a sum of.
        student: its rows and reference tokens.
        ce_weight: share of the cross-entropy; at 0 it is not computed, at 1 the distillation has no gradient.
        metrics: others.
    """
    found = {"kd": (kd.detach(), float(pairs)), **(metrics or {})}
    if ce_weight == 0.0:
        return LossSum(kd, found)
    labels = student.tokens.labels
    ce = cross_entropy_sum(student.rows, student.head, labels)
    found["ce"] = (ce.detach(), float(len(labels)))
    return LossSum(weighted(kd, ce, ce_weight), found)


def one_to_one_alone(pair: Pair) -> Pair:
    """The pair with those of the teacher's rows alone that are aligned one-to-one."""
    assert pair.alignment is not None
    _, theirs = pair.alignment.one_to_one()
    return pair.with_teacher_targets(np.isin(np.arange(len(pair.alignment.teacher)), theirs))


def on_device(numbers: np.ndarray, like: Tensor) -> Tensor:
    """Row numbers made on the host, beside the rows."""
    return torch.from_numpy(numbers).to(like.device, non_blocking=True)
