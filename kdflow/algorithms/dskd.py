"""Dual-space distillation: each model's hidden states, projected into the other's space and through its head."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import kdflow
from kdflow.algorithms._options import DivergenceChoice, mixed, on_device, one_to_one_alone
from kdflow.contracts import LEAST_TEMPERATURE, Algorithm, Batch, Head, LossSum, ModelSpec, Options, Pair, Side
from kdflow.hookspecs import hookimpl
from kdflow.ops import divergence_sum, row_sum
from kdflow.tokenizers.vocabulary import shared_ids

_MASKED = -1e5  # added to the attention between different responses; finite, so that no row is without a place to look


class DSKDOptions(DivergenceChoice):
    """Options of :class:`DSKD`."""

    divergence: str | dict[str, Any] = "reverse_kl"
    """Of the student from the projected teacher; any registered one, with options as a section."""
    alignment: Literal["same", "cma", "eta"] = "cma"
    """Same tokenizer; cross-model attention between two; or exact token alignment of two."""
    teacher_temperature: float = pydantic.Field(1.0, ge=LEAST_TEMPERATURE)
    """The projected teacher's logits are divided by it besides ``temperature``."""
    projector_learning_rate: float = pydantic.Field(1e-4, gt=0)
    """Of the projectors, at the top of the run's schedule."""
    initialise: Literal["pseudo_inverse", "random"] = "pseudo_inverse"
    """Projectors begin as what best maps one head's weight to the other's on shared tokens, or as noise."""


class Projectors(nn.Module):
    """``t2s``: H_t → H_s, ``s2t``: H_s → H_t, and the attention's ``query`` between embeddings, 2·H_s → 2·H_t."""

    ids: Tensor

    def __init__(self, student: ModelSpec, teacher: ModelSpec, attention: bool, ids: Tensor) -> None:
        super().__init__()
        self.t2s = nn.Linear(teacher.hidden_size, student.hidden_size)
        self.s2t = nn.Linear(student.hidden_size, teacher.hidden_size)
        if attention:
            self.query = nn.Linear(2 * student.hidden_size, 2 * teacher.hidden_size)
        # The student's id of each of the teacher's, -1 of those that only the teacher has.
        self.register_buffer("ids", ids, persistent=False)


class DSKD(Algorithm):
    """The authors' three terms (Zhang et al. 2024, arXiv 2406.17328), each a sum over target tokens.

    The teacher's states in the student's space learn the reference tokens (projector alone), and the student learns
    their distribution; the student's states in the teacher's space learn the teacher's distribution (forward KL).

    ``same``: one tokenizer, position by position. ``cma``: each side attends to the other side's response by the
    embeddings of input and target tokens, divided by standard deviations over the response; the student is taught where
    the attended states predict the reference. ``eta``: at exactly aligned tokens (KDFlow, arXiv 2603.01875); the
    projected states learn what the teacher predicts, and the student is taught where they do; the last term is the
    chosen divergence.
    """

    name = "dskd"
    paper = "https://arxiv.org/abs/2406.17328"
    Options: ClassVar[type[Options]] = DSKDOptions
    needs = frozenset({"teacher", "aligner", "embeddings"})

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.alignment = self.options.alignment
        self.needs = {
            "same": frozenset({"teacher", "same_vocabulary"}),
            "cma": frozenset({"teacher", "aligner", "embeddings"}),
            "eta": frozenset({"teacher", "aligner"}),
        }[self.alignment]
        self.learning_rate = self.options.projector_learning_rate
        self.divergence = self.options.make_divergence()
        self.forward_kl = kdflow.get_divergence(
            "forward_kl", temperature=self.options.temperature,
            scale_by_temperature_squared=self.divergence.scale_by_temperature_squared,
        )  # fmt: skip

    def prepare(self, pair: Pair) -> Pair:
        """With ``eta``, keep the teacher's rows that are aligned one-to-one."""
        return one_to_one_alone(pair) if self.alignment == "eta" else pair

    def build(self, student: ModelSpec, teacher: ModelSpec | None) -> nn.Module:
        """The projectors."""
        assert teacher is not None
        ours, theirs = shared_ids(student, teacher)
        ids = torch.full((teacher.vocab_size,), -1)
        ids[theirs] = ours
        projectors = Projectors(student, teacher, self.alignment == "cma", ids)
        if self.options.initialise == "pseudo_inverse" and student.head is not None and teacher.head is not None:
            device = student.head.weight.device
            source, target = (
                head.scale * head.weight.detach()[shared.to(head.weight.device)].to(device, torch.float64)
                for head, shared in ((student.head, ours), (teacher.head, theirs))
            )
            for linear, weight in (
                (projectors.t2s, best_map(target, source)),
                (projectors.s2t, best_map(source, target)),
            ):
                linear.weight.data.copy_(weight.T)
                linear.bias.data.zero_()
        return projectors

    def loss(self, student: Side, teacher: Side | None, batch: Batch) -> LossSum:
        """Sum of the three terms."""
        assert teacher is not None
        if self.alignment == "eta":
            return self._exact(student, teacher, batch)
        t2s, s2t = self._projected(student, teacher) if self.alignment == "same" else self._attended(student, teacher)
        terms = self._taught(student, t2s)
        s2t_kd = divergence_sum(s2t, _frozen(teacher.head), teacher.rows, teacher.head, self.forward_kl)
        return self._mixed(student, len(student.rows), *terms, s2t_kd)

    def _projected(self, student: Side, teacher: Side) -> tuple[Tensor, Tensor]:
        """Each side's rows in the other's space."""
        return self.module.t2s(_like(teacher.rows, self.module)), self.module.s2t(_like(student.rows, self.module))

    def _attended(self, student: Side, teacher: Side) -> tuple[Tensor, Tensor]:
        """For each of the student's rows the teacher's states that it attends to, and the reverse."""
        (ours, _), (theirs, target) = _embedded(student), _embedded(teacher)
        response = teacher.response_of_row
        return attend(
            self.module, student.rows, teacher.rows, ours, theirs / deviation(theirs, response),
            teacher.rows / deviation(teacher.rows, response) + target / deviation(target, response),
            student.response_of_row[:, None] == response[None],
        )  # fmt: skip

    def _taught(self, student: Side, t2s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the student's rows: what projector and student learn, the divergence alone, and the hits."""
        operands: Any = [(student.rows, student.head, None), (t2s, _frozen(student.head), None)]
        found: tuple[Tensor, Tensor, Tensor] = row_sum(self._of_rows, operands, [student.tokens.labels])
        return found

    def _of_rows(self, student: Tensor, t2s: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Of each row the two terms in the student's space, the divergence in them, and whether t2s hits its label."""
        hits = t2s.argmax(-1) == labels
        kd = self.divergence(student, t2s.detach() / self.options.teacher_temperature)
        if self.alignment != "same":
            kd = torch.where(hits, kd, 0.0)
        return cross_entropy(t2s, labels, reduction="none") + kd, kd.detach(), hits.to(kd.dtype)

    def _exact(self, student: Side, teacher: Side, batch: Batch) -> LossSum:
        """The three terms at tokens that are aligned one-to-one, where the teacher's prediction is a shared token."""
        assert batch.alignment is not None
        ours, theirs = (on_device(rows, student.rows) for rows in batch.alignment.one_to_one())
        mine, of_teacher = student.rows[ours], teacher.rows[theirs]
        ids = self.module.ids

        def terms(student: Tensor, t2s: Tensor, s2t: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
            predicted = ids[teacher.argmax(-1)]
            counts = predicted >= 0
            value, kd, hits = self._of_rows(student, t2s, predicted.clamp_min(0))
            s2t_kd = self.divergence(s2t, teacher)
            return tuple(torch.where(counts, x, 0.0) for x in (value + s2t_kd, kd, hits, s2t_kd.detach()))

        operands: Any = [
            (mine, student.head, None),
            (self.module.t2s(_like(of_teacher, self.module)), _frozen(student.head), None),
            (self.module.s2t(_like(mine, self.module)), _frozen(teacher.head), None),
            (of_teacher, teacher.head, None),
        ]
        value, kd, hits, s2t_kd = row_sum(terms, operands)
        return self._mixed(student, len(ours), value - s2t_kd.detach(), kd, hits, s2t_kd)

    def _mixed(self, student: Side, rows: int, value: Tensor, kd: Tensor, hits: Tensor, s2t_kd: Tensor) -> LossSum:
        """All terms, with a share of the student's cross-entropy."""
        metrics = {
            "t2s_kd": (kd.detach(), float(rows)), "t2s_ce": ((value - kd).detach(), float(rows)),
            "t2s_accuracy": (hits.detach(), float(rows)), "s2t_kd": (s2t_kd.detach(), float(rows)),
        }  # fmt: skip
        return mixed(value + s2t_kd, rows, student, self.options.ce_weight, metrics)


def best_map(source: Tensor, target: Tensor) -> Tensor:
    """``source⁺``-style map between spaces: what ``h`` in one space is in the other so that logits agree best.

    Args:
        source: head weight ``[v, H]`` of the space that is mapped from, on shared tokens.
        target: head weight ``[v, H']`` of the other, on the same.

    Returns:
        ``sourceᵀ · (targetᵀ)⁺``, ``[H, H']`` (as arXiv 2603.01875's code has it, but from Gram matrices).
    """
    found: Tensor = source.T @ target @ torch.linalg.pinv(target.T @ target, hermitian=True)
    return found


def attend(
    projectors: Any, student_rows: Tensor, teacher_rows: Tensor, query: Tensor, key: Tensor, value: Tensor, same: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-model attention (eq. 8 to 10), both ways.

    Args:
        projectors: :class:`Projectors`.
        student_rows: ``[N_s, H_s]``.
        teacher_rows: ``[N_t, H_t]``.
        query: embeddings of the student's input and target tokens, ``[N_s, 2 H_s]``.
        key: the teacher's, divided by their standard deviation, ``[N_t, 2 H_t]``.
        value: the teacher's states and target embeddings, each divided by theirs, ``[N_t, H_t]``.
        same: which rows belong to one response, ``[N_s, N_t]``.

    Returns:
        The teacher in the student's space, ``[N_s, H_s]``, and the student in the teacher's, ``[N_t, H_t]``.
    """
    asked = projectors.query(_like(query, projectors))
    scores = asked @ key.to(asked.dtype).T / math.sqrt(2 * teacher_rows.shape[1])
    scores = (scores if scores.element_size() > 4 else scores.float()) + _MASKED * ~same
    values = projectors.t2s(_like(value, projectors))
    back = projectors.s2t(_like(student_rows, projectors))
    return scores.softmax(-1).to(values.dtype) @ values, scores.T.softmax(-1).to(back.dtype) @ back


def deviation(values: Tensor, response: Tensor) -> Tensor:
    """The standard deviation of all numbers in the rows ``[N, H]`` of a response, for each row, ``[N, 1]``."""
    number = torch.cat([response[:1] * 0, (response[1:] != response[:-1]).long()]).cumsum(0)
    values = values.double()

    def summed(of_row: Tensor) -> Tensor:
        return of_row.new_zeros(len(values)).index_add(0, number, of_row)[number]

    count = summed(values.new_full((len(values),), values.shape[1]))
    mean = summed(values.sum(1)) / count
    variance = summed((values - mean[:, None]).square().sum(1)) / (count - 1)
    found: Tensor = variance.sqrt()[:, None]
    return found


def _embedded(side: Side) -> tuple[Tensor, Tensor]:
    """Embeddings of input and target tokens side by side, ``[N, 2 H]``, and of the targets alone."""
    assert side.embed is not None
    tokens = side.tokens
    target = side.embed(tokens.labels).detach()
    return torch.cat([side.embed(tokens.input_ids[tokens.targets]).detach(), target], dim=-1), target


def _like(rows: Tensor, projectors: Any) -> Tensor:
    return rows.to(projectors.t2s.weight.dtype)


def _frozen(head: Head) -> Head:
    return head.with_parameters([parameter.detach() for parameter in head.parameters()])


@hookimpl
def kdflow_algorithms() -> Iterable[type[Algorithm]]:
    """The algorithm of this module."""
    return [DSKD]
