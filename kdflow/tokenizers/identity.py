"""Tokens paired by their numbers, as the ULD authors pair positions (arXiv 2402.12030)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from kdflow.contracts import Aligner, Alignment
from kdflow.hookspecs import hookimpl


class Identity(Aligner):
    """Pairs token i with token i, whatever they spell, as far as both sides reach; the rest has no partner."""

    name = "identity"
    paper = "https://arxiv.org/abs/2402.12030"

    def align(self, student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> Alignment:
        """One-to-one up to the shorter side."""
        ours, theirs = len(student_tokens), len(teacher_tokens)
        paired = np.arange(1, min(ours, theirs) + 1)
        stops = np.stack([paired, paired])
        return Alignment(stops=stops if ours == theirs else np.append(stops, [[ours], [theirs]], axis=1))


@hookimpl
def kdflow_aligners() -> Iterable[type[Aligner]]:
    """The aligner of this module."""
    return [Identity]
