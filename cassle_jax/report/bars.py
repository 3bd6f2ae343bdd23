"""Draws groups of horizontal bars as an SVG in the colours of its HTML page."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from cassle_jax.report.axis import Axis, tick_texts
from cassle_jax.report.curves import WIDTH, empty_svg, opening_tag
from cassle_jax.report.palette import RUN_COLOURS
from cassle_jax.report.table import cell_text

_BAR, _STEP, _GROUP_GAP = 9, 12, 10
_LINE, _LETTERS = 13, 14
_VALUES = 42
_LETTER = 7.3
_LABEL = 18


class Extent(NamedTuple):
    """Length of a bar, and the ends of its whisker."""

    value: float
    low: float
    high: float


class Bars(NamedTuple):
    """The bars of one colour, one per group.

    Attributes:
      name: tooltip of the bars.
      extents: extent of the bar by group; a missing group gets a dash.
      colour: index of the colour; colours repeat after six.
      dash: 0 for a solid bar, 1 to 3 for a pale one with a dash pattern as its edge.
    """

    name: str
    extents: Mapping[str, Extent]
    colour: int = 0
    dash: int = 0


def bars_svg(
    name: str,
    groups: Sequence[str],
    bars: Sequence[Bars],
    x_axis: Axis | None,
    *,
    x_label: str = "",
    width: int = WIDTH,
) -> str:
    """Draws groups of bars from top to bottom as an ``<svg>`` element for an HTML page.

    Long group names wrap. A column at the right prints the values to three decimals. A bar has the
    classes ``bar``, ``run-i`` and, if dashed, ``dash-i``, which the page colours. Its whisker goes
    from `Extent.low` to `Extent.high` where these differ.

    Args:
      name: Accessible name of the chart.
      groups: Names of the groups, from top to bottom.
      bars: Bars of every group, from top to bottom.
      x_axis: Axis that covers zero and every value; `None` without values.
      x_label: Label under the chart.
      width: Width of the drawing, in units of its text, which is 12 high.

    Returns:
      The SVG's text; without an axis, an SVG with the text "no values".
    """
    if x_axis is None:
        return empty_svg(name, width)
    labels = [textwrap.wrap(group, _LETTERS) for group in groups]
    letters = max(len(line) for label in labels for line in label)
    left, right = round(letters * _LETTER) + 8, width - _VALUES
    bars_height = _STEP * len(bars)
    group_height = max(bars_height, _LINE * max(map(len, labels))) + _GROUP_GAP
    bottom = group_height * len(groups)

    def x(value: float) -> float:
        return round(left + x_axis.share(value) * (right - left), 1)

    parts = [opening_tag(name, width, bottom + 22 + _LABEL * bool(x_label))]
    for tick, text in zip(x_axis.ticks, tick_texts(x_axis.ticks), strict=True):
        parts.append(f'<path class="grid" d="M{x(tick)} 0V{bottom}"/>')
        parts.append(f'<text x="{x(tick)}" y="{bottom + 15}">{text}</text>')
    for index, (group, label) in enumerate(zip(groups, labels, strict=True)):
        middle = group_height * (index + 0.5)
        first = middle - _LINE * len(label) / 2 + 10
        parts += [
            f'<text class="left" x="{left - 8}" y="{first + _LINE * line}">{escape(text)}</text>'
            for line, text in enumerate(label)
        ]
        for place, series in enumerate(bars):
            y = middle - bars_height / 2 + _STEP * place
            parts.append(_bar(x, y, series, group, x_axis, width))
    parts.append(f'<path class="zero" d="M{x(0.0)} 0V{bottom}"/>')
    if x_label:
        parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 34}">{escape(x_label)}</text>')
    return "".join([*parts, "</svg>"])


def _bar(
    x: Callable[[float], float], y: float, series: Bars, group: str, x_axis: Axis, width: int
) -> str:
    """Draws one bar with its whisker and its value."""
    extent = series.extents.get(group)
    text = "–" if extent is None else cell_text(extent.value)
    parts = [f'<text class="left value" x="{width}" y="{y + 8.5}">{text}</text>']
    if extent is not None and x_axis.shows(extent.value):
        start, end = sorted((x(0.0), x(extent.value)))
        dash = f" dash-{series.dash}" if series.dash else ""
        title = f"<title>{escape(f'{series.name}, {group}: {extent.value!r}')}</title>"
        parts.append(
            f'<rect class="bar run-{series.colour % len(RUN_COLOURS)}{dash}" x="{start}" y="{y}" '
            f'width="{round(end - start, 1)}" height="{_BAR}">{title}</rect>'
        )
        if extent.low < extent.high:
            path = f"M{x(extent.low)} {y + _BAR / 2}H{x(extent.high)}"
            parts.append(f'<path class="whisker" d="{path}"/>')
    return "".join(parts)
