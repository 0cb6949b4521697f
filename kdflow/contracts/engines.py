"""Forward-only models, and those that teach."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic

from kdflow.contracts.models import ModelSpec
from kdflow.contracts.options import KdflowError, Options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdflow.contracts.data import TokenBatch
    from kdflow.contracts.models import Head


@dataclass(frozen=True)
class EngineContext:
    """Where an engine works, and how.

    Attributes:
        device: of the rank's student.
        dtype: in which it computes.
        compile: whether to.
        max_tokens: of the largest micro-batch.
        sleeps: whether it is put to sleep between its turns, which some engines prepare for.
    """

    device: torch.device
    dtype: torch.dtype
    compile: bool = False
    max_tokens: int = 4096
    sleeps: bool = False


@dataclass(frozen=True)
class ModelBytes:
    """What is known of a model before it is loaded, in bytes, but for ``max_tokens``.

    Attributes:
        weights: all of them, in the run's dtype.
        head: those of the LM head.
        root: those outside of the blocks: the head's, and those of embeddings that are not tied to it.
        token_cache: keys and values of a token.
        row: a hidden state.
        max_tokens: tokens of the largest micro-batch.
        device: the device's memory.
    """

    weights: int
    head: int
    root: int
    token_cache: int
    row: int
    max_tokens: int
    device: int


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
        self.model, self.context = model, context
        self.options: Any = options  # of the engine's own class

    @classmethod
    def device_bytes(cls, options: Any, model: ModelBytes, asleep: bool = False) -> int:
        """Bytes of the device that an engine with these options holds, awake or asleep; by default a whole model."""
        return model.weights

    @classmethod  # noqa: B027
    def require_installed(cls) -> None:
        """Check for packages that this engine alone needs, before anything of a run is made; by default there are none.

        Raises:
            KdflowError: one is not installed; says how it is.
        """

    @classmethod  # noqa: B027
    def require_updatable(cls, options: Any) -> None:
        """Check that an engine with these options takes new weights, before anything is loaded; by default it does.

        Only asked of engines that get the student's weights.

        Raises:
            KdflowError: it does not; says which option is in the way, and what to give in its place.
        """

    @property
    def restarts(self) -> int:
        """How often this rank had to start what runs the model again, and to ask it again."""
        return 0

    def sleep(self) -> None:  # noqa: B027
        """Free device memory until :meth:`wake`; runs ask it of those engines alone that define it."""

    def wake(self) -> None:  # noqa: B027
        """Undo :meth:`sleep`; an engine that is awake stays so."""

    @abstractmethod
    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take new weights, head included, by their Hugging Face names."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; nothing may be called afterwards."""


@dataclass(frozen=True)
class Transport:
    """How rows come from the teacher's model to the student.

    Attributes:
        name: such as ``in_process``, ``cuda_ipc`` or ``shared_memory``.
        copies_per_row: from the model's hidden states to where the student reads.
        bytes_per_row: of each copy.
    """

    name: str
    copies_per_row: int
    bytes_per_row: int


class TeacherEngine(Engine):
    """Gives the teacher's last hidden states at the target positions."""

    stored: ClassVar[bool] = False
    """Whether they were computed beforehand, so that the model does not run."""
    parity: float | None = None
    """How far log-probabilities recomputed from rows and head lay from the engine's own when they were compared last,
    as a share of their norm; of the rank that asks the engine, where there is such a comparison."""

    @property
    def overlaps(self) -> bool:
        """Whether it may score the next micro-batch, from another thread, while the student learns from this one."""
        return False

    @property
    def transport(self) -> Transport:
        """How rows arrive; by default they are the model's own, in the same process."""
        return Transport("in_process", 0, self.spec.hidden_size * self.context.dtype.itemsize)

    @property
    @abstractmethod
    def head(self) -> Head:
        """The teacher's head, on the context's device."""

    @property
    def spec(self) -> ModelSpec:
        """The teacher's sizes; by default those of the head."""
        vocab_size, hidden_size = self.head.weight.shape
        return ModelSpec(hidden_size, vocab_size)

    def embed(self, ids: Tensor) -> Tensor:
        """The teacher's input embeddings of ``ids [n]``, ``[n, H]``, for algorithms that need them.

        Raises:
            KdflowError: the engine has none.
        """
        raise KdflowError(f"teacher engine '{self.name}' gives no embeddings; use the engine transformers")

    @property
    def at_once(self) -> int:
        """How many micro-batches it is best given together: what it takes at a time, and lends at a time.

        More than one are for an engine that takes turns with the student. Another thread asks it for the next ones
        early, while rows may still be lent: it begins when these have been given back. One that :attr:`overlaps` is
        given them one by one. If the rows of several lie on the student's device, :meth:`device_bytes` counts these.
        """
        return 1

    @abstractmethod
    def score(self, batch: TokenBatch) -> Lease:
        """Prefill ``batch`` and lend the rows at its targets, in the teacher's dtype, with the batch's digest."""

    def score_all(self, batches: Sequence[TokenBatch]) -> list[Lease]:
        """:meth:`score` of each of at most :attr:`at_once` micro-batches; by default one after the other."""
        return [self.score(batch) for batch in batches]
