"""The seven divergences again, in fp64 numpy over probabilities and with finite differences: slow, plain, independent.

Good for moderate logits, where no probability underflows; ``-inf`` is allowed anywhere. 0 · log 0 is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def kl(p: Array, q: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(-1)


def entropy(logits: Array) -> Array:
    p = softmax(logits)
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(-1)


def cross_entropy(logits: Array, labels: NDArray[np.int64]) -> Array:
    return -np.log(np.take_along_axis(softmax(logits), labels[..., None], -1)[..., 0])


def jsd(s: Array, t: Array, beta: float = 0.5) -> Array:
    if beta in (0.0, 1.0):
        return kl(t, s) if beta == 0.0 else kl(s, t)
    mixture = beta * t + (1 - beta) * s
    return beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)


def head_share(s: Array, t: Array, mu: float = 0.5) -> Array:
    """Adaptive KL's head ratio, a row at a time; tokens that tie for the head's last place have equal parts in it."""
    share = np.empty(t.shape[:-1])
    for row in np.ndindex(*share.shape):
        ordered = sorted(t[row], reverse=True)
        mass = np.minimum(np.cumsum(ordered), 1.0)
        count = max(1, sum(mass <= mu))
        last = ordered[count - 1]
        part = (count - sum(t[row] > last)) / sum(t[row] == last)
        gaps = np.abs(t[row] - s[row])
        inside = np.where(t[row] == last, part, t[row] > last)
        share[row] = (gaps * inside).sum() / gaps.sum() if gaps.sum() > 0 else 0.5
    return share


def adaptive_kl(s: Array, t: Array, mu: float = 0.5, share: Array | None = None) -> Array:
    head = head_share(s, t, mu) if share is None else share
    with np.errstate(invalid="ignore"):
        forward, reverse = np.where(head > 0, head * kl(t, s), 0.0), np.where(head < 1, (1 - head) * kl(s, t), 0.0)
    return forward + reverse


FORMULAS: dict[str, Callable[..., Array]] = {
    "forward_kl": lambda s, t: kl(t, s),
    "reverse_kl": kl,
    "jsd": jsd,
    "skew_kl": lambda s, t, skew=0.1: kl(t, skew * t + (1 - skew) * s),
    "skew_reverse_kl": lambda s, t, skew=0.1: kl(s, skew * s + (1 - skew) * t),
    "adaptive_kl": adaptive_kl,
    "tvd": lambda s, t: 0.5 * np.abs(t - s).sum(-1),
    "sorted_l1": lambda s, t: np.abs(np.sort(t, -1) - np.sort(s, -1)).sum(-1),
}


def divergence(
    name: str,
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    **options: Any,
) -> Array:
    """The divergence called ``name`` of logits ``[..., V]``, under the names of kdflow's own options."""
    probabilities = softmax(student_logits / temperature), softmax(teacher_logits / temperature)
    value = FORMULAS[name](*probabilities, **options)
    return value * temperature**2 if scale_by_temperature_squared else value


def gradient(name: str, student_logits: Array, teacher_logits: Array, **options: Any) -> Array:
    """Central differences of :func:`divergence` for the student's logits; NaN where a row is infinite."""
    if name == "adaptive_kl":  # its ratios carry no gradient
        temperature = options.get("temperature", 1.0)
        s, t = softmax(student_logits / temperature), softmax(teacher_logits / temperature)
        options["share"] = head_share(s, t, options.pop("mu", 0.5))
    result, step = np.zeros_like(student_logits), 1e-6
    for column in range(student_logits.shape[-1]):
        up, down = student_logits.copy(), student_logits.copy()
        up[..., column] += step
        down[..., column] -= step
        above, below = (divergence(name, x, teacher_logits, **options) for x in (up, down))
        with np.errstate(invalid="ignore"):
            result[..., column] = (above - below) / (2 * step)
    return result
