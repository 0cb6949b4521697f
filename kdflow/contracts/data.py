"""Samples on their way from text to packed micro-batches, and who reads them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from kdflow.contracts.options import Configured

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: who speaks.
        content: what is said.
        learn: whether its tokens are trained on.
        extra: what else a chat template may read, such as ``tool_calls``.
    """

    role: str
    content: str
    learn: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One example as text, before any tokenizer: a conversation, or a prompt (possibly empty) and a response.

    ``tools`` are the JSON schemas that a chat template describes to the model.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
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


class DatasetReader(Configured):
    """Turns one record of a data source into a :class:`Sample`; ``name`` is the ``format`` of the run file.

    ``Options`` are read from the source's section of the run file.
    """

    @abstractmethod
    def read(self, record: Mapping[str, Any]) -> Sample:
        """Read a record.

        Raises:
            ValueError: the record lacks a field or holds something else; the runtime adds where it stands.
        """
