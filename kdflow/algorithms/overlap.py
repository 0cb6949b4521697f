"""Distillation over the tokens that two vocabularies share, at positions that both tokenizers cut alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from kdflow.algorithms._options import DivergenceChoice, mixed, on_device, one_to_one_alone
from kdflow.contracts import Algorithm, Batch, KdflowError, LossSum, ModelSpec, Options, Pair, Side
from kdflow.hookspecs import hookimpl
from kdflow.ops import divergence_sum
from kdflow.tokenizers.vocabulary import shared_ids


class SharedColumns(nn.Module):
    """Ids of the shared tokens, pair by pair; nothing to train."""

    student: Tensor
    teacher: Tensor

    def __init__(self, student: ModelSpec, teacher: ModelSpec) -> None:
        super().__init__()
        ours, theirs = shared_ids(student, teacher)
        if not len(ours):
            raise KdflowError(
                "algorithm 'overlap' compares the tokens that two vocabularies share, and these share none; use uld, "
                "or dskd with alignment: cma, which need none in common"
            )
        self.register_buffer("student", ours, persistent=False)
        self.register_buffer("teacher", theirs, persistent=False)


class Overlap(Algorithm):
    """A divergence of both sides' distributions over the shared tokens, each renormalised (simple_ctkd).

    It is summed over the positions that are aligned one-to-one; the others are left to the cross-entropy, if any.
    So the code of arXiv 2603.01875 calls it, whose alignment loses whatever follows the first difference of spelling;
    ours does not.
    """

    name = "overlap"
    paper = "https://arxiv.org/abs/2603.01875"
    Options: ClassVar[type[Options]] = DivergenceChoice
    needs = frozenset({"teacher", "aligner"})

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.divergence = self.options.make_divergence()

    def prepare(self, pair: Pair) -> Pair:
        """Keep the teacher's rows that are aligned one-to-one."""
        return one_to_one_alone(pair)

    def build(self, student: ModelSpec, teacher: ModelSpec | None) -> nn.Module:
        """The ids of the shared tokens."""
        assert teacher is not None
        return SharedColumns(student, teacher)

    def loss(self, student: Side, teacher: Side | None, batch: Batch) -> LossSum:
        """Sum of the divergence over aligned positions."""
        assert teacher is not None
        assert batch.alignment is not None
        ours, theirs = (on_device(rows, student.rows) for rows in batch.alignment.one_to_one())
        kd = divergence_sum(
            student.rows[ours], student.head.over(self.module.student),
            teacher.rows[theirs], teacher.head.over(self.module.teacher), self.divergence,
        )  # fmt: skip
        return mixed(kd, len(ours), student, self.options.ce_weight)


@hookimpl
def kdflow_algorithms() -> Iterable[type[Algorithm]]:
    """The algorithm of this module."""
    return [Overlap]
