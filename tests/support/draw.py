"""Random logits for property tests: hypothesis draws sizes, scale and seed, numpy the numbers."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# Deterministic, so that a run on a busy machine fails for a reason.
quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@st.composite
def logit_pairs(
    draw: st.DrawFn, *, scales: tuple[float, ...] = (0.01, 1.0, 8.0), rows: int = 4, vocab: int = 9, smallest: int = 1
) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits ``[n, V]`` in fp64."""
    shape = draw(st.integers(1, rows)), draw(st.integers(smallest, vocab))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    student, teacher = (generator.normal(size=shape) * draw(st.sampled_from(scales)) for _ in range(2))
    return torch.from_numpy(student), torch.from_numpy(teacher)


@st.composite
def masks(draw: st.DrawFn, like: Tensor) -> Tensor:
    """Which columns to mask, ``[V]``; one at least is kept."""
    columns = like.shape[-1]
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=columns, max_size=columns)))
    mask[draw(st.integers(0, columns - 1))] = False
    return mask
