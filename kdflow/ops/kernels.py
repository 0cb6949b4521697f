"""The Triton kernel of the distillation head: from both sides' products to the divergence of each row and its gradient.

One program has one row and goes over it two times or more: softmax statistics, then, where the gradient needs sums of
normalised probabilities, those, and last the value and the gradient, which takes the place of the student's products.
Every other pass runs backwards, since what was read last may still be in the cache. Sums are kept by each lane until a
pass ends, so that warps do not wait for each other. Logarithms are binary, which saves the multiplication of every
exponential. Only blocks that reach past ``inner`` columns are masked: there are columns that are padding of a side.
"""

# Triton's own language, from which it translates these functions.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kdflow.ops.distillation import Distillation
from kdflow.ops.forms import Kind
from kdflow.ops.kernel_parts import (
    LANE,
    LN2,
    absolute_values,
    added,
    cap_slope,
    columns_of,
    joined,
    keep,
    kept,
    logit_of,
    logits,
    mixed,
    mixture_values,
    normalised,
    tempered,
    turned,
)
from kdflow.ops.kernel_search import PASSES, WINDOW, head_share
from kdflow.ops.tuning import CANDIDATES, Blocks

FORWARD, REVERSE, MIXTURE, ABSOLUTE, SPLIT = (tl.constexpr(int(kind)) for kind in Kind)
_LOWEST = tl.constexpr(-1e30)  # below every logit, and finite, so that differences are no NaN
# A probability times this is kept in fp16 with full precision from 2e-9 on, and none is infinite.
_KEPT_SCALE = tl.constexpr(32768.0)
_BOUND = 45.0  # bits: exponentials over lower caps are 2^-90 at least, which fp32 holds with full precision
_SMALLEST = tl.constexpr(-1e38)  # of products, likewise


@triton.jit
def _statistics(
    state, student, teacher, at, columns, shared, valid, inv_t,
    KIND: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BOUNDED: tl.constexpr, OWN_CE: tl.constexpr,
    TEMPERED: tl.constexpr, MASKED: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """Add a block to maxima and sums of the student, the teacher and the cross-entropy, and to sums of p · log(p/q)."""
    top_s, sum_s, top_t, sum_t, top_x, sum_x, excess, finite, largest, smallest = state
    s, _ = logits(student, at, columns, CAP_S, MASKED)
    t, product = logits(teacher, at, shared, CAP_T, MASKED)
    if OWN_CE:
        if MASKED:
            top_x, sum_x, _, _ = added(top_x, sum_x, tl.where(at < valid, s, float("-inf")), BOUNDED)
        else:
            top_x, sum_x, _, _ = added(top_x, sum_x, s, BOUNDED)
    s = tempered(s, inv_t, TEMPERED)
    t = tempered(t, inv_t, TEMPERED)
    if MASKED:
        s = tl.where(at < shared, s, float("-inf"))
    top_s, sum_s, factor, e = added(top_s, sum_s, s, BOUNDED)
    top_t, sum_t, _, _ = added(top_t, sum_t, t, BOUNDED)
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
        if CAP_T:
            if MASKED:
                product = tl.where(at < shared, product, float("inf"))
            smallest = tl.minimum(smallest, tl.min(product, 1))
    return top_s, sum_s, top_t, sum_t, top_x, sum_x, excess, finite, largest, smallest


@triton.jit
def _means(
    mean, values, student, teacher, at, columns, shared, inv_t, log_s, log_t, a, b, c,
    KIND: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, TEMPERED: tl.constexpr, JENSEN: tl.constexpr,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, KEEP: tl.constexpr, MASKED: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """Add a block to the student's mean of what its gradient is made of.

    With KEEP, of ABSOLUTE, the value is summed too, and ±p takes the place of the teacher's products.
    """
    _, s, t, p, q, own, _ = normalised(
        student, teacher, at, columns, shared, inv_t, log_s, log_t, CAP_S, CAP_T, TEMPERED, MASKED
    )
    if KIND == MIXTURE:
        p, _, _, _, slope = mixed(s, t, p, q, a, b, c, JENSEN, HAS_A, HAS_B, GUARDED)
        mean += tl.sum(p * slope, 1)
    else:
        signed = tl.where(p > q, p, tl.where(p < q, -p, 0.0))
        mean += tl.sum(signed, 1)
        if KEEP:
            values = absolute_values(values, p, q)
            signed = tl.where(p < q, -p, p) * _KEPT_SCALE
            keep(teacher, at, shared, signed * cap_slope(own, student) if CAP_S else signed, MASKED)
    return mean, values


@triton.jit
def _gradient(
    values, S, student, teacher, first, columns, shared, valid, inv_t, log_s, log_t, log_x, mean, head, label,
    a, b, c, kd_gain, ce_gain,
    KIND: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, TEMPERED: tl.constexpr, JENSEN: tl.constexpr,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_CE: tl.constexpr, GRADIENT: tl.constexpr, KEEP: tl.constexpr,
    MASKED: tl.constexpr, GUARDED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Add the block at ``first`` to the sums of q · log(q/m) and p · log(p/m), and write its gradient."""
    at = columns_of(first, R)
    if KEEP:  # the slope of the cap is in what was kept
        made = kept(teacher, at, shared, MASKED)
        g = made * (0.5 / _KEPT_SCALE) - tl.abs(made) * (mean / _KEPT_SCALE)
        if HAS_CE:
            x, own = logits(student, at, columns, CAP_S, MASKED)
    else:
        x, s, t, p, q, own, _ = normalised(
            student, teacher, at, columns, shared, inv_t, log_s, log_t, CAP_S, CAP_T, TEMPERED, MASKED
        )
        if KIND == ABSOLUTE:
            values = absolute_values(values, p, q)
            g = p * (tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0)) - mean)
        elif KIND == MIXTURE:
            p, q, log_t_m, log_s_m, slope = mixed(s, t, p, q, a, b, c, JENSEN, HAS_A, HAS_B, GUARDED)
            values = mixture_values(values, p, q, log_t_m, log_s_m, HAS_A, HAS_B)
            g = p * (slope - mean)
        else:
            of_t, of_s = values
            difference = s - t
            g = tl.zeros_like(p)
            toward, away = head * kd_gain, (1.0 - head) * (LN2 * kd_gain)
            if KIND == FORWARD or KIND == SPLIT:
                if GUARDED:
                    of_t -= tl.sum(tl.where(q > 0.0, q * difference, 0.0), 1)
                else:
                    of_t -= tl.sum(q * difference, 1)
                g = (p - q) * toward
            if KIND == REVERSE or KIND == SPLIT:
                if GUARDED:
                    of_s += tl.sum(tl.where(p > 0.0, p * difference, 0.0), 1)
                    difference = tl.where((p > 0.0) & (t > float("-inf")), difference, 0.0)
                else:
                    of_s += tl.sum(p * difference, 1)
                g += p * (difference * away - mean * away)
            values = (of_t, of_s)
    if KIND == MIXTURE or KIND == ABSOLUTE:
        g = g * kd_gain
    if HAS_CE:
        likely = tl.exp2(x - log_x)
        if MASKED:
            likely = tl.where(at < valid, likely, 0.0)
        of_ce = ce_gain * likely
        if (label >= first) & (label < first + R * LANE):
            of_ce -= tl.where(at == label, ce_gain, 0.0)
        g += of_ce * cap_slope(own, student) if KEEP and CAP_S else of_ce
    if GRADIENT:
        if CAP_S and not KEEP:
            g *= cap_slope(own, student)
        g = (tl.where(at < columns, g, 0.0) if MASKED else g).to(S.dtype.element_ty)
        if MASKED:
            tl.store(S + at, g, mask=at < student[1])
        else:
            tl.store(S + at, g)
    return values


@triton.jit
def divergence_rows(
    S, T, LABELS, KD, CE, WINDOWS, columns, stride_s, stride_t, shared, valid,
    scale_s, scale_t, cap_s, cap_t, inv_t, a, b, c, kd_gain, ce_gain,
    KIND: tl.constexpr, JENSEN: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, BOUNDED: tl.constexpr, TEMPERED: tl.constexpr, HOLES: tl.constexpr,
    HAS_CE: tl.constexpr, OWN_CE: tl.constexpr, GRADIENT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Divergence of each row into ``KD``, cross-entropy into ``CE``, and over ``S`` the gradient of their sum.

    Args:
        S: the student's products ``[n, columns]`` in bf16, rows ``stride_s`` apart, a multiple of 8.
        T: the teacher's, ``shared`` columns at least, rows ``stride_t`` apart.
        LABELS: reference tokens ``[n]``, read where HAS_CE.
        KD, CE: ``[n]``, fp32.
        WINDOWS: of SPLIT ``[n, PASSES, WINDOW, 2]``, zeros in fp32, which are written.
        columns, shared, valid: columns of S, of the divergence, and of the cross-entropy.
        scale_s, scale_t: the heads' scales over ln 2, or over the cap where CAP_S or CAP_T.
        cap_s, cap_t: soft-caps over ln 2.
        inv_t: one over the temperature of the divergence, used where TEMPERED.
        a, b, c: the form's numbers: of MIXTURE teacher, student and share, of SPLIT the mass.
        kd_gain, ce_gain: weights of the two, times what a product's logit is scaled by.
        JENSEN, HAS_A, HAS_B: of MIXTURE: the mixture is ``a · T + b · S``; whether a and b are not 0.
        BOUNDED: with CAP_S and CAP_T: whether the caps are so low that exponentials may be over them, not over maxima.
        HOLES: whether products may be -inf.
        OWN_CE: with HAS_CE: whether its softmax is another than the divergence's.
        R: lanes; one takes 8 columns of a block.
    """
    row = tl.program_id(0).to(tl.int64)
    S += row * stride_s
    student, teacher = (S, stride_s, scale_s, cap_s), (T + row * stride_t, stride_t, scale_t, cap_t)
    BLOCK: tl.constexpr = R * LANE
    # Where caps add theirs, special functions take longer than memory: the second pass leaves in T what the third uses.
    # Of a mixture that is less exact than what the third pass makes itself.
    KEEP: tl.constexpr = KIND == ABSOLUTE and GRADIENT and (CAP_S or CAP_T)
    zero = tl.zeros([R], tl.float32)
    low = zero + _LOWEST
    top_s, top_t, top_x = low, low, low
    if BOUNDED:
        top_s, top_t = zero + tempered(cap_s, inv_t, TEMPERED), zero + tempered(cap_t, inv_t, TEMPERED)
        top_x = zero + cap_s
    label, of_label = 0, 0.0
    inner, outer = shared, shared
    if HAS_CE:
        label = tl.load(LABELS + row)
        of_label = tl.load(S + label, mask=(label >= 0) & (label < columns), other=0.0).to(tl.float32)
        of_label = logit_of(of_label, student, CAP_S)
        inner, outer = tl.minimum(shared, valid), tl.maximum(shared, valid)
    inner = inner // BLOCK * BLOCK

    sums = (top_s, zero, top_t, zero, top_x, zero, zero, zero, low, -low)
    for start in range(0, inner, BLOCK):
        sums = _statistics(
            sums, student, teacher, columns_of(start, R), columns, shared, valid, inv_t,
            KIND, CAP_S, CAP_T, BOUNDED, OWN_CE, TEMPERED, False, HOLES,
        )  # fmt: skip
    for start in range(inner, outer, BLOCK):
        sums = _statistics(
            sums, student, teacher, columns_of(start, R), columns, shared, valid, inv_t,
            KIND, CAP_S, CAP_T, BOUNDED, OWN_CE, TEMPERED, True, True,
        )  # fmt: skip
    log_s, share_s = joined(sums[0], sums[1])
    log_t, _ = joined(sums[2], sums[3])
    log_x = log_s
    if OWN_CE:
        log_x, _ = joined(sums[4], sums[5])
    mean = 0.0
    head = 1.0 if KIND == FORWARD else 0.0  # the weight of the forward divergence
    turn = 1
    values = (zero, zero)
    if KIND == REVERSE or KIND == SPLIT:
        mean = tl.sum(sums[6] * share_s, 0) - (log_s - log_t) * tl.sum(sums[7] * share_s, 0)

    if KIND == SPLIT:
        head, turn = head_share(
            WINDOWS + row * (2 * PASSES * WINDOW), student, teacher, inner, columns, shared, inv_t, log_s, log_t,
            tl.maximum(tl.min(sums[9], 0), _SMALLEST), tl.max(sums[8], 0), a, CAP_S, CAP_T, TEMPERED, R,
        )  # fmt: skip
    elif KIND == MIXTURE or KIND == ABSOLUTE:
        means = zero
        for start in range(inner, shared, BLOCK):
            means, values = _means(
                means, values, student, teacher, columns_of(start, R), columns, shared, inv_t, log_s, log_t,
                a, b, c, KIND, CAP_S, CAP_T, TEMPERED, JENSEN, HAS_A, HAS_B, KEEP, True, True,
            )  # fmt: skip
        for start in range(0, inner, BLOCK):
            means, values = _means(
                means, values, student, teacher, columns_of(turned(start, inner, turn, R), R), columns, shared, inv_t,
                log_s, log_t, a, b, c, KIND, CAP_S, CAP_T, TEMPERED, JENSEN, HAS_A, HAS_B, KEEP, False, HOLES,
            )  # fmt: skip
        turn += 1
        if KEEP:
            tl.debug_barrier()  # other threads may read what one has left there
        mean = tl.sum(means, 0)
        if KIND == ABSOLUTE:
            mean *= 0.5

    for start in range(0, inner, BLOCK):
        values = _gradient(
            values, S, student, teacher, turned(start, inner, turn, R), columns, shared, valid, inv_t, log_s, log_t,
            log_x, mean, head, label, a, b, c, kd_gain, ce_gain,
            KIND, CAP_S, CAP_T, TEMPERED, JENSEN, HAS_A, HAS_B, HAS_CE, GRADIENT, KEEP, False, HOLES, R,
        )  # fmt: skip
    for start in range(inner, columns, BLOCK):
        values = _gradient(
            values, S, student, teacher, start, columns, shared, valid, inv_t, log_s, log_t, log_x, mean, head, label,
            a, b, c, kd_gain, ce_gain,
            KIND, CAP_S, CAP_T, TEMPERED, JENSEN, HAS_A, HAS_B, HAS_CE, GRADIENT, KEEP, True, True, R,
        )  # fmt: skip
    of_t, of_s = tl.sum(values[0], 0), tl.sum(values[1], 0)
    if KIND == ABSOLUTE:
        value = 0.5 * of_t
    elif KIND == MIXTURE:
        value = (a * of_t + b * of_s) * LN2
    elif KIND == SPLIT:  # a part without weight is left out instead of multiplied, since 0 · inf is NaN
        value = (tl.where(head > 0.0, head * of_t, 0.0) + tl.where(head < 1.0, (1.0 - head) * of_s, 0.0)) * LN2
    else:
        value = (of_t + of_s) * LN2
    # Comparisons and maxima have dropped what is not a number; the sums of exponentials have not, and a row without a
    # finite logit has none.
    value = tl.where((log_s > float("-inf")) & (log_t > float("-inf")), tl.maximum(value, 0.0), float("nan"))
    tl.store(KD + row, value)
    if HAS_CE:
        tl.store(CE + row, (log_x - of_label) * LN2)


def constants(work: Distillation, gradient: bool) -> dict[str, Any]:
    """What the kernel is compiled for, besides its blocks."""
    student, teacher, n = work.student, work.teacher, work.numbers()
    cap_s, cap_t = student.softcap is not None, teacher.softcap is not None
    return {
        "KIND": int(n.kind), "JENSEN": n.jensen, "HAS_A": n.a != 0.0, "HAS_B": n.b != 0.0,
        "CAP_S": cap_s, "CAP_T": cap_t, "TEMPERED": n.inv_t != 1.0,
        "BOUNDED": cap_s and cap_t and max(n.cap_s, n.cap_t) * max(n.inv_t, 1.0) < _BOUND,
        "HOLES": student.bias is not None or teacher.bias is not None, "HAS_CE": work.labels is not None,
        "OWN_CE": work.labels is not None and not work.one_softmax, "GRADIENT": gradient,
    }  # fmt: skip


def launch(
    s: Tensor, t: Tensor, labels: Tensor | None, kd: Tensor, ce: Tensor, work: Distillation, gradient: bool,
    blocks: Blocks = CANDIDATES[0],
) -> None:  # fmt: skip
    """Run the kernel on products ``s [n, V_s]`` and ``t [n, V_t]``."""
    n, compiled = work.numbers(), constants(work, gradient)
    cap_s, cap_t = compiled["CAP_S"], compiled["CAP_T"]
    windows = kd.new_zeros(len(s), PASSES.value, WINDOW.value, 2) if n.kind == Kind.SPLIT else kd  # else unread
    divergence_rows[(len(s),)](
        s, t, labels, kd, ce, windows, work.student.vocab_size, s.stride(0), t.stride(0), *work.columns,
        n.scale_s / n.cap_s if cap_s else n.scale_s, n.scale_t / n.cap_t if cap_t else n.scale_t, n.cap_s, n.cap_t,
        n.inv_t, n.a, n.b, n.c, n.kd_gain, n.ce_gain, **compiled, R=blocks.lanes, num_warps=blocks.warps,
    )  # fmt: skip
