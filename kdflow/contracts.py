"""What plugins and the runtime say to each other: dataclasses and base classes, and no torch at import.

Shapes used throughout: N target tokens of a micro-batch (positions whose *next* token is learnt), H hidden size,
V vocabulary size, T packed tokens, B sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

import pydantic

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from torch import Tensor


class KdflowError(Exception):
    """Something that the user can mend. The message says what was given, what was expected and what to do."""

    exit_code = 2


class TrainingStopped(KdflowError):
    """A run that had to stop: its message says at which step, why, and what was in the step."""

    exit_code = 1


class Options(pydantic.BaseModel):
    """Base of every plugin's options: strict about names, numbers coerced by the declared type, frozen."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _booleans_are_not_numbers(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if _mentions(annotation, int, float) and not _mentions(annotation, bool):
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, bool):
                    raise ValueError(f"must be a number, not {str(item).lower()}")
        return value


def _mentions(annotation: Any, *kinds: type) -> bool:
    return annotation in kinds or any(_mentions(part, *kinds) for part in get_args(annotation))


# --- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. ``learn`` marks a turn whose tokens are trained on."""

    role: str
    content: str
    learn: bool = False


@dataclass(frozen=True)
class Sample:
    """One example as text, before any tokenizer: a conversation, or a prompt (possibly empty) and a response."""

    messages: tuple[Message, ...] = ()
    prompt: str = ""
    response: str = ""


@dataclass(frozen=True)
class Tokens:
    """One sample in one model's tokens.

    Attributes:
        ids: token ids, int64 ``[t]``.
        targets: predicting positions, int64 ``[n]``, ascending: the token *after* each is learnt.
        response: number of the response that each target belongs to, int64 ``[n]``, from 0.
        text_bytes: UTF-8 bytes of text that the target tokens spell.
    """

    ids: np.ndarray
    targets: np.ndarray
    response: np.ndarray
    text_bytes: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Pair:
    """One sample as the student and the teacher see it; ``id`` tells file and line. No teacher: ``None``."""

    id: str
    student: Tokens
    teacher: Tokens | None = None


@dataclass(frozen=True)
class TokenBatch:
    """Packed sequences of one model.

    Attributes:
        input_ids: ``[T]``.
        position_ids: ``[T]``, from 0 in each sequence.
        cu_seqlens: ``[B + 1]`` int32, where sequences begin and end.
        targets: ``[N]``, predicting positions as indices into ``T``.
        response_of_target: ``[N]``, number of the response that each target belongs to, unique in the batch.
        longest: tokens of the longest sequence.
        digest: SHA-256 of ids and lengths; travels with the teacher's rows and is compared on arrival.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    targets: Tensor
    response_of_target: Tensor
    longest: int
    digest: str

    @property
    def labels(self) -> Tensor:
        """The token that each target position predicts, ``[N]``."""
        return self.input_ids[self.targets + 1]

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on ``device``."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in values.items() if hasattr(v, "to")})


@dataclass(frozen=True)
class Batch:
    """One micro-batch: both models' packed tokens, and the samples they come from."""

    student: TokenBatch
    teacher: TokenBatch | None
    sample_ids: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same micro-batch on ``device``."""
        return Batch(
            self.student.to(device), None if self.teacher is None else self.teacher.to(device), self.sample_ids
        )


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """An LM head: ``logits = softcap · tanh((h Wᵀ + bias) · scale / softcap)``.

    Attributes:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        scale: factor on the logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: Gemma 2's bound on the logits, or None.
        valid_vocab: ids at and above this are padding of the weight, no tokens: their logits are -inf.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, padding included."""
        return int(self.weight.shape[0])

    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that can be trained."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def with_parameters(self, parameters: Sequence[Tensor]) -> Head:
        """The same head on other tensors, in the order of :meth:`parameters`."""
        bias = parameters[1] if len(parameters) > 1 else None
        return Head(parameters[0], bias, self.scale, self.softcap, self.valid_vocab)

    def logits(self, rows: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        """Logits of ``rows [n, H]`` over ``columns`` (all), in fp32, or fp64 where the inputs are.

        The product runs in the inputs' dtype; columns are selected before it. Padding is -inf.
        """
        weight = self.weight if columns is None else self.weight[columns]
        logits = rows @ weight.to(rows.dtype).T
        if self.bias is not None:
            logits = logits + (self.bias if columns is None else self.bias[columns])
        if logits.element_size() < 4:
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        if self.valid_vocab is not None and self.valid_vocab < self.vocab_size:
            if columns is None:
                padding = logits.new_zeros(self.vocab_size).bool()
                padding[self.valid_vocab :] = True
            else:
                ids = columns if not isinstance(columns, slice) else self._ids(columns, rows)
                padding = ids >= self.valid_vocab
            logits = logits.masked_fill(padding, float("-inf"))
        return logits

    def _ids(self, columns: slice, rows: Tensor) -> Tensor:
        return rows.new_tensor(range(*columns.indices(self.vocab_size))).long()


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a model, known before its weights are loaded."""

    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class Side:
    """One model's view of a micro-batch. Student and teacher are each a Side, with their own N, H and V.

    Attributes:
        tokens: the packed tokens.
        rows: hidden states at the target positions, after the final norm, ``[N, H]``.
        head: the LM head over them.
        response_of_row: ``[N]``, number of the response that each row belongs to.
        embed: ``ids [n] -> [n, H]``; only where the algorithm's ``needs`` name ``"embeddings"``.
    """

    tokens: TokenBatch
    rows: Tensor
    head: Head
    response_of_row: Tensor
    embed: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class LossSum:
    """A loss as a scalar **sum** over target tokens, with its graph; the runtime divides once, globally.

    ``metrics`` maps a name to ``(sum, count)``, both summed over micro-batches and ranks before they are divided. An
    algorithm returns the same names for every micro-batch.
    """

    value: Tensor
    metrics: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)


# --- algorithms ------------------------------------------------------------------------------------------------------

NEEDS = frozenset({"teacher", "rollouts", "aligner", "same_vocabulary", "embeddings"})


class DivergenceOptions(Options):
    """What every divergence takes besides its own options."""

    temperature: float = pydantic.Field(1.0, gt=0)
    """Both sides' logits are divided by it, in fp32."""
    scale_by_temperature_squared: bool = False
    """Multiply the divergence by temperature², as Hinton et al. do (arXiv 1503.02531)."""


class Divergence(ABC):
    """A divergence between the student's and the teacher's next-token distributions: a complete algorithm.

    A subclass gives ``name``, ``Options`` if it has any, and :meth:`per_token`; the runtime adds chunking,
    temperature, the mask of padded vocabularies and a cross-entropy share.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    Options: ClassVar[type[Options]] = Options

    def __init__(
        self,
        options: pydantic.BaseModel | None = None,
        *,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
    ) -> None:
        self.options: Any = self.Options() if options is None else options
        self.temperature = temperature
        self.scale_by_temperature_squared = scale_by_temperature_squared

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
        """:meth:`per_token` of raw logits ``[n, V]``: to fp32 (fp64 stays), divided by the temperature, scaled."""
        prepared = (x if x.element_size() >= 4 else x.float() for x in (student_logits, teacher_logits))
        if self.temperature != 1.0:
            prepared = (x / self.temperature for x in prepared)
        values = self.per_token(*prepared)
        return values * self.temperature**2 if self.scale_by_temperature_squared else values


class Algorithm(ABC):
    """How a student learns from a micro-batch.

    Attributes:
        name: what a run file selects it by.
        paper: where it was defined.
        Options: its options, a pydantic model.
        needs: what the runtime must provide, of :data:`NEEDS`.
        module: what :meth:`build` returned, once the student is built: sharded, trained, saved and restored with it.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    Options: ClassVar[type[Options]] = Options
    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "same_vocabulary"})
    module: Any = None

    def __init__(self, options: pydantic.BaseModel | None = None) -> None:
        self.options: Any = self.Options() if options is None else options

    def prepare(self, pair: Pair) -> Pair:
        """Choose the rows wanted of each side by dropping targets; runs before packing. By default all are wanted."""
        return pair

    def build(self, student: ModelSpec, teacher: ModelSpec | None) -> torch.nn.Module | None:
        """Parameters of the algorithm's own, such as projectors; a child of the FSDP root, kept as ``self.module``."""
        return None

    @abstractmethod
    def loss(self, student: Side, teacher: Side | None, batch: Batch) -> LossSum:
        """The sum of the loss over the target tokens of a micro-batch, which may be empty (N = 0)."""


# --- alignment -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """Which tokens of two tokenizations belong together.

    Attributes:
        spans: monotone pairs ``(student slice, teacher slice)`` that partition both sides; a slice may be empty.
        path: for aligners that warp: pairs ``(student index, teacher index)``; the spans are its connected groups.
    """

    spans: tuple[tuple[slice, slice], ...]
    path: tuple[tuple[int, int], ...] | None = None


class Aligner(ABC):
    """Aligns two tokenizations of one response."""

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: pydantic.BaseModel | None = None) -> None:
        self.options: Any = self.Options() if options is None else options

    @abstractmethod
    def align(self, student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> Alignment:
        """Align content tokens, given as the bytes they stand for; the data step appends EOS ↔ EOS."""


# --- engines ---------------------------------------------------------------------------------------------------------


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


# --- data and tracking -----------------------------------------------------------------------------------------------


class DatasetReader(ABC):
    """Turns one record of a data file into a :class:`Sample`; ``name`` is the ``format`` of the run file."""

    name: ClassVar[str]
    paper: ClassVar[str | None] = None

    @abstractmethod
    def read(self, record: Mapping[str, Any]) -> Sample:
        """Read a record.

        Raises:
            ValueError: the record lacks a field or holds something else; the runtime adds file and line.
        """


class Tracker(ABC):
    """Hears every event of a run on rank 0: the objects of ``metrics.jsonl``, as they happen."""

    name: ClassVar[str]
    paper: ClassVar[str | None] = None

    @abstractmethod
    def start(self, directory: Path, run: Mapping[str, Any], first_step: int) -> None:
        """A run begins in ``directory`` with the resolved run file ``run``; ``first_step`` > 1 is a resumed run."""

    @abstractmethod
    def event(self, event: Mapping[str, Any]) -> None:
        """Something happened; ``event["event"]`` says what."""

    @abstractmethod
    def close(self) -> None:
        """The run is over, or has failed."""
