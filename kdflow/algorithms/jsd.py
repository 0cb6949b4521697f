"""Generalised Jensen-Shannon divergence, between forward and reverse KL."""

from __future__ import annotations

from collections.abc import Iterable

import pydantic
from torch import Tensor

from kdflow.contracts import Divergence, Options
from kdflow.hookspecs import hookimpl
from kdflow.ops.forms import MixtureKL
from kdflow.ops.logspace import kl, log_mixture, log_probabilities


class GeneralizedJSDOptions(Options):
    """Options of :class:`GeneralizedJSD`."""

    beta: float = pydantic.Field(0.5, ge=0, le=1)
    """Weight of the teacher in the mixture (TRL's β; it is 1 - β in DistiLLM and arXiv 2603.01875)."""


class GeneralizedJSD(Divergence):
    """β·KL(T‖M) + (1 - β)·KL(S‖M) with M = β·T + (1 - β)·S (Agarwal et al. 2023, GKD, arXiv 2306.13649, eq. 1).

    β = 0 is forward KL and β = 1 reverse KL, exactly, although both limits of the formula are 0.
    """

    name = "jsd"
    paper = "https://arxiv.org/abs/2306.13649"
    Options = GeneralizedJSDOptions

    @property
    def fused(self) -> MixtureKL:
        """At β = 0 and 1 the limits' own."""
        beta = self.options.beta
        return MixtureKL(beta or 1.0, (1.0 - beta) or 1.0, beta)

    def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The generalised JSD of each row, ``[n]``."""
        student, teacher = log_probabilities(student_logits, teacher_logits)
        beta: float = self.options.beta
        if beta == 0.0:
            return kl(teacher, student)
        if beta == 1.0:
            return kl(student, teacher)
        mixture = log_mixture(teacher, student, beta)
        return beta * kl(teacher, mixture) + (1.0 - beta) * kl(student, mixture)


@hookimpl
def kdflow_divergences() -> Iterable[type[Divergence]]:
    """The divergence of this module."""
    return [GeneralizedJSD]
