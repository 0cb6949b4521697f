"""Forward-only models: teachers and rollouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pydantic

from kdflow.contracts.options import Options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdflow.contracts.data import TokenBatch
    from kdflow.contracts.models import Head, ModelSpec


@dataclass(frozen=True)
class EngineContext:
    """Where an engine works: its device, its dtype, and whether to compile."""

    device: torch.device
    dtype: torch.dtype
    compile: bool = False


class Lease:
    """Rows ``[N, H]`` that an engine lends until :meth:`release`, which follows the backward pass that used them."""

    def __init__(self, rows: Tensor, digest: str, on_release: Callable[[], None] | None = None) -> None:
        self.rows, self.digest, self._on_release = rows, digest, on_release

    def release(self) -> None:
        """Give the rows back; a second call does nothing."""
        callback, self._on_release = self._on_release, None
        if callback is not None:
            callback()


class Engine(ABC):
    """A forward-only model. ``Options`` are read from the run file's ``engine`` section."""

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    Options: ClassVar[type[Options]] = Options

    def __init__(self, model: str, options: pydantic.BaseModel, context: EngineContext) -> None:
        self.model, self.options, self.context = model, options, context

    def sleep(self) -> None:  # noqa: B027 - most engines need nothing here
        """Free device memory until :meth:`wake`. An engine that cannot keeps it."""

    def wake(self) -> None:  # noqa: B027
        """Undo :meth:`sleep`."""

    @abstractmethod
    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take new weights, head included, by their Hugging Face names."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; nothing may be called afterwards."""


class TeacherEngine(Engine):
    """Gives the teacher's last hidden states at the target positions."""

    @property
    @abstractmethod
    def head(self) -> Head:
        """The teacher's head, on the context's device."""

    @property
    @abstractmethod
    def spec(self) -> ModelSpec:
        """The teacher's sizes."""

    @abstractmethod
    def score(self, batch: TokenBatch) -> Lease:
        """Prefill ``batch`` and lend the rows at its targets, in the teacher's dtype, with the batch's digest."""


@dataclass(frozen=True)
class Sampling:
    """How a rollout engine samples."""

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1


@dataclass(frozen=True)
class Rollout:
    """Sampled ids, and the log-probability of each as it was sampled."""

    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]


class RolloutEngine(Engine):
    """Lets a model write responses."""

    @abstractmethod
    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Rollout]:
        """``sampling.n`` responses to each prompt, prompt by prompt."""
