"""Forms of divergences that the head's kernels compute in one go, with T the teacher and S the student."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True)
class MixtureKL:
    """``teacher · KL(T‖M) + student · KL(S‖M)`` with ``M = share · T + (1 - share) · S``."""

    teacher: float
    student: float
    share: float


@dataclass(frozen=True)
class AbsoluteDifference:
    """``½ Σ|T - S|``."""


@dataclass(frozen=True)
class SplitKL:
    """``h · KL(T‖S) + (1 - h) · KL(S‖T)``, h the share of ``Σ|T - S|`` in T's largest tokens of total mass ``mass``.

    The largest token is always one of them; those that tie for the last place share it. h has no gradient, and is ½
    where S = T.
    """

    mass: float


Form = MixtureKL | AbsoluteDifference | SplitKL


class Kind(IntEnum):
    """What a kernel does of them."""

    FORWARD, REVERSE, MIXTURE, ABSOLUTE, SPLIT = range(5)
