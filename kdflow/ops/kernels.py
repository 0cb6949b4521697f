"""The Triton kernel of the distillation head: from both sides' products to the divergence of each row and its gradient.

One program has one row and goes over it two or three times: softmax statistics, then, where the gradient needs sums of
normalised probabilities, those, and last the value and the gradient, which takes the place of the student's products.
Every other pass runs backwards, since what was read last may still be in the cache. Sums are kept by each lane until a
pass ends, so that warps do not wait for each other. Logarithms are binary, which saves the multiplication of every
exponential. Only blocks that reach past ``inner`` columns are masked: there are columns that are padding of a side.
"""

# Triton's own language, from which it translates these functions.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

FORWARD, REVERSE, MIXTURE, ABSOLUTE, SPLIT = (tl.constexpr(kind) for kind in range(5))
_LANE = tl.constexpr(8)  # columns of a lane, 16 bytes
_LOWEST = tl.constexpr(-1e30)  # below every logit, and finite, so that differences are no NaN
_TINY = tl.constexpr(1.2e-38)
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
_AGAIN, _LAST = tl.constexpr("evict_last"), tl.constexpr("evict_first")  # what is read again stays in the cache
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _columns(start, R: tl.constexpr):
    return start + tl.arange(0, R)[:, None] * _LANE + tl.arange(0, _LANE)[None, :]


@triton.jit
def _turned(start, inner, turn, R: tl.constexpr):
    """Columns of the block at ``start`` of ``inner`` columns, or in an odd turn of that at ``start`` from the end."""
    return _columns(tl.where(turn % 2 == 1, inner - R * _LANE - start, start), R)


@triton.jit
def _capped(x, cap):
    """``cap · tanh(x / cap)``."""
    return cap - 2.0 * cap / (1.0 + tl.exp2(x * (2.0 * _LOG2E / cap)))


@triton.jit
def _logits(side, at, columns, CAP: tl.constexpr, MASKED: tl.constexpr, KEPT: tl.constexpr):
    """One side's logits in bits, -inf from ``columns`` on, and the products they are made of.

    KEPT is the cache's policy for them.
    """
    if MASKED:
        product = tl.load(side[0] + at, mask=at < side[1], other=0.0, eviction_policy=KEPT).to(tl.float32)
    else:
        product = tl.load(side[0] + at, eviction_policy=KEPT).to(tl.float32)
    x = product * side[2]
    if CAP:
        x = _capped(x, side[3])
    if MASKED:
        x = tl.where(at < columns, x, float("-inf"))
    return x, product


@triton.jit
def _tempered(x, inv_t, TEMPERED: tl.constexpr):
    if TEMPERED:
        x *= inv_t
    return x


@triton.jit
def _added(top, total, x):
    """Each lane's maximum and sum of exponentials with ``x`` too, the factor for its other sums, and exponentials."""
    higher = tl.maximum(top, tl.max(x, 1))
    factor = tl.exp2(top - higher)
    e = tl.exp2(x - higher[:, None])
    return higher, total * factor + tl.sum(e, 1), factor, e


@triton.jit
def _joined(top, total):
    """The log of the sum of all lanes' exponentials, and each lane's factor to a share of it."""
    highest = tl.max(top, 0)
    log_sum = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
    return log_sum, tl.exp2(top - log_sum)


@triton.jit
def _statistics(
    state, student, teacher, at, columns, shared, valid, inv_t,
    KIND: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, HAS_CE: tl.constexpr, TEMPERED: tl.constexpr,
    MASKED: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """Add a block to maxima and sums of the student, the teacher and the cross-entropy, and to sums of p · log(p/q)."""
    top_s, sum_s, top_t, sum_t, top_x, sum_x, excess, finite, largest = state
    s, _ = _logits(student, at, columns, CAP_S, MASKED, _AGAIN)
    t, product = _logits(teacher, at, shared, CAP_T, MASKED, _AGAIN)
    if HAS_CE:
        if MASKED:
            top_x, sum_x, _, _ = _added(top_x, sum_x, tl.where(at < valid, s, float("-inf")))
        else:
            top_x, sum_x, _, _ = _added(top_x, sum_x, s)
    s = _tempered(s, inv_t, TEMPERED)
    t = _tempered(t, inv_t, TEMPERED)
    if MASKED:
        s = tl.where(at < shared, s, float("-inf"))
    top_s, sum_s, factor, e = _added(top_s, sum_s, s)
    top_t, sum_t, _, _ = _added(top_t, sum_t, t)
    if KIND == REVERSE or KIND == SPLIT:
        terms = e * (s - t)
        if GUARDED:  # an infinite term has no part in the gradient
            both = (s > float("-inf")) & (t > float("-inf"))
            terms = tl.where(both, terms, 0.0)
            e = tl.where(both, e, 0.0)
        excess = excess * factor + tl.sum(terms, 1)
        finite = finite * factor + tl.sum(e, 1)
    if KIND == SPLIT:
        if MASKED:
            product = tl.where(at < shared, product, float("-inf"))
        largest = tl.maximum(largest, tl.max(product, 1))
    return top_s, sum_s, top_t, sum_t, top_x, sum_x, excess, finite, largest


@triton.jit
def _normalised(
    student, teacher, at, columns, shared, inv_t, log_s, log_t,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, TEMPERED: tl.constexpr, MASKED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The student's logits, both sides' log-probabilities and probabilities, and the teacher's products."""
    x, _ = _logits(student, at, columns, CAP_S, MASKED, KEPT)
    t, product = _logits(teacher, at, shared, CAP_T, MASKED, KEPT)
    s = _tempered(x, inv_t, TEMPERED) - log_s
    t = _tempered(t, inv_t, TEMPERED) - log_t
    if MASKED:
        s = tl.where(at < shared, s, float("-inf"))
    return x, s, t, tl.exp2(s), tl.exp2(t), product


@triton.jit
def _slope(s, t, p, q, a, b, c, JENSEN: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr):
    """Log of the mixture, and the derivative of ``a · q · log(q/m) + b · p · log(p/m)`` for log p over p.

    The latter up to a constant, and where JENSEN (the mixture is ``a · q + b · p``) a term of it is one.
    """
    mixture = tl.maximum(c * q + (1.0 - c) * p, _TINY)
    # The interpreter knows no libdevice, and tl.log2 takes some fifteen instructions instead of one.
    log_m = tl.log2(mixture) if _INTERPRETED else libdevice.fast_log2f(mixture)
    slope = tl.zeros_like(p)
    if HAS_B:
        own = tl.where(p > 0.0, s - log_m, 0.0)
        slope = (b * _LN2) * own
        if not JENSEN:
            slope -= ((1.0 - c) * b) * tl.exp2(own)
    if HAS_A and not JENSEN:
        slope -= ((1.0 - c) * a) * tl.exp2(t - log_m)
    return log_m, slope


@triton.jit
def _key_of(x):
    """Number of the bf16 value at or next to ``x`` towards zero, in the order of values."""
    bits = x.to(tl.int32, bitcast=True) >> 16
    return bits ^ ((bits >> 31) & 0x7FFF)


@triton.jit
def _value_of(key):
    bits = key ^ ((key >> 31) & 0x7FFF)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _logit_of(product, side, inv_t, CAP: tl.constexpr):
    """One product's tempered logit in bits."""
    x = product * side[2]
    if CAP:
        x = _capped(x, side[3])
    return x * inv_t


@triton.jit
def _product_of(x, side, inv_t, CAP: tl.constexpr):
    """The product of which a tempered logit in bits was made."""
    x = x / inv_t
    if CAP:
        share = tl.minimum(tl.maximum(x / side[3], -0.99999), 0.99999)
        x = side[3] * (0.5 * _LN2) * tl.log2((1.0 + share) / (1.0 - share))
    return x / side[2]


@triton.jit
def _keys(low, high):
    """Eight numbers of products between ``low`` and ``high``, which are divided by value where they are many."""
    first, last = _value_of(low), _value_of(high)
    keys = (high - 1,)
    for part in tl.static_range(1, 8):
        key = tl.where(
            high - low > 1024, _key_of(first + (last - first) * (part / 8.0)), low + (high - low) * part // 8
        )
        keys = keys + (tl.minimum(tl.maximum(key, low), high - 1),)
    return keys


@triton.jit
def _masses(sums, product, x, keys):
    """Add to eight sums what of ``x`` belongs to products of these numbers and above."""
    result = ()
    for j in tl.static_range(8):
        result = result + (sums[j] + tl.sum(tl.where(product >= _value_of(keys[j]), 1.0, 0.0) * x, 1),)
    return result


@triton.jit
def _bracket(
    teacher, inner, shared, inv_t, log_t, largest, limit,
    CAP: tl.constexpr, TEMPERED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Numbers of products, at most seven apart, between which the mass of the larger ones passes ``limit``.

    Products are bf16, so that they can be numbered. There is more mass than ``limit`` at and above the lower one, and
    no more at and above the higher. Returns that, and which turn is next.
    """
    high = _key_of(largest) + 1
    # Tokens below this logit are less probable than (1 - limit) / shared, and have less mass than 1 - limit together.
    lowest = _product_of(log_t + tl.log2(tl.maximum(1.0 - limit, 1e-9) / shared), teacher, inv_t, CAP)
    low = tl.minimum(_key_of(lowest - tl.abs(lowest) * 0.02 - 1e-6), high - 1)
    top = _logit_of(largest, teacher, inv_t, CAP)
    low = tl.where((tl.exp2(top - log_t) > limit) | (limit >= 1.0), high - 1, low)
    zero = tl.zeros([R], tl.float32)
    turn = 1
    while high - low > 7:
        keys = _keys(low, high)
        sums = (zero, zero, zero, zero, zero, zero, zero, zero)
        for start in range(0, inner, R * _LANE):
            x, product = _logits(teacher, _turned(start, inner, turn, R), shared, CAP, False, _AGAIN)
            sums = _masses(sums, product, tl.exp2(_tempered(x, inv_t, TEMPERED) - log_t), keys)
        for start in range(inner, shared, R * _LANE):
            x, product = _logits(teacher, _columns(start, R), shared, CAP, True, _AGAIN)
            sums = _masses(sums, product, tl.exp2(_tempered(x, inv_t, TEMPERED) - log_t), keys)
        for j in tl.static_range(8):
            more = tl.sum(sums[j], 0) > limit
            low = tl.where(more, tl.maximum(low, keys[j]), low)
            high = tl.where(more, high, tl.minimum(high, keys[j]))
        turn += 1
    return low, turn


@triton.jit
def _head_share(masses, gaps, low, whole, teacher, inv_t, log_t, largest, limit, CAP: tl.constexpr):
    """Share of the gap in the teacher's head, from masses and gaps at and above eight products in a row."""
    last, mass, gap = low, 0.0, 0.0
    tie_mass, tie_gap = 0.0, 0.0
    for j in tl.static_range(7):
        here, above = tl.sum(masses[j], 0), tl.sum(masses[j + 1], 0)
        is_last = (here > limit) | (j == 0)
        last = tl.where(is_last, low + j, last)
        mass = tl.where(is_last, above, mass)
        gap = tl.where(is_last, tl.sum(gaps[j + 1], 0), gap)
        tie_mass = tl.where(is_last, here - above, tie_mass)
        tie_gap = tl.where(is_last, tl.sum(gaps[j], 0) - tl.sum(gaps[j + 1], 0), tie_gap)
    each = tl.exp2(_logit_of(_value_of(last), teacher, inv_t, CAP) - log_t)
    # As many of those that tie for the last place as the limit leaves room for; the largest token always.
    inside = tl.maximum(tl.floor((limit - mass) / each), tl.where(last == _key_of(largest), 1.0, 0.0))
    head = gap + tie_gap * tl.minimum(inside * each / tl.maximum(tie_mass, _TINY), 1.0)
    head = tl.where(limit >= 1.0, whole, head)
    return tl.where(whole > 0.0, head / whole, 0.5)


@triton.jit
def _means(
    state, student, teacher, at, columns, shared, inv_t, log_s, log_t, a, b, c, keys,
    KIND: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, TEMPERED: tl.constexpr, JENSEN: tl.constexpr,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a block to the student's mean of what its gradient is made of, or to gap, masses and gaps of SPLIT."""
    mean, masses, gaps = state
    _, s, t, p, q, product = _normalised(
        student, teacher, at, columns, shared, inv_t, log_s, log_t, CAP_S, CAP_T, TEMPERED, MASKED, _AGAIN
    )
    if KIND == MIXTURE:
        _, slope = _slope(s, t, p, q, a, b, c, JENSEN, HAS_A, HAS_B)
        mean += tl.sum(p * slope, 1)
    elif KIND == ABSOLUTE:
        mean += tl.sum(tl.where(p > q, p, tl.where(p < q, -p, 0.0)), 1)
    else:
        gap = tl.abs(p - q)
        mean += tl.sum(gap, 1)
        masses = _masses(masses, product, q, keys)
        gaps = _masses(gaps, product, gap, keys)
    return mean, masses, gaps


@triton.jit
def _gradient(
    state, S, student, teacher, at, columns, shared, valid, inv_t, log_s, log_t, log_x, mean, head, label,
    a, b, c, kd_gain, ce_gain,
    KIND: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, TEMPERED: tl.constexpr, JENSEN: tl.constexpr,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_CE: tl.constexpr, GRADIENT: tl.constexpr, MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
):  # fmt: skip
    """Add a block to the sums of q · log(q/m), of p · log(p/m) and of the label's logit, and write its gradient."""
    of_t, of_s, of_label = state
    x, s, t, p, q, _ = _normalised(
        student, teacher, at, columns, shared, inv_t, log_s, log_t, CAP_S, CAP_T, TEMPERED, MASKED, _LAST
    )
    if KIND == ABSOLUTE:
        of_t += tl.sum(tl.abs(p - q), 1)
        g = p * (tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0)) - mean)
    elif KIND == MIXTURE:
        log_m, slope = _slope(s, t, p, q, a, b, c, JENSEN, HAS_A, HAS_B)
        if HAS_A:
            of_t += tl.sum(tl.where(q > 0.0, q * (t - log_m), 0.0), 1)
        if HAS_B:
            of_s += tl.sum(tl.where(p > 0.0, p * (s - log_m), 0.0), 1)
        g = p * (slope - mean)
    else:
        difference = s - t
        g = tl.zeros_like(p)
        if KIND == FORWARD or KIND == SPLIT:
            if GUARDED:
                of_t -= tl.sum(tl.where(q > 0.0, q * difference, 0.0), 1)
            else:
                of_t -= tl.sum(q * difference, 1)
            g = p - q
        if KIND == REVERSE or KIND == SPLIT:
            if GUARDED:
                of_s += tl.sum(tl.where(p > 0.0, p * difference, 0.0), 1)
                difference = tl.where((p > 0.0) & (t > float("-inf")), difference, 0.0)
            else:
                of_s += tl.sum(p * difference, 1)
            back = p * ((difference - mean) * _LN2)
            g = back if KIND == REVERSE else head * g + (1.0 - head) * back
    g = g * kd_gain
    if HAS_CE:
        of_label += tl.sum(tl.where(at == label, x, 0.0), 1)
        likely = tl.exp2(x - log_x)
        if MASKED:
            likely = tl.where(at < valid, likely, 0.0)
        g += ce_gain * (likely - tl.where(at == label, 1.0, 0.0))
    if GRADIENT:
        if CAP_S:
            share = x / student[3]
            g *= 1.0 - share * share
        if MASKED:
            tl.store(
                S + at,
                tl.where(at < columns, g, 0.0).to(S.dtype.element_ty),
                mask=at < student[1],
                eviction_policy=_LAST,
            )
        else:
            tl.store(S + at, g, eviction_policy=_LAST)
    return of_t, of_s, of_label


@triton.jit
def divergence_rows(
    S, T, LABELS, KD, CE, columns, stride_s, stride_t, shared, valid,
    scale_s, scale_t, cap_s, cap_t, inv_t, a, b, c, kd_gain, ce_gain,
    KIND: tl.constexpr, JENSEN: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, TEMPERED: tl.constexpr, HOLES: tl.constexpr, HAS_CE: tl.constexpr,
    GRADIENT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Divergence of each row into ``KD``, cross-entropy into ``CE``, and over ``S`` the gradient of their sum.

    Args:
        S: the student's products ``[n, columns]`` in bf16, rows ``stride_s`` apart, a multiple of 8.
        T: the teacher's, ``shared`` columns at least, rows ``stride_t`` apart.
        LABELS: reference tokens ``[n]``, read where HAS_CE.
        KD, CE: ``[n]``, fp32.
        columns, shared, valid: columns of S, of the divergence, and of the cross-entropy.
        scale_s, scale_t, cap_s, cap_t: the heads' scales and soft-caps over ln 2; a cap is read where CAP_S or CAP_T.
        inv_t: one over the temperature of the divergence, used where TEMPERED.
        a, b, c: the form's numbers: of MIXTURE teacher, student and share, of SPLIT the mass.
        kd_gain, ce_gain: weights of the two, times what a product's logit is scaled by.
        JENSEN, HAS_A, HAS_B: of MIXTURE: the mixture is ``a · T + b · S``; whether a and b are not 0.
        HOLES: whether products may be -inf.
        R: lanes; one takes 8 columns of a block.
    """
    row = tl.program_id(0).to(tl.int64)
    S += row * stride_s
    student, teacher = (S, stride_s, scale_s, cap_s), (T + row * stride_t, stride_t, scale_t, cap_t)
    BLOCK: tl.constexpr = R * _LANE
    zero = tl.zeros([R], tl.float32)
    low = zero + _LOWEST
    label = 0
    inner, outer = shared, shared
    if HAS_CE:
        label = tl.load(LABELS + row)
        inner, outer = tl.minimum(shared, valid), tl.maximum(shared, valid)
    inner = inner // BLOCK * BLOCK

    sums = (low, zero, low, zero, low, zero, zero, zero, low)
    for start in range(0, inner, BLOCK):
        sums = _statistics(
            sums, student, teacher, _columns(start, R), columns, shared, valid, inv_t,
            KIND, CAP_S, CAP_T, HAS_CE, TEMPERED, False, HOLES,
        )  # fmt: skip
    for start in range(inner, outer, BLOCK):
        sums = _statistics(
            sums, student, teacher, _columns(start, R), columns, shared, valid, inv_t,
            KIND, CAP_S, CAP_T, HAS_CE, TEMPERED, True, True,
        )  # fmt: skip
    log_s, share_s = _joined(sums[0], sums[1])
    log_t, _ = _joined(sums[2], sums[3])
    log_x, _ = _joined(sums[4], sums[5])
    mean, head = 0.0, 0.0
    turn = 1
    if KIND == REVERSE or KIND == SPLIT:
        mean = tl.sum(sums[6] * share_s, 0) - (log_s - log_t) * tl.sum(sums[7] * share_s, 0)

    if KIND == MIXTURE or KIND == ABSOLUTE or KIND == SPLIT:
        keys = (0, 0, 0, 0, 0, 0, 0, 0)
        largest = tl.max(sums[8], 0)
        if KIND == SPLIT:
            first, turn = _bracket(teacher, inner, shared, inv_t, log_t, largest, a, CAP_T, TEMPERED, R)
            keys = (first, first + 1, first + 2, first + 3, first + 4, first + 5, first + 6, first + 7)
        eight = (zero, zero, zero, zero, zero, zero, zero, zero)
        means = (zero, eight, eight)
        for start in range(inner, shared, BLOCK):
            means = _means(
                means, student, teacher, _columns(start, R), columns, shared, inv_t, log_s, log_t, a, b, c, keys,
                KIND, CAP_S, CAP_T, TEMPERED, JENSEN, HAS_A, HAS_B, True,
            )  # fmt: skip
        for start in range(0, inner, BLOCK):
            means = _means(
                means, student, teacher, _turned(start, inner, turn, R), columns, shared, inv_t, log_s, log_t,
                a, b, c, keys, KIND, CAP_S, CAP_T, TEMPERED, JENSEN, HAS_A, HAS_B, False,
            )  # fmt: skip
        turn += 1
        if KIND == SPLIT:
            whole = tl.sum(means[0], 0)
            head = _head_share(means[1], means[2], first, whole, teacher, inv_t, log_t, largest, a, CAP_T)
        elif KIND == ABSOLUTE:
            mean = tl.sum(means[0], 0) * 0.5
        else:
            mean = tl.sum(means[0], 0)

    values = (zero, zero, zero)
    for start in range(0, inner, BLOCK):
        values = _gradient(
            values, S, student, teacher, _turned(start, inner, turn, R), columns, shared, valid, inv_t, log_s, log_t,
            log_x, mean, head, label, a, b, c, kd_gain, ce_gain,
            KIND, CAP_S, CAP_T, TEMPERED, JENSEN, HAS_A, HAS_B, HAS_CE, GRADIENT, False, HOLES,
        )  # fmt: skip
    for start in range(inner, columns, BLOCK):
        values = _gradient(
            values, S, student, teacher, _columns(start, R), columns, shared, valid, inv_t, log_s, log_t, log_x, mean,
            head, label, a, b, c, kd_gain, ce_gain,
            KIND, CAP_S, CAP_T, TEMPERED, JENSEN, HAS_A, HAS_B, HAS_CE, GRADIENT, True, True,
        )  # fmt: skip
    of_t, of_s = tl.sum(values[0], 0), tl.sum(values[1], 0)
    if KIND == ABSOLUTE:
        value = 0.5 * of_t
    elif KIND == MIXTURE:
        value = (a * of_t + b * of_s) * _LN2
    elif KIND == SPLIT:  # a part without weight is left out instead of multiplied, since 0 · inf is NaN
        value = (tl.where(head > 0.0, head * of_t, 0.0) + tl.where(head < 1.0, (1.0 - head) * of_s, 0.0)) * _LN2
    else:
        value = (of_t + of_s) * _LN2
    tl.store(KD + row, tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL))
    if HAS_CE:
        tl.store(CE + row, (log_x - tl.sum(values[2], 0)) * _LN2)
