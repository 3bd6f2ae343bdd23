"""Draws curves as an SVG that takes its colours from the page around it."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from numbers import Real

from matplotlib.ticker import MaxNLocator

Curves = Mapping[str, Sequence[tuple[Real, Real]]]

_WIDTH, _HEIGHT = 400, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 26, 12, 28
_NICE = [1, 2, 2.5, 5, 10]
_POINTS = 500


def curves_svg(name: str, runs: Curves) -> str:
    """One chart with a line for each run, as an ``<svg>`` element for an HTML page.

    Line ``i`` has the classes ``line`` and ``run-i``, which the page colours. Values that are not
    finite leave a gap; a value between two gaps is a dot. Of more than 500 points, every n-th is
    drawn, and the last.

    Args:
      name: What is measured; the chart's accessible name.
      runs: For each run, its (step, value) pairs in the order of the steps.

    Returns:
      The SVG's text. Without a finite value anywhere, an SVG that says so.
    """
    drawn = {run: _thinned(points) for run, points in runs.items()}
    finite = [point for points in drawn.values() for point in points if math.isfinite(point[1])]
    opening = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    )
    if not finite:
        return f'{opening}<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}">no values</text></svg>'

    steps, values = zip(*finite, strict=True)
    step_ticks = MaxNLocator(5, steps=_NICE, integer=True).tick_values(min(steps), max(steps))
    value_ticks = MaxNLocator(5, steps=_NICE).tick_values(min(values), max(values))
    step_range = (min(steps), max(max(steps), min(steps) + 1))
    value_range = (value_ticks[0], value_ticks[-1])

    def x(step: Real) -> float:
        share = (step - step_range[0]) / (step_range[1] - step_range[0])
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: Real) -> float:
        share = (value - value_range[0]) / (value_range[1] - value_range[0])
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [opening]
    for tick in value_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick)}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="left" x="{_LEFT - 6}" y="{y(tick) + 4}">{tick:.4g}</text>')
    for tick in step_ticks:
        if step_range[0] <= tick <= step_range[1]:
            parts.append(f'<text x="{x(tick)}" y="{_HEIGHT - 9}">{tick:,.0f}</text>')
    for index, points in enumerate(drawn.values()):
        for piece in _pieces(points):
            path = "M" + "L".join(f"{x(step)} {y(value)}" for step, value in piece)
            # A line of no length is a dot, as the lines' ends are round.
            kind, path = ("dot", f"{path}h0") if len(piece) == 1 else ("line", path)
            parts.append(f'<path class="{kind} run-{index}" d="{path}"/>')
    return "".join([*parts, "</svg>"])


def _thinned(points: Sequence[tuple[Real, Real]]) -> list[tuple[Real, Real]]:
    stride = math.ceil(len(points) / _POINTS)
    if stride <= 1:
        return list(points)
    last_is_kept = (len(points) - 1) % stride == 0
    return list(points[::stride]) + ([] if last_is_kept else [points[-1]])


def _pieces(points: Sequence[tuple[Real, Real]]) -> list[list[tuple[Real, Real]]]:
    """The stretches of points between values that are not finite."""
    pieces: list[list[tuple[Real, Real]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
