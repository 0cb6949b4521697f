"""The kernel of the distillation head on a CPU: what :mod:`kdflow.ops.kernels` computes on a GPU.

A thread has one row at a time, in fp32 buffers that stay in its cache. Exponentials and logarithms are polynomials, of
which the compiler makes vector code, unlike of the C library's; both are binary.
"""

# numba's own language, from which it translates these functions.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, call-arg, var-annotated, unreachable"

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor

from kdflow.compiled import compiled
from kdflow.ops.distillation import Distillation
from kdflow.ops.forms import Kind

_F, _I = np.float32, np.int32
_LN2, _LOG2E = _F(math.log(2.0)), _F(1.0 / math.log(2.0))
_ABSOLUTE, _FORWARD, _REVERSE, _SPLIT = map(int, (Kind.ABSOLUTE, Kind.FORWARD, Kind.REVERSE, Kind.SPLIT))
# Sums in any order, but what is not a number stays so; no look at zero before a division, which keeps a loop scalar.
_compiled = compiled(fastmath={"contract", "nsz", "reassoc", "arcp", "afn"}, error_model="numpy")


@intrinsic
def _as_float(_: Any, bits: Any) -> Any:
    """The number that 32 bits stand for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return numba.float32(numba.int32), generate


@intrinsic
def _as_bits(_: Any, number: Any) -> Any:
    """Its 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return numba.int32(numba.float32), generate


@_compiled
def _exp2(x):
    """To 2e-7 of it, from 2^-126 to 2^126 (the coefficients of Cephes's exp2f)."""
    x = min(max(x, _F(-126.0)), _F(126.0))
    whole = np.floor(x + _F(0.5))
    r = x - whole
    p = _F(1.535336188319500e-4)
    p = p * r + _F(1.339887440266574e-3)
    p = p * r + _F(9.618437357674640e-3)
    p = p * r + _F(5.550332471162809e-2)
    p = p * r + _F(2.402264791363012e-1)
    p = p * r + _F(6.931472028550421e-1)
    p = p * r + _F(1.0)
    return _as_float(_as_bits(p) + (_I(whole) << _I(23)))


@_compiled
def _log2(x):
    """Of a positive number, to 1e-7 (the coefficients of Cephes's logf); exactly 0 of 1."""
    bits = _as_bits(x)
    exponent = (bits - _I(0x3F3504F3)) >> _I(23)
    f = _as_float(bits - (exponent << _I(23))) - _F(1.0)
    p = _F(7.0376836292e-2)
    p = p * f - _F(1.1514610310e-1)
    p = p * f + _F(1.1676998740e-1)
    p = p * f - _F(1.2420140846e-1)
    p = p * f + _F(1.4249322787e-1)
    p = p * f - _F(1.6668057665e-1)
    p = p * f + _F(2.0000714765e-1)
    p = p * f - _F(2.4999993993e-1)
    p = p * f + _F(3.3333331174e-1)
    square = f * f
    return (f + (p * f * square - _F(0.5) * square)) * _LOG2E + _F(exponent)


@_compiled
def _read(products, out, scale, cap):
    """Logits in bits of bf16 products; ``cap`` 0 is none."""
    for j in range(len(out)):
        out[j] = _as_float(_I(products[j]) << _I(16)) * scale
    if cap > 0:
        for j in range(len(out)):
            out[j] = cap - _F(2.0) * cap / (_F(1.0) + _exp2(out[j] * (_F(2.0) * _LOG2E / cap)))


@_compiled
def _write(values, out):
    """Rounded to bf16, halves to even."""
    for j in range(len(values)):
        bits = _as_bits(values[j])
        out[j] = np.uint16((bits + _I(0x7FFF) + ((bits >> _I(16)) & _I(1))) >> _I(16))


@_compiled
def _in_order(bits):
    """An integer whose order is that of the number that 32 bits stand for; its own inverse."""
    return bits ^ ((bits >> _I(31)) & _I(0x7FFFFFFF))


@_compiled
def _largest(values):
    """Of what is not a number nothing is promised."""
    # Of integers, since of floating-point maxima the compiler makes no vector code.
    largest = _in_order(_as_bits(_F(-1e30)))
    for j in range(len(values)):
        largest = max(largest, _in_order(_as_bits(values[j])))
    return _as_float(_in_order(largest))


@_compiled
def _range(keys, masses, least):
    """The lowest key of tokens with a mass of at least ``least``, and the highest of all."""
    low, high = _I(0xFFFF), _I(0)
    for j in range(len(keys)):  # two loops, of which the compiler makes vector code
        key = _I(keys[j])
        low = min(low, key if masses[j] >= least else _I(0xFFFF))
    for j in range(len(keys)):
        high = max(high, _I(keys[j]))
    return low, high


@_compiled
def _masses_above(keys, masses, key, step):
    """Of tokens whose keys are above ``key`` and one, two and three steps."""
    one, two, three = _F(0.0), _F(0.0), _F(0.0)
    first, second, third = _I(key + step), _I(key + 2 * step), _I(key + 3 * step)
    for j in range(len(keys)):
        mass, place = masses[j], _I(keys[j])
        one += mass if place > first else _F(0.0)
        two += mass if place > second else _F(0.0)
        three += mass if place > third else _F(0.0)
    return one, two, three


@_compiled
def _head_share(products, keys, p, q, share_s, share_t, limit):
    """Share of ``Σ|T - S|`` in the teacher's largest tokens of total mass ``limit``; see SplitKL.

    ``q`` times ``share_t`` is the teacher, ``p`` times ``share_s`` the student. Products are bf16, so that their order
    has 16 bits, and where the head ends is found two bits at a time.
    """
    for j in range(len(q)):
        bits = _I(products[j])
        bits = bits if bits != 0x8000 else _I(0)  # there is one zero
        keys[j] = np.uint16(0xFFFF - bits if bits >= 0x8000 else bits + 0x8000)
    reach = limit / share_t
    # Tokens with less than (1 - limit) / count have less mass together than the head leaves; half, for rounded sums.
    low, high = _range(keys, q, _F(0.5) * (_F(1.0) - limit) / (share_t * _F(len(q))))
    # The last key above which there is more than the limit; those who have the next one tie for the last places.
    last, shift = low - _I(1), 0
    while (_I(4) << _I(shift)) < high - last:
        shift += 2
    for bit in range(shift, -2, -2):
        one, two, three = _masses_above(keys, q, last, _I(1 << bit))
        last += _I((int(one > reach) + int(two > reach) + int(three > reach)) << bit)
    last += _I(1)
    whole, head, tied, above, mass, count = _F(0.0), _F(0.0), _F(0.0), _F(0.0), _F(0.0), _F(0.0)
    for j in range(len(q)):
        gap = abs(p[j] * share_s - q[j] * share_t)
        inside = _F(1.0) if _I(keys[j]) > last else _F(0.0)  # factors, of which the compiler makes vector code
        equal = _F(1.0) if _I(keys[j]) == last else _F(0.0)
        whole += gap
        head += gap * inside
        above += q[j] * inside
        tied += gap * equal
        mass += q[j] * equal
        count += equal
    if whole == 0:
        return _F(0.5)
    if limit >= 1:
        return _F(1.0)
    if mass > 0:
        # As many of them as the limit leaves room for; the largest token always.
        room = max(math.floor((reach - above) * count / mass), 0.0 if above > 0 else 1.0)
        head += tied * _F(min(room / count, 1.0))
    return head / whole


@_compiled
def _divergence(x, y, p, q, products, keys, kind, jensen, inv_t, a, b, c, kd_gain, ce_gain):
    """Divergence of a row, and the log of the sum of its student's exponentials.

    In ``p`` is ``kd_gain`` times its derivative, and ``ce_gain`` times the student's probabilities. ``x`` and ``y`` are
    logits in bits; the teacher's are lost.
    """
    count = len(p)
    top_s, top_t = _largest(x[:count]) * inv_t, _largest(y) * inv_t
    sum_s, sum_t, forward, reverse = _F(0.0), _F(0.0), _F(0.0), _F(0.0)
    for j in range(count):
        s, t = x[j] * inv_t - top_s, y[j] * inv_t - top_t
        e, g = _exp2(s), _exp2(t)
        sum_s += e
        sum_t += g
        forward += g * (t - s)
        reverse += e * (s - t)
        p[j], q[j] = e, g
    log_s, log_t = _F(math.log2(sum_s)), _F(math.log2(sum_t))
    share_s, share_t = _F(1.0) / sum_s, _F(1.0) / sum_t
    value, mean = _F(0.0), _F(0.0)
    if kind == _FORWARD:
        value = (forward * share_t - log_t + log_s) * _LN2
        for j in range(count):
            e = p[j] * share_s
            p[j] = kd_gain * (e - q[j] * share_t) + ce_gain * e
    elif kind in (_REVERSE, _SPLIT):
        head = _head_share(products, keys, p, q, share_s, share_t, a) if kind == _SPLIT else _F(0.0)
        mean = reverse * share_s - log_s + log_t
        # A part without weight is left out instead of multiplied, since 0 · inf is NaN.
        value = head * (forward * share_t - log_t + log_s) * _LN2 if head > 0 else _F(0.0)
        value += (_F(1.0) - head) * mean * _LN2 if head < 1 else _F(0.0)
        shift = top_t + log_t - top_s - log_s - mean
        for j in range(count):
            e = p[j] * share_s
            back = e * (((x[j] - y[j]) * inv_t + shift) * _LN2)
            p[j] = kd_gain * (head * (e - q[j] * share_t) + (_F(1.0) - head) * back) + ce_gain * e
    elif kind == _ABSOLUTE:
        for j in range(count):
            e, g = p[j] * share_s, q[j] * share_t
            sign = _F(0.5) if e > g else (_F(-0.5) if e < g else _F(0.0))
            value += sign * (e - g)
            mean += sign * e
            p[j], q[j] = e, sign
        for j in range(count):
            p[j] *= kd_gain * (q[j] - mean) + ce_gain
    else:
        # As in kdflow.ops.kernel_parts.mixed: where the mixture is a · q + b · p, two terms are together a constant.
        of_p, of_q = (_F(0.0), _F(0.0)) if jensen else ((_F(1.0) - c) * b, (_F(1.0) - c) * a)
        apart, odds, most = log_s - log_t, share_t / share_s, _F(126.0)
        for j in range(count):
            e, g = p[j] * share_s, q[j] * share_t
            # What lies lower is so much less than the largest that its exponential was taken from there, too.
            s, t = max(x[j] * inv_t - top_s, -most), max(y[j] * inv_t - top_t, -most)
            ratio, t_s = min(t - s + apart, most), min(q[j] * odds / p[j], _F(2.0**126))
            mixed = (_F(1.0) - c) + c * t_s
            log_s_m = -_log2(mixed)
            value += a * (g * (ratio + log_s_m)) + b * (e * log_s_m)
            slope = b * _LN2 * log_s_m
            slope -= (of_p + of_q * t_s) / mixed
            mean += e * slope
            p[j], y[j] = e, slope
        value *= _LN2
        for j in range(count):
            p[j] *= kd_gain * (y[j] - mean) + ce_gain
    # Maxima and comparisons have dropped what is not a number; these sums have not.
    return max(value, _F(0.0)) if forward == forward else forward, top_s + log_s


@_compiled
def _cross_entropy(x, p, gradient, label, gain):
    """Of a row's logits in bits; adds its derivative times ``gain``. What is in ``p`` is lost."""
    top, total = _largest(x), _F(0.0)
    for j in range(len(x)):
        p[j] = _exp2(x[j] - top)
        total += p[j]
    share = gain / total
    for j in range(len(x)):
        gradient[j] += share * p[j]
    gradient[label] -= gain
    return (top + _F(math.log2(total)) - x[label]) * _LN2


@_compiled
def _rows(
    S, T, labels, kd, ce, columns, shared, valid, kind, jensen, one_softmax, writes,
    scale_s, scale_t, cap_s, cap_t, inv_t, a, b, c, kd_gain, ce_gain,
):  # fmt: skip
    """Divergence of each row into ``kd``, cross-entropy into ``ce``, and over ``S`` the gradient of their sum.

    Arguments are those of :func:`kdflow.ops.kernels.divergence_rows`, with bf16 as 16 bits; without ``labels`` there is
    no cross-entropy, and what is no column of the divergence has no gradient. With ``one_softmax`` both have the same.
    """
    keys = np.empty(shared if kind == _SPLIT else 0, np.uint16)
    x, y, gradient, q = np.empty(columns, _F), np.empty(shared, _F), np.empty(columns, _F), np.empty(columns, _F)
    alike = one_softmax and len(labels) > 0
    for row in range(len(S)):
        _read(S[row, :columns], x, scale_s, cap_s)
        _read(T[row, :shared], y, scale_t, cap_t)
        gradient[shared:] = _F(0.0)
        kd[row], log_sum = _divergence(
            x, y, gradient[:shared], q[:shared], T[row], keys, kind, jensen, inv_t, a, b, c,
            kd_gain, ce_gain if alike else _F(0.0),
        )  # fmt: skip
        if alike:
            gradient[labels[row]] -= ce_gain
            ce[row] = (log_sum - x[labels[row]]) * _LN2
        elif len(labels):
            ce[row] = _cross_entropy(x[:valid], q[:valid], gradient[:valid], labels[row], ce_gain)
        if cap_s > 0:
            for j in range(columns):
                share = x[j] / cap_s
                gradient[j] *= _F(1.0) - share * share
        if writes:
            _write(gradient, S[row, :columns])


def launch(
    s: Tensor, t: Tensor, labels: Tensor | None, kd: Tensor, ce: Tensor, work: Distillation, gradient: bool
) -> None:
    """Run the kernel on products ``s [n, V_s]`` and ``t [n, V_t]`` in bf16, on as many threads as torch has."""
    n = work.numbers()
    products = [_whole_rows(tensor).view(torch.int16).numpy().view(np.uint16) for tensor in (s, t)]
    chosen = np.empty(0, np.int64) if labels is None else labels.numpy()
    arrays = (*products, chosen, kd.numpy(), ce.numpy())
    constants = (n.scale_s, n.scale_t, n.cap_s, n.cap_t, n.inv_t, n.a, n.b, n.c, n.kd_gain, n.ce_gain)
    same = (s.shape[1], *work.columns, int(n.kind), n.jensen, work.one_softmax, gradient, *map(_F, constants))
    threads = min(torch.get_num_threads(), len(s))
    bounds = [number * len(s) // threads for number in range(threads + 1)]

    def run(number: int) -> None:
        here = slice(bounds[number], bounds[number + 1])
        _rows(*(array[here] for array in arrays), *same)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))


def _whole_rows(products: Tensor) -> Tensor:
    """With what lies between rows, so that one row has the layout of many.

    For each layout numba compiles once more, and two processes that do so for two layouts at once could keep one's code
    as the other's: its index of what is compiled has no lock.
    """
    return products.as_strided((len(products), products.stride(0)), (products.stride(0), 1))
