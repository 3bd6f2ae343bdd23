"""Draws lines as an SVG in the colours of its HTML page."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from numbers import Real
from typing import NamedTuple

import numpy as np

from cassle_jax.report.axis import Axis, tick_text, tick_texts
from cassle_jax.report.palette import RUN_COLOURS

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
    above, below = _LABEL * bool(y_label), _LABEL * bool(x_label)
    frame = _Frame(x_axis, y_axis, width - _RIGHT, _TOP + above, _HEIGHT + above - _BOTTOM)
    height = frame.bottom + _BOTTOM + below
    parts = [opening_tag(name, width, height), *_ticks(frame)]
    if y_label:
        parts.append(f'<text class="right" x="0" y="12">{escape(y_label)}</text>')
    if x_label:
        centre = (_LEFT + frame.right) / 2
        parts.append(f'<text x="{centre}" y="{height - 7}">{escape(x_label)}</text>')
    for draw in (_band, _line):  # all bands lie behind all lines
        parts += [part for line in lines for part in draw(frame, line)]
    return "".join([*parts, "</svg>"])


class _Frame(NamedTuple):
    """The area between the axes of a chart; it begins at `_LEFT`."""

    x_axis: Axis
    y_axis: Axis
    right: int
    top: int
    bottom: int

    def x(self, value: Real) -> float:
        return round(_LEFT + self.x_axis.share(value) * (self.right - _LEFT), 1)

    def y(self, value: Real) -> float:
        return round(self.bottom - self.y_axis.share(value) * (self.bottom - self.top), 1)

    def path(self, points: Iterable[tuple[Real, Real]]) -> str:
        return "M" + "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points)


def _ticks(frame: _Frame) -> Iterator[str]:
    for tick, text in zip(frame.y_axis.ticks, tick_texts(frame.y_axis.ticks), strict=True):
        y = frame.y(tick)
        yield f'<path class="grid" d="M{_LEFT} {y}H{frame.right}"/>'
        yield f'<text class="left" x="{_LEFT - 6}" y="{y + 4}">{text}</text>'
    for tick in frame.x_axis.ticks:
        yield f'<text x="{frame.x(tick)}" y="{frame.bottom + 19}">{tick_text(tick)}</text>'


def _band(frame: _Frame, line: Line) -> Iterator[str]:
    for piece in _pieces(line.band, frame.x_axis, frame.y_axis):
        upper = [(x, high) for x, _, high in piece]
        lower = [(x, low) for x, low, _ in reversed(piece)]
        path = frame.path(upper + lower)
        yield f'<path class="band run-{line.colour % len(RUN_COLOURS)}" d="{path}Z"/>'


def _line(frame: _Frame, line: Line) -> Iterator[str]:
    dash = f" dash-{line.dash}" if line.dash else ""
    classes = f"run-{line.colour % len(RUN_COLOURS)}{dash}"
    for piece in _pieces(line.points, frame.x_axis, frame.y_axis):
        path = frame.path(piece)
        # A line of zero length is a dot, as line caps are round.
        kind, path = ("dot", f"{path}h0") if len(piece) == 1 else ("line", path)
        title = f"<title>{escape(line.name)}</title>"
        yield f'<path class="{kind} {classes}" d="{path}">{title}</path>'


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
