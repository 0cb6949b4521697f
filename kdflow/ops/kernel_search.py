"""Parts of the head's kernel (:mod:`kdflow.ops.kernels`): the head of a teacher's distribution, without sorting it.

Products are bf16, so that they can be numbered in the order of their values. From a part of the row it is guessed
between which 32 numbers the last token of the head lies. One pass over the row then adds up what is above them, and
what belongs to each of them; where that shows that the guess was wrong, a search over the whole row and a second such
pass follow.
"""

# Triton's own language, from which it translates these functions.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from kdflow.ops.kernel_parts import LANE, LN2, columns_of, logit_of, logits, normalised, tempered, turned

WINDOW = tl.constexpr(32)  # numbers of products
PASSES = tl.constexpr(2)  # at most: after the guess, and after the search
_TINY = tl.constexpr(1.2e-38)
_SAMPLED = tl.constexpr(8)  # every how many-th block makes the guess


@triton.jit
def product_of(x, side, inv_t, smallest, CAP: tl.constexpr):
    """The product of which a tempered logit in bits was made; ``smallest`` where it lies at the cap, or beyond."""
    x = x / inv_t
    if CAP:
        share = tl.minimum(tl.maximum(x / side[3], -0.99999), 0.99999)
        product = (0.5 * LN2) * tl.log2((1.0 + share) / (1.0 - share)) / side[2]
        return tl.where(share > -0.99999, product, smallest)
    return x / side[2]


@triton.jit
def key_of(x):
    """Number of the bf16 value at or next to ``x`` towards zero, in the order of values."""
    bits = (x + 0.0).to(tl.int32, bitcast=True) >> 16  # there is one zero
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
def masses_above(sums, product, x, keys):
    """Add to eight sums what of ``x`` belongs to products of these numbers and above."""
    result = ()
    for j in tl.static_range(8):
        result = result + (sums[j] + tl.sum(tl.where(product >= value_of(keys[j]), 1.0, 0.0) * x, 1),)
    return result


@triton.jit
def over_lanes(sums):
    """Eight sums of all lanes, ``[8]``: at once, since all warps wait for each sum of a row."""
    even = tl.join(tl.join(sums[0], sums[4]), tl.join(sums[2], sums[6]))
    odd = tl.join(tl.join(sums[1], sums[5]), tl.join(sums[3], sums[7]))
    return tl.sum(tl.reshape(tl.join(even, odd), [sums[0].shape[0], 8]), 0)


@triton.jit
def narrowed(low, high, keys, masses, limit):
    """``low`` is the highest known number at and above which is more mass than ``limit``, ``high`` the lowest other."""
    for j in tl.static_range(8):
        more = tl.sum(tl.where(tl.arange(0, 8) == j, masses, 0.0), 0) > limit
        low = tl.where(more, tl.maximum(low, keys[j]), low)
        high = tl.where(more, high, tl.minimum(high, keys[j]))
    return low, high


@triton.jit
def bounds(teacher, shared, inv_t, log_t, smallest, largest, limit, CAP: tl.constexpr):
    """Numbers of products between which the last token of the head lies, the lower one included."""
    high = key_of(largest) + 1
    # Tokens below this logit are less probable than (1 - limit) / shared, and have less mass than 1 - limit together.
    lowest = log_t + tl.log2(tl.maximum(1.0 - limit, 1e-9) / shared)
    if CAP:
        lowest -= tl.abs(lowest) * 0.001  # as much as tanh is off
    lowest = product_of(lowest, teacher, inv_t, smallest, CAP)
    low = tl.minimum(key_of(lowest - tl.abs(lowest) * 0.02 - 1e-6), high - 1)
    top = logit_of(largest, teacher, CAP) * inv_t
    return tl.where((tl.exp2(top - log_t) > limit) | (limit >= 1.0), high - 1, low), high


@triton.jit
def guessed(
    low, high, teacher, inner, shared, inv_t, log_t, limit, CAP: tl.constexpr, TEMPERED: tl.constexpr, R: tl.constexpr
):
    """The first number of a window in whose middle the last token of the head lies, by some blocks of the row."""
    zero = tl.zeros([R], tl.float32)
    first, last = low, high
    while last - first > WINDOW // 4:
        keys = keys_between(first, last)
        whole = zero
        sums = (zero, zero, zero, zero, zero, zero, zero, zero)
        for start in range(0, inner, R * LANE * _SAMPLED):
            x, product = logits(teacher, columns_of(start, R), shared, CAP, False)
            mass = tl.exp2(tempered(x, inv_t, TEMPERED) - log_t)
            whole += tl.sum(mass, 1)
            sums = masses_above(sums, product, mass, keys)
        first, last = narrowed(first, last, keys, over_lanes(sums), limit * tl.sum(whole, 0))
    return tl.maximum(tl.minimum((first + last - WINDOW) // 2, high - WINDOW), low)


@triton.jit
def searched(
    low, high, teacher, inner, shared, inv_t, log_t, limit, turn,
    CAP: tl.constexpr, TEMPERED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The first number of a window that holds the last token of the head, by the whole row, and which turn is next."""
    zero = tl.zeros([R], tl.float32)
    while high - low > WINDOW:
        keys = keys_between(low, high)
        sums = (zero, zero, zero, zero, zero, zero, zero, zero)
        for start in range(0, inner, R * LANE):
            x, product = logits(teacher, columns_of(turned(start, inner, turn, R), R), shared, CAP, False)
            sums = masses_above(sums, product, tl.exp2(tempered(x, inv_t, TEMPERED) - log_t), keys)
        for start in range(inner, shared, R * LANE):
            x, product = logits(teacher, columns_of(start, R), shared, CAP, True)
            sums = masses_above(sums, product, tl.exp2(tempered(x, inv_t, TEMPERED) - log_t), keys)
        low, high = narrowed(low, high, keys, over_lanes(sums), limit)
        turn += 1
    return low, turn


@triton.jit
def by_column(x):
    """The eight columns of a block, each ``[R]``."""
    R: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x, [R, 4, 2]))
    a, c = tl.split(tl.reshape(even, [R, 2, 2]))
    b, d = tl.split(tl.reshape(odd, [R, 2, 2]))
    x0, x4 = tl.split(a)
    x1, x5 = tl.split(b)
    x2, x6 = tl.split(c)
    x3, x7 = tl.split(d)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _parted(
    sums, window, first, student, teacher, at, columns, shared, inv_t, log_s, log_t,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, TEMPERED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a block: all gaps, masses and gaps above the window to sums, and those inside it to their places."""
    whole, mass_above, gap_above = sums
    _, _, _, p, q, _, product = normalised(
        student, teacher, at, columns, shared, inv_t, log_s, log_t, CAP_S, CAP_T, TEMPERED, MASKED
    )
    gap = tl.abs(p - q)
    place = key_of(product) - first
    above = place >= WINDOW
    mass_above += tl.sum(tl.where(above, q, 0.0), 1)
    gap_above += tl.sum(tl.where(above, gap, 0.0), 1)
    # Column by column, so that every thread adds what it holds: of a block, it would exchange it with others first.
    places, masses, gaps = by_column(place), by_column(q), by_column(gap)
    for j in tl.static_range(LANE):
        inside = (places[j] >= 0) & (places[j] < WINDOW)
        pair = window.to(tl.pointer_type(tl.int64), bitcast=True) + places[j]
        pair = pair.to(tl.pointer_type(tl.float32), bitcast=True)[:, None] + tl.arange(0, 2)[None, :]
        tl.atomic_add(pair, tl.join(masses[j], gaps[j]), mask=inside[:, None], sem="relaxed", scope="cta")
    return whole + tl.sum(gap, 1), mass_above, gap_above


@triton.jit
def head_share(
    window, student, teacher, inner, columns, shared, inv_t, log_s, log_t, smallest, largest, limit,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, TEMPERED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Share of the gap |p - q| in the teacher's head, the most probable tokens with ``limit`` of the mass together.

    ``window`` has zeros, for PASSES times WINDOW products a mass and a gap. Returns which turn is next, too.
    """
    low, high = bounds(teacher, shared, inv_t, log_t, smallest, largest, limit, CAP_T)
    first = guessed(low, high, teacher, inner, shared, inv_t, log_t, limit, CAP_T, TEMPERED, R)
    places = tl.arange(0, WINDOW)
    zero = tl.zeros([R], tl.float32)
    turn, attempt, head = 1, 0, 0.0
    while attempt < PASSES:
        sums = (zero, zero, zero)
        for start in range(inner, shared, R * LANE):
            sums = _parted(
                sums, window, first, student, teacher, columns_of(start, R), columns, shared, inv_t, log_s, log_t,
                CAP_S, CAP_T, TEMPERED, True,
            )  # fmt: skip
        for start in range(0, inner, R * LANE):
            sums = _parted(
                sums, window, first, student, teacher, columns_of(turned(start, inner, turn, R), R), columns, shared,
                inv_t, log_s, log_t, CAP_S, CAP_T, TEMPERED, False,
            )  # fmt: skip
        turn += 1
        tl.debug_barrier()  # other threads may read what one has added
        masses = tl.load(window + 2 * places, cache_modifier=".cg")
        gaps = tl.load(window + 2 * places + 1, cache_modifier=".cg")
        whole, above = tl.sum(sums[0], 0), tl.sum(sums[1], 0)
        reached = above + tl.cumsum(masses, 0, reverse=True)
        last = tl.max(tl.where(reached > limit, places, 0), 0)
        mass = above + tl.sum(tl.where(places > last, masses, 0.0), 0)
        gap = tl.sum(sums[2], 0) + tl.sum(tl.where(places > last, gaps, 0.0), 0)
        tie_mass = tl.sum(tl.where(places == last, masses, 0.0), 0)
        tie_gap = tl.sum(tl.where(places == last, gaps, 0.0), 0)
        each = tl.exp2(logit_of(value_of(first + last), teacher, CAP_T) * inv_t - log_t)
        # As many of those that tie for the last place as the limit leaves room for; the largest token always.
        inside = tl.maximum(tl.floor((limit - mass) / each), tl.where(first + last == key_of(largest), 1.0, 0.0))
        head = gap + tie_gap * tl.minimum(inside * each / tl.maximum(tie_mass, _TINY), 1.0)
        head = tl.where(limit >= 1.0, whole, head)
        head = tl.where(whole > 0.0, head / whole, 0.5)
        attempt += 1
        before, after = above > limit, (first > low) & (tl.max(reached, 0) <= limit)
        if (before | after) & (attempt < PASSES):
            low = tl.where(before, first + WINDOW, low)
            high = tl.where(before, high, first)
            first, turn = searched(low, high, teacher, inner, shared, inv_t, log_t, limit, turn, CAP_T, TEMPERED, R)
            window += 2 * WINDOW
        else:
            attempt = PASSES
    return head, turn
