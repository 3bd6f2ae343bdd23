"""Draws curves as an SVG in the colours of its HTML page."""

from collections.abc import Mapping, Sequence
from html import escape
from numbers import Real
from typing import NamedTuple

import numpy as np

from cassle_jax.report.axis import Axis, axis, tick_text
from cassle_jax.report.palette import RUN_COLOURS

Curves = Mapping[str, Sequence[tuple[Real, Real]]]

WIDTH = 400
_HEIGHT = 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 26, 12, 28
_LABEL = 18
_POINTS = 500


class Line(NamedTuple):
    """A line of a chart, in the colours of the page.

    Attributes:
      name: tooltip of the line.
      points: (x, y), ascending in x.
      band: (x, lower y, upper y) of the area behind the line, ascending in x; may be empty.
      colour: index of the colour; colours repeat after six.
      dash: 0 for a solid line, 1 to 3 for a dash pattern.
    """

    name: str
    points: Sequence[tuple[Real, Real]]
    band: Sequence[tuple[Real, Real, Real]] = ()
    colour: int = 0
    dash: int = 0


def curves_svg(name: str, runs: Curves) -> str:
    """Draws one chart with a line per run as an ``<svg>`` element for an HTML page.

    Line ``i`` has the classes ``line`` and ``run-i`` (these repeat after six), which the page
    colours. Non-finite values leave a gap; a value between two gaps is a dot. A line with more than
    500 points is thinned to 500, evenly spaced along the axis.

    Args:
      name: Name of the metric; the chart's accessible name.
      runs: (step, value) pairs by run, ascending in steps.

    Returns:
      The SVG's text; without a finite value, an SVG with the text "no values".
    """
    lines = [Line(run, points, colour=index) for index, (run, points) in enumerate(runs.items())]
    finite = [point for line in lines for point in line.points if np.isfinite(point[1])]
    steps = axis([step for step, _ in finite], whole=True)
    values = axis([value for _, value in finite], to_ticks=True)
    return lines_svg(name, lines, steps, values)


def lines_svg(
    name: str,
    lines: Sequence[Line],
    x_axis: Axis | None,
    y_axis: Axis | None,
    *,
    x_label: str = "",
    y_label: str = "",
    width: int = WIDTH,
) -> str:
    """Draws lines over given axes as an ``<svg>`` element for an HTML page.

    A line has the classes ``line``, ``run-i`` and, if dashed, ``dash-i``, which the page colours;
    its band has the classes ``band`` and ``run-i``.

    Args:
      name: Accessible name of the chart.
      lines: The lines.
      x_axis: Axis that covers every x; `None` without values.
      y_axis: Axis that covers every y; `None` without values.
      x_label: Label under the chart.
      y_label: Label above the upper left corner.
      width: Width of the drawing, in units of its text, which is 12 high.

    Returns:
      The SVG's text; without an axis, an SVG with the text "no values".
    """
    if x_axis is None or y_axis is None:
        return empty_svg(name, width)
    top = _TOP + _LABEL * bool(y_label)
    bottom = _HEIGHT + _LABEL * bool(y_label) - _BOTTOM
    height = bottom + _BOTTOM + _LABEL * bool(x_label)

    def x(value: Real) -> float:
        return round(_LEFT + x_axis.share(value) * (width - _LEFT - _RIGHT), 1)

    def y(value: Real) -> float:
        return round(bottom - y_axis.share(value) * (bottom - top), 1)

    parts = [opening_tag(name, width, height)]
    if y_label:
        parts.append(f'<text class="right" x="0" y="12">{escape(y_label)}</text>')
    for tick in y_axis.ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick)}H{width - _RIGHT}"/>')
        parts.append(f'<text class="left" x="{_LEFT - 6}" y="{y(tick) + 4}">{tick:.4g}</text>')
    for tick in x_axis.ticks:
        parts.append(f'<text x="{x(tick)}" y="{bottom + 19}">{tick_text(tick)}</text>')
    if x_label:
        centre = (_LEFT + width - _RIGHT) / 2
        parts.append(f'<text x="{centre}" y="{height - 7}">{escape(x_label)}</text>')
    for line in lines:
        for piece in _pieces(line.band, x_axis, y_axis):
            upper = [f"{x(at)} {y(high)}" for at, _, high in piece]
            lower = [f"{x(at)} {y(low)}" for at, low, _ in reversed(piece)]
            path = "M" + "L".join(upper + lower) + "Z"
            parts.append(f'<path class="band run-{line.colour % len(RUN_COLOURS)}" d="{path}"/>')
    for line in lines:
        classes = f"run-{line.colour % len(RUN_COLOURS)}" + (
            f" dash-{line.dash}" if line.dash else ""
        )
        for piece in _pieces(line.points, x_axis, y_axis):
            path = "M" + "L".join(f"{x(at)} {y(value)}" for at, value in piece)
            # A line of zero length is a dot, as line caps are round.
            kind, path = ("dot", f"{path}h0") if len(piece) == 1 else ("line", path)
            title = f"<title>{escape(line.name)}</title>"
            parts.append(f'<path class="{kind} {classes}" d="{path}">{title}</path>')
    return "".join([*parts, "</svg>"])


def opening_tag(name: str, width: int, height: int) -> str:
    """The opening tag of a drawing of this size and accessible name."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    )


def empty_svg(name: str, width: int = WIDTH) -> str:
    """A drawing with the text "no values"."""
    text = f'<text x="{width / 2}" y="{_HEIGHT / 2}">no values</text>'
    return f"{opening_tag(name, width, _HEIGHT)}{text}</svg>"


def _pieces(points: Sequence[tuple], x_axis: Axis, y_axis: Axis) -> list[list[tuple]]:
    """Splits points (x, values …) at those that the axes cannot show."""
    pieces: list[list[tuple]] = [[]]
    for point in _thinned(points, x_axis):
        if all(map(y_axis.shows, point[1:])):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _thinned(points: Sequence[tuple], x_axis: Axis) -> list[tuple]:
    """The points that the axis can show, thinned to 500 that include the first and the last."""
    shown = [point for point in points if x_axis.shows(point[0])]
    if len(shown) <= _POINTS:
        return shown
    shares = [x_axis.share(point[0]) for point in shown]
    places = np.linspace(shares[0], shares[-1], _POINTS)
    kept = np.searchsorted(shares, places).clip(max=len(shown) - 1)
    return [shown[index] for index in np.unique(kept)]
