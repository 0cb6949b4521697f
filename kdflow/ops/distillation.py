"""What a kernel of the distillation head computes, besides the products: as objects, and as plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kdflow.contracts import Divergence, Head
from kdflow.ops.forms import AbsoluteDifference, Form, Kind, MixtureKL

_LN2 = math.log(2.0)


class Numbers(NamedTuple):
    """What a kernel computes with, besides the products; logarithms are binary.

    Attributes:
        kind: of the form.
        a, b, c: the form's numbers: of MIXTURE teacher, student and share, of SPLIT the mass.
        factor: on the divergence that the kernel tells.
        scale_s, scale_t, cap_s, cap_t: the heads' scales and soft-caps over ln 2; a cap of 0 is none.
        inv_t: one over the temperature of the divergence.
        kd_gain, ce_gain: weights of divergence and cross-entropy, times what a product's logit is scaled by.
    """

    kind: Kind
    a: float
    b: float
    c: float
    factor: float
    scale_s: float
    scale_t: float
    cap_s: float
    cap_t: float
    inv_t: float
    kd_gain: float
    ce_gain: float

    @property
    def jensen(self) -> bool:
        """Whether the mixture is ``a · T + b · S``."""
        return self.a == self.c and self.b == 1.0 - self.c


@dataclass(frozen=True)
class Distillation:
    """Everything but the student's tensors; see :func:`kdflow.ops.divergence_sum`."""

    student: Head
    teacher_rows: Tensor
    teacher: Head
    divergence: Divergence
    form: Form
    labels: Tensor | None
    ce_weight: float
    differentiate: bool

    def numbers(self) -> Numbers:
        """All that is the same for every row."""
        kind, a, b, c, factor = self._form()
        student, teacher, inv_t = self.student, self.teacher, 1.0 / self.divergence.temperature
        return Numbers(
            kind, a, b, c, factor, student.scale / _LN2, teacher.scale / _LN2,
            (student.softcap or 0.0) / _LN2, (teacher.softcap or 0.0) / _LN2, inv_t,
            kd_gain=(1.0 - self.ce_weight) * factor * inv_t * student.scale, ce_gain=self.ce_weight * student.scale,
        )  # fmt: skip

    def _form(self) -> tuple[Kind, float, float, float, float]:
        """The kind, its three numbers, and a factor on the divergence."""
        scaled = self.divergence.temperature**2 if self.divergence.scale_by_temperature_squared else 1.0
        form = self.form
        if isinstance(form, AbsoluteDifference):
            return Kind.ABSOLUTE, 0.0, 0.0, 0.0, scaled
        if not isinstance(form, MixtureKL):
            return Kind.SPLIT, form.mass, 0.0, 0.0, scaled
        if form.share == 0.0:  # M is S, and the student's term 0
            return Kind.FORWARD, 0.0, 0.0, 0.0, scaled * form.teacher
        if form.share == 1.0:
            return Kind.REVERSE, 0.0, 0.0, 0.0, scaled * form.student
        return Kind.MIXTURE, form.teacher, form.student, form.share, scaled

    @property
    def columns(self) -> tuple[int, int]:
        """How many take part in the divergence, and how many in the cross-entropy."""
        valid, others = (
            min(head.valid_vocab or head.vocab_size, head.vocab_size) for head in (self.student, self.teacher)
        )
        return min(valid, others), valid

    @property
    def one_softmax(self) -> bool:
        """Whether the cross-entropy, if there is one, has the softmax of the divergence's student."""
        shared, valid = self.columns
        return self.divergence.temperature == 1.0 and shared == valid
