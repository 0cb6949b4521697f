"""Samples on their way from text to packed micro-batches, and who reads them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kdflow.contracts.options import Configured, KdflowError

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

    ``tools`` are the JSON schemas that a chat template describes to the model. ``teacher_prompt`` is what the teacher
    sees in the place of the prompt, or, of a conversation, as its system prompt. ``unfinished`` says that the last
    response was cut off, so that no end is learnt with it.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    prompt: str = ""
    response: str = ""
    teacher_prompt: str | None = None
    unfinished: bool = False

    def for_teacher(self) -> Sample:
        """The sample as the teacher sees it."""
        if self.teacher_prompt is None:
            return self
        if not self.messages:
            return replace(self, prompt=self.teacher_prompt)
        turns = self.messages[1:] if self.messages[0].role == "system" else self.messages
        return replace(self, messages=(Message("system", self.teacher_prompt), *turns))


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
class TargetAlignment:
    """Which target tokens of the two sides belong together, of one sample or of a micro-batch; kept on the host.

    Attributes:
        student: number of the span that each of the student's targets lies in, int64 ``[n_s]``, from 0, ascending; -1
            where no token of the teacher corresponds.
        teacher: likewise, int64 ``[n_t]``.
        path: of an aligner that warps, the pairs ``(student target, teacher target)``, int64 ``[k, 2]``.
    """

    student: np.ndarray
    teacher: np.ndarray
    path: np.ndarray | None = None

    @property
    def spans(self) -> int:
        """How many spans are numbered; without the teacher's targets that were dropped, some may be empty."""
        return int(max(self.student.max(initial=-1), self.teacher.max(initial=-1))) + 1

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """How many targets of either side each span holds."""
        import numpy as np

        found = [np.bincount(side[side >= 0], minlength=self.spans) for side in (self.student, self.teacher)]
        return found[0], found[1]

    def one_to_one(self) -> tuple[np.ndarray, np.ndarray]:
        """The targets of the student and of the teacher, pair by pair, that are a span of one token on both sides."""
        import numpy as np

        ours, theirs = self.counts()
        alone = np.append((ours == 1) & (theirs == 1), False)  # the number -1 finds the last
        return np.flatnonzero(alone[self.student]), np.flatnonzero(alone[self.teacher])

    def shares(self) -> dict[str, int]:
        """How many of the student's targets are aligned one-to-one, lie in longer spans, or are not aligned."""
        one_to_one, aligned = len(self.one_to_one()[0]), int((self.student >= 0).sum())
        return {"one_to_one": one_to_one, "spanning": aligned - one_to_one, "unmatched": len(self.student) - aligned}


@dataclass(frozen=True)
class Pair:
    """One sample as the student and the teacher see it.

    Attributes:
        id: tells file and line.
        student: its tokens.
        teacher: the teacher's, None where there is none.
        alignment: for algorithms that need an aligner.
        sampled: of a response that the student wrote, the log-probability of each of its targets when it was drawn, in
            nats, ``[n]``; None of the data's own.
        chat: whether it is a conversation, whose turns end as chat templates have it, or plain text.
    """

    id: str
    student: Tokens
    teacher: Tokens | None = None
    alignment: TargetAlignment | None = None
    sampled: np.ndarray | None = None
    chat: bool = False

    def with_teacher_targets(self, wanted: np.ndarray) -> Pair:
        """The same with those targets of the teacher alone that the mask ``wanted [n_t]`` names.

        An algorithm's ``prepare`` drops with it the rows that it has no use for; the student's stay, since the loss is
        a mean over them.

        Raises:
            KdflowError: nothing tells which of the student's rows the teacher's are of: there is no alignment.
        """
        if self.teacher is None or self.alignment is None:
            raise KdflowError(
                f"{self.id}: targets of the teacher are dropped by how the sides are aligned, and this pair is not: "
                "let the algorithm's needs name 'teacher' and 'aligner', or leave out rows in its loss"
            )
        import numpy as np

        teacher = replace(self.teacher, targets=self.teacher.targets[wanted], response=self.teacher.response[wanted])
        path = self.alignment.path
        if path is not None:
            path = path[wanted[path[:, 1]]]
            path = np.stack([path[:, 0], (np.cumsum(wanted) - 1)[path[:, 1]]], axis=1)
        alignment = TargetAlignment(self.alignment.student, self.alignment.teacher[wanted], path)
        return replace(self, teacher=teacher, alignment=alignment)


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
        host: the batch in host memory that this one was copied from, None where there was none.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    targets: Tensor
    response_of_target: Tensor
    longest: int
    digest: str
    host: TokenBatch | None = field(default=None, repr=False, compare=False)

    @property
    def on_host(self) -> TokenBatch:
        """The same batch in host memory, without a copy where it came from there."""
        if self.host is not None or self.input_ids.device.type == "cpu":
            return self.host or self
        import torch

        return self.to(torch.device("cpu"))

    @property
    def labels(self) -> Tensor:
        """The token that each target position predicts, ``[N]``."""
        return self.input_ids[self.targets + 1]

    def sequences(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids ``[t]`` and targets in them ``[n]`` of each packed sequence that has targets; of a batch on the host."""
        import numpy as np

        ids, targets, bounds = self.input_ids.numpy(), self.targets.numpy(), self.cu_seqlens.numpy()
        firsts = np.searchsorted(targets, bounds)
        places = targets - np.repeat(bounds[:-1], np.diff(firsts))
        for (start, end), (first, last) in zip(pairwise(bounds.tolist()), pairwise(firsts.tolist()), strict=True):
            if first < last:
                yield ids[start:end], places[first:last]

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on ``device``."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "host"}
        tensors = {name: value for name, value in values.items() if hasattr(value, "to")}
        arrives = self.input_ids.device.type == "cpu" != device.type
        if arrives and device.type == "cuda":  # of other memory, a larger copy waits for all that the device has to do
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        host = self if arrives else self.host
        return replace(self, **moved, host=host)


@dataclass(frozen=True)
class Batch:
    """One micro-batch: both models' packed tokens, how they are aligned, and the samples they come from.

    ``sampled [N]``, on the host, holds the log-probabilities with which the student drew its targets, NaN of others.
    """

    student: TokenBatch
    teacher: TokenBatch | None
    sample_ids: tuple[str, ...] = ()
    alignment: TargetAlignment | None = None
    sampled: np.ndarray | None = None

    def to(self, device: torch.device) -> Batch:
        """The same micro-batch on ``device``."""
        teacher = None if self.teacher is None else self.teacher.to(device)
        return replace(self, student=self.student.to(device), teacher=teacher)


class DatasetReader(Configured):
    """Turns one record of a data source into a :class:`Sample`; ``name`` is the ``format`` of the run file.

    ``Options`` are read from the source's section of the run file.
    """

    @abstractmethod
    def read(self, record: Mapping[str, Any]) -> Sample:
        """Read a record.

        Raises:
            ValueError: the record lacks a field or holds something else; the runtime adds where it stands. Whatever
                else is raised is told as the reader's own failure at this record.
        """
