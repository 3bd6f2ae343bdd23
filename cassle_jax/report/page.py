"""Writes results as one self-contained HTML page."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from numbers import Real
from os import PathLike
from pathlib import Path

from cassle_jax.report.curves import Curves, curves_svg
from cassle_jax.report.palette import RUN_COLOURS
from cassle_jax.report.table import Table, cell_text
from cassle_jax.storage import write_whole


def write_page(
    path: str | PathLike[str],
    *,
    title: str,
    summary: str,
    curves: Mapping[str, Curves],
    table: Table | None = None,
    figures: Mapping[str, str | PathLike[str]] | None = None,
    settings: Mapping[str, object] | None = None,
) -> None:
    """Writes one self-contained HTML page: table, curves, figures and settings.

    The page loads no other file and runs no script; it suits phones, print and dark screens. All
    text is escaped. A run has the same colour in every chart.

    Args:
      path: Path of the page; folders are created, an existing file is replaced.
      title: The heading.
      summary: Text under the heading; an empty line starts a new paragraph.
      curves: (step, value) pairs by metric and run.
      table: The results; the page prints numbers to three decimals, with all digits in a tooltip.
      figures: PNG files to embed, by caption.
      settings: Values by setting.

    Raises:
      FileNotFoundError: If a figure does not exist.
      ValueError: If a row's length differs from the columns.
    """
    runs = list(dict.fromkeys(run for chart in curves.values() for run in chart))
    sections = [f"<header><h1>{escape(title)}</h1>{paragraphs_html(summary)}</header>"]
    if table is not None:
        sections.append(f"<section><h2>Results</h2>{table_html(table)}</section>")
    if curves:
        charts = "".join(_chart_html(name, chart, runs) for name, chart in curves.items())
        sections.append(f'<section><h2>Curves</h2><div class="charts">{charts}</div></section>')
    if figures:
        pictures = "".join(_picture_html(caption, png) for caption, png in figures.items())
        sections.append(f"<section><h2>Pictures</h2>{pictures}</section>")
    if settings:
        rows = Table(("setting", "value"), [(name, str(settings[name])) for name in settings])
        sections.append(f"<section><h2>Settings</h2>{table_html(rows)}</section>")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, html_page(title, sections))


def html_page(title: str, sections: Sequence[str], style: str = "") -> str:
    """Formats a self-contained page with the style that all pages share.

    Args:
      title: Title of the page, unescaped.
      sections: HTML of the sections, in order.
      style: Additional CSS. `--run` is the colour of an element of class ``run-i``.

    Returns:
      The page's HTML.
    """
    return _PAGE.format(title=escape(title), style=_style() + style, body="\n".join(sections))


def paragraphs_html(text: str) -> str:
    """Formats text as HTML; an empty line starts a new paragraph."""
    return "".join(f"<p>{escape(part)}</p>" for part in text.split("\n\n") if part.strip())


def table_html(table: Table) -> str:
    """Formats a table as HTML: numbers to three decimals, all digits in a tooltip."""
    table.check()
    head = "".join(
        f'<th scope="col"{_ALIGNED if _is_numeric(table, index) else ""}>{escape(column)}</th>'
        for index, column in enumerate(table.columns)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(cell_text(row[0]))}</th>'
        f"{''.join(map(_cell_html, row[1:]))}</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _is_numeric(table: Table, column: int) -> bool:
    return column > 0 and any(not isinstance(row[column], str) for row in table.rows)


def _cell_html(cell: str | Real) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    return f'<td{_ALIGNED} title="{cell}">{escape(cell_text(cell))}</td>'


def _chart_html(name: str, chart: Curves, runs: Sequence[str]) -> str:
    """Formats a chart with its legend; colours follow a run's index among all runs of the page."""
    legend = "".join(
        f'<li class="run-{runs.index(run) % len(RUN_COLOURS)}">{escape(run)} '
        f"<b>{cell_text(float(points[-1][1]))}</b> at step {points[-1][0]:,}</li>"
        for run, points in chart.items()
        if points
    )
    lines = {run: chart.get(run, ()) for run in runs}
    return (
        f"<figure><figcaption>{escape(name)}</figcaption>{curves_svg(name, lines)}"
        f"<ul>{legend}</ul></figure>"
    )


def _picture_html(caption: str, png: str | PathLike[str]) -> str:
    data = base64.b64encode(Path(png).read_bytes()).decode()
    return (
        f'<figure class="picture"><figcaption>{escape(caption)}</figcaption>'
        f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>'
    )


def _style() -> str:
    light = "".join(f"--run-{i}:{colours[0]};" for i, colours in enumerate(RUN_COLOURS))
    dark = "".join(f"--run-{i}:{colours[1]};" for i, colours in enumerate(RUN_COLOURS))
    runs = "".join(f".run-{i}{{--run:var(--run-{i})}}" for i in range(len(RUN_COLOURS)))
    return _STYLE.replace("{light}", light).replace("{dark}", dark) + runs


_ALIGNED = ' class="number"'

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d1f24;--soft:#5b616c;--rule:#dcdfe5;{light}}
@media screen and (prefers-color-scheme:dark){
:root{--paper:#15171b;--ink:#e8eaee;--soft:#a3a9b5;--rule:#363b45;{dark}}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:64rem;background:var(--paper);
color:var(--ink);font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.1rem;margin:2.2rem 0 .6rem;padding-bottom:.3rem;border-bottom:1px solid var(--rule)}
p{max-width:44rem;margin:.5rem 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem 1.2rem .3rem 0;text-align:left;border-bottom:1px solid var(--rule);
vertical-align:top;overflow-wrap:anywhere}
th{font-weight:600}th[scope=row]{font-weight:400;overflow-wrap:normal}
.number{text-align:right}
th[scope=col]{color:var(--soft);font-size:.85rem}
.charts{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
figure{margin:0;break-inside:avoid}
figcaption{font-weight:600;margin-bottom:.3rem}
figure ul{list-style:none;margin:.2rem 0 0;padding:0;font-size:.9em;color:var(--soft)}
figure b{color:var(--ink);font-variant-numeric:tabular-nums}
li[class^=run]::before{content:"";background:var(--run);display:inline-block;
width:1.1em;height:.22em;margin:0 .5em .25em 0;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
svg,img{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px;text-anchor:middle}
svg text.left{text-anchor:end}svg text.right{text-anchor:start}
.grid{stroke:var(--rule);stroke-width:1;fill:none}
.line,.dot{fill:none;stroke:var(--run);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.dot{stroke-width:7}
.picture{margin-bottom:1.5rem}
.picture img{background:#fff;border:1px solid var(--rule);border-radius:4px;
width:auto;max-width:100%}
@media print{body{padding:0;max-width:none;font-size:10pt}h2{break-after:avoid}
.picture img{max-height:24cm;border:0}}
"""
