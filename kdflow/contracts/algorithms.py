"""Divergences, algorithms and aligners."""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import pydantic

from kdflow.contracts.options import Configured, KdflowError, Options

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from kdflow.contracts.data import Batch, Pair
    from kdflow.contracts.models import ModelSpec, Side


@dataclass(frozen=True)
class LossSum:
    """A loss as a scalar **sum** over target tokens, with its graph; the runtime divides once, globally.

    ``metrics`` maps a name to ``(sum, count)``, both summed over micro-batches and ranks before they are divided. An
    algorithm returns the same names for every micro-batch, with a sum and a count of 0 where there is nothing to count,
    and none of :data:`STEP_FIGURES`.
    """

    value: Tensor
    metrics: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)


# What the runtime itself tells of a step: no metric of an algorithm has one of these names.
STEP_FIGURES = frozenset({
    "event", "step", "loss", "grad_norm", "learning_rate", "engine_restarts", "target_tokens", "tokens", "seconds",
    "phases", "samples", "epoch", "memory_bytes", "flops_per_second", "flops_utilisation", "teacher_parity", "rollouts",
    "rollout_tokens", "rollout_stopped", "rollout_cut", "rollout_gap", "aligned_one_to_one", "aligned_spanning",
    "aligned_unmatched",
})  # fmt: skip

NEEDS = frozenset({"teacher", "rollouts", "aligner", "same_vocabulary", "embeddings"})


# Far below any that softens a distribution, and far above those over which logits are infinite in fp32.
LEAST_TEMPERATURE = 1e-6


class DivergenceOptions(Options):
    """What every divergence takes besides its own options."""

    temperature: float = pydantic.Field(1.0, ge=LEAST_TEMPERATURE)
    """Both sides' logits are divided by it, in fp32."""
    scale_by_temperature_squared: bool = False
    """Multiply the divergence by temperature², as Hinton et al. do (arXiv 1503.02531)."""


class Divergence(Configured):
    """A divergence between the student's and the teacher's next-token distributions: a complete algorithm.

    A subclass gives ``name``, ``Options`` if it has any, and :meth:`per_token`; the runtime adds chunking,
    temperature, the mask of padded vocabularies and a cross-entropy share.
    """

    across_vocabularies: bool = False
    """Whether the two sides may have different numbers of columns; otherwise both are cut to the shared ones."""

    def __init__(
        self,
        options: pydantic.BaseModel | None = None,
        *,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
    ) -> None:
        super().__init__(options)
        self.temperature = temperature
        self.scale_by_temperature_squared = scale_by_temperature_squared

    @property
    def fused(self) -> Any:
        """The form (:mod:`kdflow.ops.forms`) that :meth:`per_token` has, for which there is a kernel; None: no form.

        It counts where the same class defines both, so that a subclass with another :meth:`per_token` has none.
        """
        return None

    @classmethod
    def configured(cls, options: Any) -> Self:
        """An instance from one model that holds its own options and those of :class:`DivergenceOptions`."""
        own = cls.Options(**{name: getattr(options, name) for name in cls.Options.model_fields})
        return cls(own, **{name: getattr(options, name) for name in DivergenceOptions.model_fields})

    def at(self, temperature: float) -> Self:
        """The same divergence at another temperature."""
        scaled = self.scale_by_temperature_squared
        return type(self)(self.options, temperature=temperature, scale_by_temperature_squared=scaled)

    @abstractmethod
    def per_token(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The divergence of each row.

        Args:
            student_logits: ``[n, V]``, fp32 or fp64, divided by the temperature already, padding at -inf.
            teacher_logits: ``[n, V]``, likewise.

        Returns:
            ``[n]``, in nats.
        """

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """:meth:`per_token` of raw logits ``[n, V]``: to fp32 (fp64 stays), divided by the temperature, scaled.

        Raises:
            KdflowError: :meth:`per_token` gives something else than a number for each row.
        """
        prepared = (x if x.element_size() >= 4 else x.float() for x in (student_logits, teacher_logits))
        if self.temperature != 1.0:
            prepared = (x / self.temperature for x in prepared)
        values = self.per_token(*prepared)
        shape, expected = getattr(values, "shape", None), student_logits.shape[:-1]
        if shape != expected:
            found = type(values).__name__ if shape is None else f"the shape {list(shape)}"
            raise KdflowError(
                f"divergence '{self.name}': per_token must give a value for each row, of the shape {list(expected)}, "
                f"but gives {found}; kdflow.testing.check_divergence checks this and more"
            )
        return values * self.temperature**2 if self.scale_by_temperature_squared else values


class Algorithm(Configured):
    """How a student learns from a micro-batch.

    An option called ``on_policy`` stands for the run's ``rollout.fraction``, and gives it a default.

    Attributes:
        needs: what the runtime must provide, of :data:`NEEDS`; the options of an instance may narrow it.
        module: what :meth:`build` returned, once the student is built: sharded, trained, saved and restored with it.
            Buffers that are persistent are saved too; they must hold the same on every rank, and keep their shape.
        learning_rate: of the module's parameters, at the top of the run's schedule; None: the run's own.
    """

    needs: frozenset[str] = frozenset({"teacher", "same_vocabulary"})
    module: Any = None
    learning_rate: float | None = None

    @property
    def aligner(self) -> Mapping[str, Any]:
        """The aligner wanted where ``needs`` name one, as a run file would: its name, and its options."""
        return {"name": "byte_span"}

    def prepare(self, pair: Pair) -> Pair:
        """Choose the teacher's rows by dropping targets of the teacher; runs before packing. By default all are wanted.

        The student's targets stay: the loss is a mean over them, and what is changed of them is refused.
        """
        return pair

    def build(self, student: ModelSpec, teacher: ModelSpec | None) -> torch.nn.Module | None:
        """Parameters of the algorithm's own, such as projectors; a child of the FSDP root, kept as ``self.module``."""
        return None

    @abstractmethod
    def loss(self, student: Side, teacher: Side | None, batch: Batch) -> LossSum:
        """The sum of the loss over the target tokens of a micro-batch, which may be empty (N = 0)."""


class Alignment:
    """Which tokens of two tokenizations belong together, made from spans or from their stops alone.

    Attributes:
        spans: monotone pairs ``(student slice, teacher slice)`` that partition both sides; a slice may be empty.
        path: for aligners that warp: monotone pairs ``(student index, teacher index)`` of tokens that both sides have;
            the spans are its connected groups.
        stops: where each span stops, the student's side and the teacher's, int64 ``[2, m]``: the same as ``spans``,
            without an object for each. Whichever is not given is made when it is asked for.
    """

    def __init__(
        self, spans: Sequence[tuple[slice, slice]] | None = None, path: tuple[tuple[int, int], ...] | None = None, *,
        stops: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        if (spans is None) == (stops is None):
            raise TypeError("an alignment is made of its spans or of their stops: give one of the two")
        self.path = path
        if spans is not None:
            self.spans = tuple(spans)
        if stops is not None:
            self.stops = stops

    @cached_property
    def spans(self) -> tuple[tuple[slice, slice], ...]:
        """Pairs of slices."""
        ours, theirs = (map(slice, [0, *side], side) for side in self.stops.tolist())
        # Nothing that is made here is garbage; in a long response the collector would go over it again and again.
        enabled = gc.isenabled()
        gc.disable()
        try:
            return tuple(zip(ours, theirs, strict=True))
        finally:
            if enabled:
                gc.enable()

    @cached_property
    def stops(self) -> np.ndarray:
        """Where they stop."""
        import numpy as np

        return np.array([(ours.stop, theirs.stop) for ours, theirs in self.spans], np.int64).reshape(-1, 2).T

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alignment) and (self.spans, self.path) == (other.spans, other.path)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Alignment(spans={self.spans}, path={self.path})"


class Aligner(Configured):
    """Aligns two tokenizations of one response."""

    @abstractmethod
    def align(self, student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> Alignment:
        """Align content tokens, given as the bytes they stand for; the data step appends EOS ↔ EOS."""
