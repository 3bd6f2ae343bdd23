"""Draws a chart of several subjects as HTML, in one panel or in a panel per series."""

import math
from collections.abc import Sequence
from html import escape
from numbers import Real

from cassle_jax.report.axis import axis
from cassle_jax.report.bars import Bars, Extent, bars_svg
from cassle_jax.report.comparison import Comparison, Estimate
from cassle_jax.report.curves import WIDTH, Line, lines_svg
from cassle_jax.report.palette import RUN_COLOURS

_PANEL_WIDTH = 320
# Largest number of series in one panel, for a single subject and for several.
_MOST_LINES = (8, 3)
_MOST_BARS = (3, 1)


def chart_html(subjects: Sequence[str], comparison: Comparison) -> str:
    """Draws a chart with its legend as a ``<figure>``; several panels share their axes.

    Subjects differ in colour, and their series in dashes. With a single subject, series differ in
    colour.

    Args:
      subjects: All subjects of the page; one without the chart gets a dash in the legend.
      comparison: The chart; draws means over seeds, and their range as a band or whisker.

    Returns:
      The HTML.
    """
    chart, is_single = comparison.chart, len(subjects) == 1
    most = (_MOST_BARS if comparison.is_bars else _MOST_LINES)[0 if is_single else 1]
    in_panels = len(comparison.series) > most
    panels = [(name,) for name in comparison.series] if in_panels else [comparison.series]
    draw = _bars if comparison.is_bars else _lines
    drawn = "".join(
        f"<div>{f'<h3>{escape(panel[0])}</h3>' if in_panels else ''}{svg}</div>"
        for panel, svg in zip(panels, draw(subjects, comparison, panels), strict=True)
    )
    opening = '<figure class="wide">' if in_panels else "<figure>"
    return (
        f"{opening}<figcaption>{escape(chart.title)} "
        f'<span class="metric">{escape(chart.dataset)}</span></figcaption>'
        f'{_legend(subjects, comparison, in_panels)}<div class="panels">{drawn}</div></figure>'
    )


def key_html(colour: int) -> str:
    """A short line as a key in a legend; where colours repeat, it is dashed."""
    return _key(f"run-{colour % len(RUN_COLOURS)}", colour // len(RUN_COLOURS))


def _key(colour: str, dash: int) -> str:
    classes = f"line {colour}" + (f" dash-{dash}" if dash else "")
    return f'<svg class="key" viewBox="0 0 26 10"><path class="{classes}" d="M1 5H25"/></svg>'


def _legend(subjects: Sequence[str], comparison: Comparison, in_panels: bool) -> str:
    together = not in_panels and len(comparison.series) > 1
    keys = []
    if len(subjects) > 1:
        keys += [
            f"{key_html(index)}{escape(name)}{'' if name in comparison.points else ' –'}"
            for index, name in enumerate(subjects)
        ]
        if together:
            keys += [
                f"{_key('neutral', index)}{escape(name)}"
                for index, name in enumerate(comparison.series)
            ]
    elif together:
        keys += [f"{key_html(i)}{escape(name)}" for i, name in enumerate(comparison.series)]
    items = "".join(f"<li>{key}</li>" for key in keys)
    return f'<ul class="keys">{items}</ul>' if items else ""


def _lines(
    subjects: Sequence[str], comparison: Comparison, panels: Sequence[Sequence[str]]
) -> list[str]:
    chart = comparison.chart
    x_axis = axis([x for x, _ in _estimates(comparison)], is_log=chart.log_x)
    y_axis = axis(_values(comparison), is_log=chart.log_y, to_ticks=True)
    return [
        lines_svg(
            _name(comparison, panel),
            [
                line
                for place, series in enumerate(panel)
                for line in _lines_of(subjects, comparison, series, place)
            ],
            x_axis,
            y_axis,
            x_label=chart.x_label,
            y_label=chart.y_label,
            width=_width(panels),
        )
        for panel in panels
    ]


def _lines_of(
    subjects: Sequence[str], comparison: Comparison, series: str, place: int
) -> list[Line]:
    """The lines of the `place`-th series of a chart."""
    lines = []
    for index, subject in enumerate(subjects):
        points = sorted(comparison.points.get(subject, {}).get(series, {}).items())
        band = [(x, *estimate.range) for x, estimate in points]
        lines.append(
            Line(
                series if len(subjects) == 1 else f"{subject}, {series}",
                [(x, estimate.mean) for x, estimate in points],
                band if any(low < high for _, low, high in band) else (),
                *_colour_and_dash(index, place, is_single=len(subjects) == 1),
            )
        )
    return lines


def _bars(
    subjects: Sequence[str], comparison: Comparison, panels: Sequence[Sequence[str]]
) -> list[str]:
    chart = comparison.chart
    groups = list(dict.fromkeys(str(x) for x, _ in _estimates(comparison)))
    values = _values(comparison)
    shown = any(map(math.isfinite, values))
    x_axis = axis([0.0, *values], to_ticks=True, intervals=4) if shown else None
    is_single = len(subjects) == 1
    return [
        bars_svg(
            _name(comparison, panel),
            groups,
            [
                Bars(
                    series if is_single else f"{subject}, {series}",
                    {
                        str(x): Extent(estimate.mean, *estimate.range)
                        for x, estimate in comparison.points.get(subject, {})
                        .get(series, {})
                        .items()
                    },
                    *_colour_and_dash(index, place, is_single=is_single),
                )
                for place, series in enumerate(panel)
                for index, subject in enumerate(subjects)
            ],
            x_axis,
            x_label=chart.y_label,
            width=_width(panels),
        )
        for panel in panels
    ]


def _colour_and_dash(subject: int, series: int, *, is_single: bool) -> tuple[int, int]:
    """Indices of colour and dash from the indices of subject and series within a panel."""
    if is_single:
        return series, series // len(RUN_COLOURS)
    return subject, series + subject // len(RUN_COLOURS)


def _estimates(comparison: Comparison) -> list[tuple[Real | str, Estimate]]:
    """Every point of every subject and series."""
    return [
        point
        for of_subject in comparison.points.values()
        for of_series in of_subject.values()
        for point in of_series.items()
    ]


def _values(comparison: Comparison) -> list[float]:
    """All values that the axis of a chart must cover."""
    return [value for _, estimate in _estimates(comparison) for value in estimate.range]


def _name(comparison: Comparison, panel: Sequence[str]) -> str:
    chart = comparison.chart
    return ", ".join([chart.title, chart.dataset, *(panel if len(panel) == 1 else [])])


def _width(panels: Sequence[object]) -> int:
    return WIDTH if len(panels) == 1 else _PANEL_WIDTH
