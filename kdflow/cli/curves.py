"""Curves as SVG, for a page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 210, 62, 12, 10, 26
_MOST = 600  # points of a curve: more than that are means of neighbours


def curves(title: str, series: Mapping[str, Points], form: str = "{:g}") -> str:
    """A figure with a line for each series over the steps; empty where no series has two points.

    Args:
        title: what stands above it.
        series: points (step, value) by name; those that are not finite are left out.
        form: how values are written.
    """
    drawn = {name: _thinned([p for p in points if math.isfinite(p[1])]) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if len(points) > 1}
    if not drawn:
        return ""
    every = [point for points in drawn.values() for point in points]
    steps, values = _ticks([step for step, _ in every], 6), _ticks([value for _, value in every], 4)
    first, last = min(step for step, _ in every), max(step for step, _ in every)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - values[0]) / (values[-1] - values[0]) * (_HEIGHT - _TOP - _BOTTOM)

    lines = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        f'<text class="value" x="{_LEFT - 6}" y="{y(value) + 4:.1f}">{escape(form.format(value))}</text>'
        for value in values
    ]
    lines += [
        f'<text class="step" x="{x(step):.1f}" y="{_HEIGHT - 8}">{step:,.0f}</text>'
        for step in steps
        if first <= step <= last and step == int(step)
    ]
    for number, points in enumerate(drawn.values()):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        lines.append(f'<polyline class="line c{number % 6}" points="{path}"/>')
    names = "".join(f'<span class="c{n % 6}">{escape(name)}</span>' for n, name in enumerate(drawn))
    legend = f'<div class="legend">{names}</div>' if len(drawn) > 1 else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{legend}"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(lines)}</svg></figure>'
    )


def _thinned(points: Points) -> Points:
    """As many points as can be told apart, each the mean of its neighbours."""
    size = math.ceil(len(points) / _MOST)
    if size <= 1:
        return points
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts]


def _ticks(values: Sequence[float], count: int) -> list[float]:
    """Round numbers from below the smallest value to above the largest, at least two."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # but for rounding: a line in the middle
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
