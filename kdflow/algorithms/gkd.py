"""On-policy distillation: a divergence, on responses of which the student writes a share itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import pydantic

import kdflow
from kdflow.algorithms._options import require_own_options
from kdflow.contracts import Algorithm
from kdflow.hookspecs import hookimpl
from kdflow.ops.kd import DivergenceAlgorithm, KDOptions


class GKDOptions(KDOptions):
    """Options of :class:`GKD`."""

    on_policy: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of the samples that the student answers itself (the paper's λ): the run's ``rollout.fraction``."""
    divergence: str | dict[str, Any] = "jsd"
    """A registered divergence, by its name or, with options, as a section: {name: skew_kl, skew: 0.1}."""
    beta: float = pydantic.Field(0.5, ge=0, le=1)
    """Weight of the teacher in the mixture of ``jsd``; other divergences have options of their own."""

    @pydantic.field_validator("divergence")
    @classmethod
    def _has_options_of_its_own(cls, divergence: str | dict[str, Any]) -> str | dict[str, Any]:
        return require_own_options(divergence, "temperature", "scale_by_temperature_squared")

    @pydantic.model_validator(mode="after")
    def _beta_is_of_jsd(self) -> Self:
        if self.section["name"] != "jsd" and self.beta != 0.5:
            raise ValueError(
                f"beta is an option of jsd; those of {self.section['name']} stand in the section divergence"
            )
        if isinstance(self.divergence, dict) and "beta" in self.divergence and self.beta != 0.5:
            raise ValueError("beta stands beside divergence and in its section, too; keep one")
        return self

    @property
    def section(self) -> dict[str, Any]:
        """The divergence's name and options."""
        section = {"name": self.divergence} if isinstance(self.divergence, str) else {"name": "jsd", **self.divergence}
        return {"beta": self.beta, **section} if section["name"] == "jsd" else section


class GKD(DivergenceAlgorithm):
    """Generalised JSD on a mixture of the student's own responses and the data's (Agarwal et al. 2023, algorithm 1).

    Gradients flow through the divergence alone, not through the sampling, as there.
    """

    name = "gkd"
    paper = "https://arxiv.org/abs/2306.13649"
    needs = frozenset({"teacher", "rollouts", "same_vocabulary"})
    Options = GKDOptions

    def __init__(self, options: Any = None) -> None:
        Algorithm.__init__(self, options)
        self.divergence = kdflow.get_divergence(
            **self.options.section,
            temperature=self.options.temperature,
            scale_by_temperature_squared=self.options.scale_by_temperature_squared,
        )


@hookimpl
def kdflow_algorithms() -> Iterable[type[Algorithm]]:
    """The algorithm of this module."""
    return [GKD]
