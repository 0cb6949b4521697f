"""Minimum-edit alignment: the teacher's top logits, moved to the student's vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from kdflow.algorithms._options import DivergenceChoice, mixed, on_device
from kdflow.contracts import Algorithm, Batch, Divergence, LossSum, ModelSpec, Options, Pair, Side, TargetAlignment
from kdflow.hookspecs import hookimpl
from kdflow.ops import cross_entropy_sum, row_sum
from kdflow.tokenizers.nearest import nearest_ids


class MinEditOptions(DivergenceChoice):
    """Options of :class:`MinEditKD`."""

    top_k: int = pydantic.Field(10, ge=1)
    """How many of the teacher's most likely tokens are moved; the rest of both sides is one more outcome."""
    match_cost: Literal["fusellm", "fusechat"] = "fusellm"
    """What pairing two tokens costs the alignment: their edit distance, or a tenth of it where one holds the other."""


class VocabularyMap(nn.Module):
    """The student's id of each of the teacher's; nothing to train."""

    ids: Tensor

    def __init__(self, ids: np.ndarray) -> None:
        super().__init__()
        self.on_host = ids
        self.register_buffer("ids", torch.from_numpy(ids), persistent=False)


class MinEditKD(Algorithm):
    """A divergence from the teacher's top-k, moved through the minimum-edit vocabulary map (Wan et al. 2024, FuseLLM).

    A position is taught where its target token is aligned with exactly one token of the teacher, and the map takes that
    one to it; elsewhere its reference token is learnt, as in DSKD's implementation. Aligned are the predicted tokens,
    so that both models were asked the same question; the authors align the tokens before them. What is beyond the
    top-k is one more outcome on both sides, where the authors leave it out.
    """

    name = "min_edit"
    paper = "https://arxiv.org/abs/2401.10491"
    Options: ClassVar[type[Options]] = MinEditOptions
    needs = frozenset({"teacher", "aligner"})

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.divergence = self.options.make_divergence()

    @property
    def aligner(self) -> Mapping[str, Any]:
        """The warping alignment."""
        return {"name": "min_edit", "match_cost": self.options.match_cost}

    def prepare(self, pair: Pair) -> Pair:
        """Keep the teacher's rows that are the only partner of a token of the student."""
        assert pair.alignment is not None
        ours, theirs = partners(pair.alignment)
        # The path too is cut to these pairs: a token whose second partner was dropped must not look like one with one.
        alone = replace(pair.alignment, path=np.stack([ours, theirs], axis=1))
        kept = replace(pair, alignment=alone)
        return kept.with_teacher_targets(np.isin(np.arange(len(pair.alignment.teacher)), theirs))

    def build(self, student: ModelSpec, teacher: ModelSpec | None) -> nn.Module:
        """The vocabulary map."""
        assert teacher is not None
        return VocabularyMap(nearest_ids(student, teacher))

    def loss(self, student: Side, teacher: Side | None, batch: Batch) -> LossSum:
        """Sum over target positions of the divergence, or of the cross-entropy on the reference token."""
        assert teacher is not None
        assert batch.alignment is not None
        ours, theirs = partners(batch.alignment)
        # On the host, which then knows how many positions are taught without waiting for the device.
        known, wanted = (side.tokens.on_host.labels.numpy() for side in (teacher, student))
        fits = self.module.on_host[known[theirs]] == wanted[ours]
        ours, theirs = ours[fits], theirs[fits]
        alone = np.setdiff1d(np.arange(len(student.rows)), ours)
        labels, temperature = student.tokens.labels, self.options.temperature
        mine, of_teacher, rest = (on_device(rows, student.rows) for rows in (ours, theirs, alone))
        scale = temperature**2 if self.divergence.scale_by_temperature_squared else 1.0

        def moved(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
            return scale * moved_divergence(
                student_logits / temperature, teacher_logits / temperature, self.module.ids, self.options.top_k,
                self.divergence,
            )  # fmt: skip

        operands: Any = [(student.rows[mine], student.head, None), (teacher.rows[of_teacher], teacher.head, None)]
        kd = row_sum(moved, operands)
        fallback = cross_entropy_sum(student.rows[rest], student.head, labels[rest], temperature)
        taught = float(len(ours))
        metrics = {"kd": (kd.detach(), taught), "taught": (kd.new_full((), taught), float(len(labels)))}
        return mixed(kd + fallback, len(labels), student, self.options.ce_weight, metrics)


def partners(alignment: TargetAlignment) -> tuple[np.ndarray, np.ndarray]:
    """The student's targets that the path pairs with exactly one of the teacher's, ascending, and that one of each."""
    if alignment.path is None:
        empty = np.zeros(0, np.int64)
        return empty, empty
    ours, theirs = alignment.path.T
    once = np.bincount(ours, minlength=len(alignment.student))[ours] == 1
    return ours[once], theirs[once]


def moved_ids(top: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The student's ids of the teacher's most likely ones, ``[n, k]``, and which of them count for nothing.

    Those do that have no counterpart, and those that have the same one as a more likely token.
    """
    moved = ids[top]
    repeated = (moved[:, :, None] == moved[:, None, :]).tril(-1).any(-1)
    return moved.clamp_min(0), repeated | (moved < 0)


def moved_divergence(
    student_logits: Tensor, teacher_logits: Tensor, ids: Tensor, top_k: int, divergence: Divergence
) -> Tensor:
    """The divergence of each row over the teacher's top-k, moved to the student's vocabulary, and all the rest.

    Args:
        student_logits: ``[n, V_s]``, divided by the temperature.
        teacher_logits: ``[n, V_t]``, likewise.
        ids: the student's id of each of the teacher's, ``[V_t]``; -1 of those that have none.
        top_k: how many are moved.
        divergence: of what is left.

    Returns:
        ``[n]``.
    """
    all_of_teacher = teacher_logits.log_softmax(-1)
    top = all_of_teacher.topk(min(top_k, teacher_logits.shape[1]), dim=-1)
    columns, dropped = moved_ids(top.indices, ids)
    theirs = top.values.masked_fill(dropped, -torch.inf)
    whole = student_logits.logsumexp(-1, keepdim=True)
    picked = student_logits.gather(1, columns).masked_fill(dropped, -torch.inf)
    # The rest of the student's distribution is summed, not one minus the picked: that would lose its digits.
    taken = torch.zeros_like(student_logits, dtype=torch.int32).scatter_add(1, columns, (~dropped).int()).bool()
    others = student_logits.masked_fill(taken, -torch.inf).logsumexp(-1, keepdim=True)
    ours = torch.cat([picked, others], dim=1) - whole
    # Likewise the teacher's; what was dropped of its most likely tokens is a part of the rest.
    rest = all_of_teacher.scatter(1, top.indices, top.values.masked_fill(~dropped, -torch.inf)).logsumexp(-1, True)
    # A student of which nothing is left has no place for the teacher's rest.
    rest = rest.masked_fill(others.isneginf(), -torch.inf)
    return divergence.per_token(ours, torch.cat([theirs, rest], dim=1))


@hookimpl
def kdflow_algorithms() -> Iterable[type[Algorithm]]:
    """The algorithm of this module."""
    return [MinEditKD]
