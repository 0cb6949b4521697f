"""Parts of the head's kernel (:mod:`kdflow.ops.kernels`): the head of a teacher's distribution, without sorting it.

Products are bf16, so that they can be numbered in the order of their values, and the last token of the head is found by
a search: in one pass over the row the masses above eight numbers. Which numbers are worth a pass over the whole row is
guessed from a part of it.
"""

# Triton's own language, from which it translates these functions.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from kdflow.ops.kernel_parts import LANE, LN2, capped, columns_of, logits, tempered, turned

_TINY = tl.constexpr(1.2e-38)
_SAMPLED = tl.constexpr(8)  # every how many-th block makes the guess


@triton.jit
def logit_of(product, side, inv_t, CAP: tl.constexpr):
    """One product's tempered logit in bits."""
    x = product * side[2]
    if CAP:
        x = capped(x, side[3])
    return x * inv_t


@triton.jit
def product_of(x, side, inv_t, smallest, CAP: tl.constexpr):
    """The product of which a tempered logit in bits was made; ``smallest`` where it lies at the cap, or beyond."""
    x = x / inv_t
    if CAP:
        share = tl.minimum(tl.maximum(x / side[3], -0.99999), 0.99999)
        product = side[3] * (0.5 * LN2) * tl.log2((1.0 + share) / (1.0 - share)) / side[2]
        return tl.where(share > -0.99999, product, smallest)
    return x / side[2]


@triton.jit
def key_of(x):
    """Number of the bf16 value at or next to ``x`` towards zero, in the order of values."""
    bits = x.to(tl.int32, bitcast=True) >> 16
    return bits ^ ((bits >> 31) & 0x7FFF)


@triton.jit
def value_of(key):
    """The bf16 value of a number."""
    bits = key ^ ((key >> 31) & 0x7FFF)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def keys_between(low, high):
    """Eight numbers of products between ``low`` and ``high``, which are divided by value where they are many."""
    first, last = value_of(low), value_of(high)
    keys = (high - 1,)
    for part in tl.static_range(1, 8):
        key = tl.where(high - low > 1024, key_of(first + (last - first) * (part / 8.0)), low + (high - low) * part // 8)
        keys = keys + (tl.minimum(tl.maximum(key, low), high - 1),)
    return keys


@triton.jit
def keys_around(guess, low, high):
    """Eight numbers of products, three apart, from 12 below a guess on."""
    keys = (tl.minimum(tl.maximum(guess - 12, low), high - 1),)
    for part in tl.static_range(1, 8):
        keys = keys + (tl.minimum(tl.maximum(guess - 12 + 3 * part, low), high - 1),)
    return keys


@triton.jit
def masses_above(sums, product, x, keys, COUNT: tl.constexpr):
    """Add to as many sums what of ``x`` belongs to products of these numbers and above."""
    result = ()
    for j in tl.static_range(COUNT):
        result = result + (sums[j] + tl.sum(tl.where(product >= value_of(keys[j]), 1.0, 0.0) * x, 1),)
    return result


@triton.jit
def over_lanes(sums):
    """Eight sums of all lanes, ``[8]``: at once, since all warps wait for each sum of a row."""
    even = tl.join(tl.join(sums[0], sums[4]), tl.join(sums[2], sums[6]))
    odd = tl.join(tl.join(sums[1], sums[5]), tl.join(sums[3], sums[7]))
    return tl.sum(tl.reshape(tl.join(even, odd), [sums[0].shape[0], 8]), 0)


@triton.jit
def bracket(
    teacher, inner, shared, inv_t, log_t, smallest, largest, limit,
    CAP: tl.constexpr, TEMPERED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Numbers of products, at most three apart, between which the mass of the larger ones passes ``limit``.

    Products are bf16, so that they can be numbered. There is more mass than ``limit`` at and above the lower one, and
    no more at and above the higher. Returns that, and which turn is next.
    """
    high = key_of(largest) + 1
    # Tokens below this logit are less probable than (1 - limit) / shared, and have less mass than 1 - limit together.
    lowest = log_t + tl.log2(tl.maximum(1.0 - limit, 1e-9) / shared)
    lowest = product_of(lowest, teacher, inv_t, smallest, CAP)
    low = tl.minimum(key_of(lowest - tl.abs(lowest) * 0.02 - 1e-6), high - 1)
    top = logit_of(largest, teacher, inv_t, CAP)
    low = tl.where((tl.exp2(top - log_t) > limit) | (limit >= 1.0), high - 1, low)
    zero = tl.zeros([R], tl.float32)
    first, last = low, high  # the same search in a part of the row
    while last - first > 3:
        keys = keys_between(first, last)
        whole = zero
        sums = (zero, zero, zero, zero, zero, zero, zero, zero)
        for start in range(0, inner, R * LANE * _SAMPLED):
            x, product = logits(teacher, columns_of(start, R), shared, CAP, False)
            mass = tl.exp2(tempered(x, inv_t, TEMPERED) - log_t)
            whole += tl.sum(mass, 1)
            sums = masses_above(sums, product, mass, keys, 8)
        share, masses = limit * tl.sum(whole, 0), over_lanes(sums)
        for j in tl.static_range(8):
            more = tl.sum(tl.where(tl.arange(0, 8) == j, masses, 0.0), 0) > share
            first = tl.where(more, tl.maximum(first, keys[j]), first)
            last = tl.where(more, last, tl.minimum(last, keys[j]))
    turn = 1
    keys = keys_around(first, low, high)
    while high - low > 3:
        sums = (zero, zero, zero, zero, zero, zero, zero, zero)
        for start in range(0, inner, R * LANE):
            x, product = logits(teacher, columns_of(turned(start, inner, turn, R), R), shared, CAP, False)
            sums = masses_above(sums, product, tl.exp2(tempered(x, inv_t, TEMPERED) - log_t), keys, 8)
        for start in range(inner, shared, R * LANE):
            x, product = logits(teacher, columns_of(start, R), shared, CAP, True)
            sums = masses_above(sums, product, tl.exp2(tempered(x, inv_t, TEMPERED) - log_t), keys, 8)
        masses = over_lanes(sums)
        for j in tl.static_range(8):
            more = tl.sum(tl.where(tl.arange(0, 8) == j, masses, 0.0), 0) > limit
            low = tl.where(more, tl.maximum(low, keys[j]), low)
            high = tl.where(more, high, tl.minimum(high, keys[j]))
        turn += 1
        keys = keys_between(low, high)
    return low, turn


@triton.jit
def head_share(masses, gaps, low, whole, teacher, inv_t, log_t, largest, limit, CAP: tl.constexpr):
    """Share of the gap in the teacher's head, from masses and gaps at and above four products in a row."""
    last, mass, gap = low, 0.0, 0.0
    tie_mass, tie_gap = 0.0, 0.0
    for j in tl.static_range(3):
        here, above = tl.sum(masses[j], 0), tl.sum(masses[j + 1], 0)
        is_last = (here > limit) | (j == 0)
        last = tl.where(is_last, low + j, last)
        mass = tl.where(is_last, above, mass)
        gap = tl.where(is_last, tl.sum(gaps[j + 1], 0), gap)
        tie_mass = tl.where(is_last, here - above, tie_mass)
        tie_gap = tl.where(is_last, tl.sum(gaps[j], 0) - tl.sum(gaps[j + 1], 0), tie_gap)
    each = tl.exp2(logit_of(value_of(last), teacher, inv_t, CAP) - log_t)
    # As many of those that tie for the last place as the limit leaves room for; the largest token always.
    inside = tl.maximum(tl.floor((limit - mass) / each), tl.where(last == key_of(largest), 1.0, 0.0))
    head = gap + tie_gap * tl.minimum(inside * each / tl.maximum(tie_mass, _TINY), 1.0)
    head = tl.where(limit >= 1.0, whole, head)
    return tl.where(whole > 0.0, head / whole, 0.5)
