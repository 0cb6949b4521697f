"""The Triton kernel of the distillation head: from both sides' logits to the divergence of each row and its gradient.

One program has one row and goes over it two or three times: softmax statistics, then, where the gradient needs sums of
normalised probabilities, those, and last the value and the gradient, which takes the place of the student's logits.
Every other pass runs backwards, since what was read last is still in the cache. Sums are kept by each lane until a pass
ends, so that warps do not wait for each other. Columns that are padding count as -inf.
"""

# Triton's own language: it reads the source of these functions.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

FORWARD, REVERSE, MIXTURE, ABSOLUTE, SPLIT = (tl.constexpr(kind) for kind in range(5))
_LOWEST = tl.constexpr(-1e30)  # below every logit, and finite, so that differences are no NaN
_LANE = tl.constexpr(8)  # columns of a lane, 16 bytes


@triton.jit
def _columns(start, R: tl.constexpr):
    return start + tl.arange(0, R)[:, None] * _LANE + tl.arange(0, _LANE)[None, :]


@triton.jit
def _products(row, c, stride):
    return tl.load(row + c, mask=c < stride, other=0.0).to(tl.float32)


@triton.jit
def _logits(x, c, width, scale, cap, CAP: tl.constexpr):
    """What the head makes of its products, with -inf from column ``width`` on."""
    x = x * scale
    if CAP:
        x = cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)
    return tl.where(c < width, x, float("-inf"))


@triton.jit
def _added(top, total, x):
    """Each lane's maximum and sum of exponentials with ``x`` too, the factor for its other sums, and exponentials."""
    higher = tl.maximum(top, tl.max(x, 1))
    factor = tl.exp(top - higher)
    e = tl.exp(x - higher[:, None])
    return higher, total * factor + tl.sum(e, 1), factor, e


@triton.jit
def _joined(top, total):
    """The log of the sum of all lanes' exponentials, and each lane's factor to a share of it."""
    highest = tl.max(top, 0)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    return log_sum, tl.exp(top - log_sum)


@triton.jit
def _key_of(x):
    """Number of the bf16 value at or next to ``x`` towards zero, in the order of values."""
    bits = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int32)
    return bits ^ ((bits >> 31) & 0x7FFF)


@triton.jit
def _value_of(key):
    bits = key ^ ((key >> 31) & 0x7FFF)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _boundary(T, stride, width, scale, cap, inv_t, log_t, limit, CAP: tl.constexpr, R: tl.constexpr):
    """The largest product at and above which there is more mass than ``limit``, and the largest of all.

    Products are bf16, so that they can be numbered; eight numbers are tried in a pass.
    """
    top = tl.full([R], float("-inf"), tl.float32)
    for start in range(0, width, R * _LANE):
        c = _columns(start, R)
        top = tl.maximum(top, tl.max(tl.where(c < width, _products(T, c, stride), float("-inf")), 1))
    largest = tl.max(top, 0)
    # Tokens below this logit are less probable than (1 - limit) / width, and so have less mass than 1 - limit.
    lowest = (log_t + tl.log(tl.maximum(1.0 - limit, 1e-9) / width)) / inv_t
    if CAP:
        share = tl.maximum(lowest / cap, -0.9999)
        lowest = 0.5 * cap * tl.log((1.0 + share) / (1.0 - share))
    lowest = tl.minimum(lowest / scale, largest)
    low = _key_of(lowest - tl.abs(lowest) * 0.02 - 1e-6)
    high = _key_of(largest) + 1
    while high - low > 1:
        first, last = _value_of(low), _value_of(high)
        keys = (high - 1,)
        for part in tl.static_range(1, 8):
            # Numbers are many around zero: there the bracket is divided by value.
            by_value = _key_of(first + (last - first) * (part / 8.0))
            key = tl.where(high - low > 1024, by_value, low + (high - low) * part // 8)
            keys = keys + (tl.minimum(tl.maximum(key, low), high - 1),)
        lanes = tl.zeros([R], tl.float32)
        masses = (lanes, lanes, lanes, lanes, lanes, lanes, lanes, lanes)
        for start in range(0, width, R * _LANE):
            c = _columns(start, R)
            x = _products(T, c, stride)
            p = tl.exp(_logits(x, c, width, scale, cap, CAP) * inv_t - log_t)
            sums = ()
            for j in tl.static_range(8):
                sums = sums + (masses[j] + tl.sum(tl.where(x >= _value_of(keys[j]), p, 0.0), 1),)
            masses = sums
        for j in tl.static_range(8):
            more = tl.sum(masses[j], 0) > limit
            low = tl.where(more, tl.maximum(low, keys[j]), low)
            high = tl.where(more, high, tl.minimum(high, keys[j]))
    return _value_of(low), largest


@triton.jit
def divergence_rows(
    S, T, LABELS, KD, CE, student_columns, stride_s, stride_t, shared, valid,
    scale_s, scale_t, cap_s, cap_t, inv_t, a, b, c, kd_weight, ce_weight,
    KIND: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, HAS_CE: tl.constexpr, GRADIENT: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """Divergence of each row into ``KD``, cross-entropy into ``CE``, and over ``S`` the gradient of their sum.

    Args:
        S: the student's products ``[n, student_columns]`` in bf16, rows ``stride_s`` apart, a multiple of 8.
        T: the teacher's.
        LABELS: reference tokens ``[n]``, read where HAS_CE.
        KD, CE: ``[n]``, fp32.
        student_columns, shared, valid: columns of S, of the divergence, and of the cross-entropy.
        scale_s, scale_t, cap_s, cap_t: the heads'; a cap is read where CAP_S or CAP_T.
        inv_t: one over the temperature of the divergence.
        a, b, c: the form's numbers: of MIXTURE teacher, student and share, of SPLIT the mass.
        kd_weight, ce_weight: of the gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    S += row * stride_s
    T += row * stride_t
    BLOCK: tl.constexpr = R * _LANE
    zero = tl.zeros([R], tl.float32)
    lowest = zero + _LOWEST
    label = 0
    if HAS_CE:
        label = tl.load(LABELS + row)

    # Statistics. Where the other side is -inf a term of a divergence is infinite, and has no part in the gradient.
    top_s, sum_s, top_t, sum_t, top_x, sum_x = lowest, zero, lowest, zero, lowest, zero
    excess, finite = zero, zero
    reach = shared
    if HAS_CE:
        reach = tl.maximum(shared, valid)
    for start in range(0, reach, BLOCK):
        at = _columns(start, R)
        x = _logits(_products(S, at, stride_s), at, student_columns, scale_s, cap_s, CAP_S)
        if HAS_CE:
            top_x, sum_x, _, _ = _added(top_x, sum_x, tl.where(at < valid, x, float("-inf")))
        s = tl.where(at < shared, x * inv_t, float("-inf"))
        t = _logits(_products(T, at, stride_t), at, shared, scale_t, cap_t, CAP_T) * inv_t
        top_s, sum_s, factor, e = _added(top_s, sum_s, s)
        top_t, sum_t, _, _ = _added(top_t, sum_t, t)
        if KIND == REVERSE or KIND == SPLIT:
            both = (s > float("-inf")) & (t > float("-inf"))
            excess = excess * factor + tl.sum(tl.where(both, e * (s - t), 0.0), 1)
            finite = finite * factor + tl.sum(tl.where(both, e, 0.0), 1)
    log_s, share_s = _joined(top_s, sum_s)
    log_t, _ = _joined(top_t, sum_t)
    log_x = 0.0
    if HAS_CE:
        log_x, _ = _joined(top_x, sum_x)

    # Mean over the student's probabilities of what its gradient is proportional to.
    mean = 0.0
    head = 0.0
    if KIND == REVERSE or KIND == SPLIT:
        mean = tl.sum(excess * share_s, 0) - (log_s - log_t) * tl.sum(finite * share_s, 0)
    boundary, largest = 0.0, 0.0
    if KIND == SPLIT:
        boundary, largest = _boundary(T, stride_t, shared, scale_t, cap_t, inv_t, log_t, a, CAP_T, R)
    if KIND == MIXTURE or KIND == ABSOLUTE or KIND == SPLIT:
        sums, gaps, above, ties, mass, count = zero, zero, zero, zero, zero, zero
        blocks = tl.cdiv(shared, BLOCK)
        for i in range(0, blocks):
            at = _columns((blocks - 1 - i) * BLOCK, R)
            product = _products(T, at, stride_t)
            s = _logits(_products(S, at, stride_s), at, shared, scale_s, cap_s, CAP_S) * inv_t - log_s
            t = _logits(product, at, shared, scale_t, cap_t, CAP_T) * inv_t - log_t
            p, q = tl.exp(s), tl.exp(t)
            if KIND == MIXTURE:
                sums += tl.sum(p * _slope(s, p, q, a, b, c), 1)
            elif KIND == ABSOLUTE:
                sums += tl.sum(tl.where(p > q, p, tl.where(p < q, -p, 0.0)), 1) * 0.5
            else:
                gap = tl.abs(p - q)
                gaps += tl.sum(gap, 1)
                above += tl.sum(tl.where(product > boundary, gap, 0.0), 1)
                mass += tl.sum(tl.where(product > boundary, q, 0.0), 1)
                tie = (product == boundary) & (at < shared)
                ties += tl.sum(tl.where(tie, gap, 0.0), 1)
                count += tl.sum(tl.where(tie, 1.0, 0.0), 1)
        if KIND == SPLIT:
            each = tl.exp(_logits(boundary, 0, 1, scale_t, cap_t, CAP_T) * inv_t - log_t)
            inside = tl.maximum(tl.floor((a - tl.sum(mass, 0)) / each), tl.where(boundary == largest, 1.0, 0.0))
            whole = tl.sum(gaps, 0)
            head = tl.sum(above, 0) + tl.sum(ties, 0) * tl.minimum(inside / tl.sum(count, 0), 1.0)
            head = tl.where(a >= 1.0, whole, head)
            head = tl.where(whole > 0.0, head / whole, 0.5)
        else:
            mean = tl.sum(sums, 0)

    # Value and gradient.
    value, other, of_label = zero, zero, zero
    blocks = tl.cdiv(student_columns, BLOCK)
    for i in range(0, blocks):
        block = i
        if KIND == FORWARD or KIND == REVERSE:
            block = blocks - 1 - i
        at = _columns(block * BLOCK, R)
        x = _logits(_products(S, at, stride_s), at, student_columns, scale_s, cap_s, CAP_S)
        s = tl.where(at < shared, x * inv_t, float("-inf")) - log_s
        t = _logits(_products(T, at, stride_t), at, shared, scale_t, cap_t, CAP_T) * inv_t - log_t
        p, q = tl.exp(s), tl.exp(t)
        if KIND == FORWARD:
            value += tl.sum(tl.where(q > 0.0, q * (t - s), 0.0), 1)
            g = p - q
        elif KIND == REVERSE:
            value += tl.sum(tl.where(p > 0.0, p * (s - t), 0.0), 1)
            g = p * (tl.where((p > 0.0) & (t > float("-inf")), s - t, 0.0) - mean)
        elif KIND == MIXTURE:
            m = _log_mixture(p, q, c)
            value += a * tl.sum(tl.where(q > 0.0, q * (t - m), 0.0), 1)
            value += b * tl.sum(tl.where(p > 0.0, p * (s - m), 0.0), 1)
            g = p * (_slope(s, p, q, a, b, c) - mean)
        elif KIND == ABSOLUTE:
            value += tl.sum(tl.abs(p - q), 1) * 0.5
            g = p * (tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0)) - mean)
        else:
            value += tl.sum(tl.where(q > 0.0, q * (t - s), 0.0), 1)
            other += tl.sum(tl.where(p > 0.0, p * (s - t), 0.0), 1)
            difference = tl.where((p > 0.0) & (t > float("-inf")), s - t, 0.0)
            g = head * (p - q) + (1.0 - head) * p * (difference - mean)
        g = g * (kd_weight * inv_t)
        if HAS_CE:
            of_label += tl.sum(tl.where(at == label, x, 0.0), 1)
            likely = tl.where(at < valid, tl.exp(x - log_x), 0.0)
            g += ce_weight * (likely - tl.where(at == label, 1.0, 0.0))
        if GRADIENT:
            if CAP_S:
                g *= 1.0 - (x / cap_s) * (x / cap_s)
            g = tl.where(at < student_columns, g * scale_s, 0.0)
            tl.store(S + at, g.to(S.dtype.element_ty), mask=at < stride_s)
    result = tl.sum(value, 0)
    if KIND == SPLIT:
        result = tl.where(head > 0.0, head * result, 0.0)
        result += tl.where(head < 1.0, (1.0 - head) * tl.sum(other, 0), 0.0)
    tl.store(KD + row, tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL))
    if HAS_CE:
        tl.store(CE + row, log_x - tl.sum(of_label, 0))


@triton.jit
def _log_mixture(p, q, share):
    return tl.log(tl.maximum(share * q + (1.0 - share) * p, 1.2e-38))


@triton.jit
def _slope(s, p, q, a, b, c):
    """Derivative of ``a · q · log(q/m) + b · p · log(p/m)`` for log p, divided by p, up to a constant."""
    mixture = tl.maximum(c * q + (1.0 - c) * p, 1.2e-38)
    own = tl.where(p > 0.0, s - tl.log(mixture), 0.0)
    return b * own - (1.0 - c) * (a * q + b * p) / mixture
