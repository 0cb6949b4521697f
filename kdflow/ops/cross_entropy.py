"""Cross-entropy on reference tokens, a chunk of rows at a time."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from kdflow.contracts import Head
from kdflow.ops.row_sum import row_sum


def cross_entropy_sum(rows: Tensor, head: Head, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over rows ``[N, H]`` of -log of the probability of ``labels [N]``, logits divided by ``temperature``."""

    def of_chunk(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits / temperature, labels, reduction="none")

    operands = [(rows, head, None)]
    total: Tensor = row_sum(of_chunk, operands, [labels])
    return total


def weighted(kd: Tensor, ce: Tensor, ce_weight: float) -> Tensor:
    """``(1 - ce_weight) · kd + ce_weight · ce``; at 0 and 1 the other term is not multiplied, since 0 · inf is NaN."""
    if ce_weight in (0.0, 1.0):
        return ce if ce_weight else kd
    return (1.0 - ce_weight) * kd + ce_weight * ce


def require_ids(labels: Tensor, head: Head) -> None:
    """Refuse labels ``[N]`` that are no ids of the student's head, but on a GPU, which would have to be waited for.

    Raises:
        ValueError: there is such a label.
    """
    if labels.is_cpu and ((labels < 0) | (labels >= head.vocab_size)).any():
        raise ValueError(
            f"targets are ids of the student's head, 0 to {head.vocab_size - 1}; rows without one are left out"
        )
