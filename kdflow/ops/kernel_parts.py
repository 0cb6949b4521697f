"""Parts of the head's kernel (:mod:`kdflow.ops.kernels`): blocks of logits, sums by lane, mixtures.

A block is ``[R, LANE]`` columns of a row; logarithms are binary, which saves the multiplication of every exponential. A
side of the distillation is a tuple: the pointer to its row of products, the distance of rows, scale and soft-cap; where
there is a cap, the scale is over it.
"""

# Triton's own language, from which it translates these functions.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

LANE = tl.constexpr(8)  # columns of a lane, 16 bytes
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def columns_of(start, R: tl.constexpr):
    """Columns of the block at ``start``, ``[R, LANE]``."""
    return start + tl.arange(0, R)[:, None] * LANE + tl.arange(0, LANE)[None, :]


@triton.jit
def turned(start, inner, turn, R: tl.constexpr):
    """Where the block at ``start`` of ``inner`` columns begins, or in an odd turn that at ``start`` from the end."""
    return tl.where(turn % 2 == 1, inner - R * LANE - start, start)


@triton.jit
def tanh(x):
    """In one instruction, to a share of 2^-11: a quarter of what rounding a product to bf16 may change."""
    if _INTERPRETED:
        y = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    else:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def logit_of(product, side, CAP: tl.constexpr):
    """The logit in bits of a product."""
    x = product * side[2]
    if CAP:
        x = side[3] * tanh(x)
    return x


@triton.jit
def logits(side, at, columns, CAP: tl.constexpr, MASKED: tl.constexpr):
    """One side's logits in bits, -inf from ``columns`` on, and the products they are made of."""
    if MASKED:
        product = tl.load(side[0] + at, mask=at < side[1], other=0.0).to(tl.float32)
    else:
        product = tl.load(side[0] + at).to(tl.float32)
    x = logit_of(product, side, CAP)
    if MASKED:
        x = tl.where(at < columns, x, float("-inf"))
    return x, product


@triton.jit
def cap_slope(product, side):
    """The derivative of a capped logit for what it was before."""
    share = tanh(product * side[2])  # where the logit is needed too, the compiler finds this once
    return 1.0 - share * share


@triton.jit
def keep(side, at, columns, x, MASKED: tl.constexpr):
    """Put fp16 in the place of one side's products, which are not needed any more."""
    place = side[0].to(tl.pointer_type(tl.float16), bitcast=True) + at
    if MASKED:
        tl.store(place, x.to(tl.float16), mask=at < columns)
    else:
        tl.store(place, x.to(tl.float16))


@triton.jit
def kept(side, at, columns, MASKED: tl.constexpr):
    """What was put there, 0 from ``columns`` on."""
    place = side[0].to(tl.pointer_type(tl.float16), bitcast=True) + at
    if MASKED:
        x = tl.load(place, mask=at < columns, other=0.0)
    else:
        x = tl.load(place)
    return x.to(tl.float32)


@triton.jit
def tempered(x, inv_t, TEMPERED: tl.constexpr):
    """Logits over the temperature."""
    if TEMPERED:
        x *= inv_t
    return x


@triton.jit
def added(top, total, x, BOUNDED: tl.constexpr):
    """Each lane's maximum and sum of exponentials with ``x`` too, the factor for its other sums, and exponentials.

    Where BOUNDED, ``top`` is no maximum but what no ``x`` exceeds.
    """
    higher, factor = top, 1.0
    if not BOUNDED:
        higher = tl.maximum(top, tl.max(x, 1))
        factor = tl.exp2(top - higher)
    e = tl.exp2(x - higher[:, None])
    return higher, total * factor + tl.sum(e, 1), factor, e


@triton.jit
def joined(top, total):
    """The log of the sum of all lanes' exponentials, and each lane's factor to a share of it."""
    highest = tl.max(top, 0)
    log_sum = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
    return log_sum, tl.exp2(top - log_sum)


@triton.jit
def normalised(
    student, teacher, at, columns, shared, inv_t, log_s, log_t,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, TEMPERED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The student's logits, both sides' log-probabilities and probabilities, and the products of both."""
    x, own = logits(student, at, columns, CAP_S, MASKED)
    t, product = logits(teacher, at, shared, CAP_T, MASKED)
    s = tempered(x, inv_t, TEMPERED) - log_s
    t = tempered(t, inv_t, TEMPERED) - log_t
    if MASKED:
        s = tl.where(at < shared, s, float("-inf"))
    return x, s, t, tl.exp2(s), tl.exp2(t), own, product


@triton.jit
def log2(x):
    """In one instruction, to about 1e-7."""
    # The interpreter knows no libdevice, and tl.log2 takes some fifteen instructions instead of one.
    return tl.log2(x) if _INTERPRETED else libdevice.fast_log2f(x)


@triton.jit
def reciprocal(x):
    """In one instruction, to about 1e-7."""
    if _INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def mixed(s, t, p, q, a, b, c, JENSEN: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, GUARDED: tl.constexpr):
    """p, q, log(q/m), log(p/m), and the derivative of ``a · q · log(q/m) + b · p · log(p/m)`` for log p over p.

    From one side over the other, so that the logarithms are exactly 0 where p = q. The derivative is up to a constant,
    and where JENSEN (the mixture m is ``a · q + b · p``) a term of it is one.
    """
    if HAS_B:  # q over p: log(p/m) is in the derivative, and so exact also where it is almost 0
        log_odds = t - s
        if GUARDED:  # where p is 0, whatever is finite will do for log(p/m), and q/m is one over c
            log_odds = tl.maximum(tl.where(s > float("-inf"), log_odds, 126.0), -126.0)
        log_odds = tl.minimum(log_odds, 126.0)
        odds = tl.exp2(log_odds)
        mixture = (1.0 - c) + c * odds
        of_s = -log2(mixture)
        of_t = log_odds + of_s
        slope = (b * LN2) * of_s
        if not JENSEN:
            own = b + a * odds if HAS_A else b
            slope -= ((1.0 - c) * own) * reciprocal(mixture)
    else:  # p over q, which gives p without another exponential
        t = tl.maximum(t, -126.0)
        log_odds = s - t
        q, odds = tl.exp2(t), tl.exp2(log_odds)
        p = q * odds
        mixture = c + (1.0 - c) * odds
        of_t = -log2(mixture)
        of_s = of_t  # unused
        slope = -((1.0 - c) * a) * reciprocal(mixture)
    return p, q, of_t, of_s, slope


@triton.jit
def mixture_values(values, p, q, log_t_m, log_s_m, HAS_A: tl.constexpr, HAS_B: tl.constexpr):
    """Add a block to the sums of q · log(q/m) and p · log(p/m)."""
    of_t, of_s = values
    if HAS_A:
        of_t += tl.sum(q * log_t_m, 1)
    if HAS_B:
        of_s += tl.sum(p * log_s_m, 1)
    return of_t, of_s


@triton.jit
def absolute_values(values, p, q):
    """Add a block to the sum of |p - q|."""
    return values[0] + tl.sum(tl.abs(p - q), 1), values[1]
