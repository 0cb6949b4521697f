"""Drawing the next token of each response, so that what is drawn for one does not depend on the others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdflow.contracts import Sampling


def uniforms(prompt: Sequence[int], sample: int, sampling: Sampling) -> Tensor:
    """One number in [0, 1) for each token of sample ``sample`` of a prompt, fp64 ``[max_new_tokens]``.

    They depend on the prompt's ids, the seed and the sample's number alone; a longer response begins with the same.
    """
    digest = hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).digest()
    generator = np.random.default_rng((sampling.seed, int.from_bytes(digest[:16], "little"), sample))
    return torch.from_numpy(generator.random(sampling.max_new_tokens))


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token from each row by inverting its cumulative distribution.

    Args:
        logits: ``[n, V]``, fp32, padding at -inf.
        uniform: ``[n]``, fp64, in [0, 1).
        sampling: temperature and ``top_p``.

    Returns:
        Ids ``[n]`` and their log-probabilities ``[n]``, see :class:`~kdflow.contracts.Rollout`.
    """
    log_probabilities = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
    if sampling.temperature == 0:
        ids = logits.argmax(-1, keepdim=True)
    else:
        ids = _invert(log_probabilities.exp(), uniform[:, None], sampling.top_p)
    return ids[:, 0], log_probabilities.gather(-1, ids)[:, 0]


def _invert(probabilities: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """The ids ``[n, 1]`` at which the cumulative distributions reach ``uniform``; sums in fp64, since V is large."""
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.double().cumsum(-1)
    last = torch.full_like(uniform, cumulative.shape[-1] - 1, dtype=torch.long)
    if order is not None:
        # A token is kept if those before it do not reach top_p: so the first always is.
        last = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
    total = cumulative.gather(-1, last)
    # right=True steps over tokens without probability.
    found = torch.searchsorted(cumulative, uniform * total, right=True).minimum(last)
    return found if order is None else order.gather(-1, found)
