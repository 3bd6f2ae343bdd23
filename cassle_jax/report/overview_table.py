"""Formats the overview of a report as tables that a reader can sort."""

from collections.abc import Mapping, Sequence
from html import escape

from cassle_jax.evaluation.protocols import title_of
from cassle_jax.report.comparison import Estimate, Row
from cassle_jax.report.comparison_chart import key_html
from cassle_jax.report.overview import Overview, group_of
from cassle_jax.report.table import cell_text, decimals_of

ARROWS = {True: " ↑", False: " ↓", None: ""}
_SHARES = ("accuracy", "mean per class")


def overviews_html(overviews: Sequence[Overview], runs: Mapping[str, int]) -> str:
    """One table per task, methods as rows and datasets as columns, with the script that sorts them.

    Args:
      overviews: The tasks; empty for no table.
      runs: Number of runs by subject, in the order of the rows.

    Returns:
      The HTML; empty without overviews.
    """
    if not overviews:
        return ""
    tables = "".join(_table_html(each, runs) for each in overviews)
    return f'<section class="overview" aria-label="Overview">{tables}</section>{_SCRIPT}'


def scroll_html(name: str, table: str) -> str:
    """A wide table in a box of its own, which a keyboard can scroll."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{table}</div>'
    )


def interval_text(estimate: Estimate, decimals: int, scale: int = 1) -> str:
    """Half the interval as a text such as `± 0.012`; empty where it is unknown."""
    interval = estimate.interval
    return "" if interval is None else f"± {cell_text(scale * interval, decimals)}"


def _table_html(overview: Overview, runs: Mapping[str, int]) -> str:
    title, seeds = title_of(overview.task), set(runs.values())
    shared, heads = _column_heads(overview.columns)
    if len(seeds) == 1:
        shared.append("1 seed" if seeds == {1} else f"{max(seeds)} seeds each")
    else:
        heads.insert(0, _head("seeds", "descending"))
    heads.insert(0, _head("method", "ascending", "", "start"))
    if overview.ranked > 1:
        of = f"of {overview.ranked}" if overview.ranked < len(overview.columns) else ""
        heads.append(_head("mean rank", "ascending", of))
    body = "".join(_method_html(overview, runs, name, with_seeds=len(seeds) > 1) for name in runs)
    table = (
        f'<table class="sortable"><caption>{escape(title)} <span class="metric">'
        f"{escape(' · '.join(shared))}</span></caption><thead><tr>{''.join(heads)}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
    return scroll_html(f"{title}: overview", table)


def _column_heads(columns: Sequence[Row]) -> tuple[list[str], list[str]]:
    """The metric or dataset that all columns share, for the caption, and their heads."""
    datasets, metrics = {row.dataset for row in columns}, {_metric(row) for row in columns}
    names = [(row.dataset, _metric(row)) for row in columns]
    shared = []
    if len(metrics) == 1:
        shared, names = [*metrics], [(row.dataset, "") for row in columns]
    elif len(datasets) == 1:
        shared, names = [*datasets], [(_metric(row), "") for row in columns]
    firsts = ["descending" if row.higher_is_better else "ascending" for row in columns]
    return shared, [
        _head(name, first, note) for (name, note), first in zip(names, firsts, strict=True)
    ]


def _metric(row: Row) -> str:
    if _scale(row) == 1:
        return f"{row.metric}{ARROWS[row.higher_is_better]}"
    return f"{row.metric}, %\N{NO-BREAK SPACE}{ARROWS[row.higher_is_better].strip()}"


def _scale(row: Row) -> int:
    """Shares of images are shown as per cent, as in papers; other metrics as they are."""
    return 100 if any(share in row.metric for share in _SHARES) else 1


def _head(name: str, first: str, note: str = "", kind: str = "number") -> str:
    """The head of a column; a first click on it sorts as `first` says."""
    small = f' <span class="metric">{escape(note)}</span>' if note else ""
    return f'<th scope="col" class="{kind}" data-first="{first}">{escape(name)}{small}</th>'


def _method_html(
    overview: Overview, runs: Mapping[str, int], name: str, *, with_seeds: bool
) -> str:
    """The row of a method, with a line above the first row of a base method."""
    names = list(runs)
    place = names.index(name)
    begins = place > 0 and group_of(name) != group_of(names[place - 1])
    base, comma, variant = name.rpartition(",")
    base = f'<span class="metric">{escape(base + comma)}</span> ' if comma else ""
    cells = [
        f'<th scope="row" data-value="{place}">{key_html(place)}{base}'
        f"<span>{escape(variant.strip())}</span></th>"
    ]
    if with_seeds:
        cells.append(f'<td class="number" data-value="{runs[name]}">{runs[name]}</td>')
    for row, differences in zip(overview.columns, overview.differences, strict=True):
        cells.append(_cell_html(row, name, differences.get(name)))
    if overview.ranked > 1:
        cells.append(_rank_html(overview, name))
    opening = '<tr class="first">' if begins else "<tr>"
    return f"{opening}{''.join(cells)}</tr>"


def _cell_html(row: Row, name: str, difference: Estimate | None) -> str:
    estimate = row.estimates.get(name)
    if estimate is None:
        return '<td class="number">–</td>'
    scale = _scale(row)
    decimals = 1 if scale == 100 else decimals_of([e.mean for e in row.estimates.values()])
    value = cell_text(scale * estimate.mean, decimals)
    value = f"<strong>{value}</strong>" if name in row.best else value
    parts = [value, _small(interval_text(estimate, decimals, scale))]
    if difference is not None:
        gain = f"{scale * difference.mean:+.{decimals}f}".replace("-", "−")
        parts += ["<br>", _small(gain), _small(interval_text(difference, decimals, scale))]
    key = f"{estimate.mean!r}".replace("inf", "Infinity")  # as JavaScript reads it
    return f'<td class="number" data-value="{key}">{" ".join(filter(None, parts))}</td>'


def _small(text: str) -> str:
    return f'<span class="spread">{text}</span>' if text else ""


def _rank_html(overview: Overview, name: str) -> str:
    rank = overview.mean_ranks.get(name)
    if rank is None:
        return '<td class="number">–</td>'
    best = rank == min(overview.mean_ranks.values())
    text = f"<strong>{rank:.1f}</strong>" if best else f"{rank:.1f}"
    return f'<td class="number" data-value="{rank!r}">{text}</td>'


# The script makes the heads buttons, since they do nothing without it. Missing values stay last.
_SCRIPT = """<script>
for (const head of document.querySelectorAll(".sortable thead th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.onclick = () => {
    const table = head.closest("table"), order = head.getAttribute("aria-sort");
    const ascending = order ? order != "ascending" : head.dataset.first == "ascending";
    const value = (row) => parseFloat(row.cells[head.cellIndex].dataset.value);
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const sorted = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      return isNaN(x) - isNaN(y) || (ascending ? x - y : y - x) || 0;
    });
    table.tBodies[0].append(...sorted);
    table.classList.toggle("mixed", head.cellIndex > 0 || !ascending);
  };
}
</script>"""

STYLE = """
body:has(.overview){max-width:80rem}
.overview{display:flex;flex-wrap:wrap;column-gap:3rem}
.overview .scroll{margin:1rem 0;max-width:100%}
.overview table{border-collapse:separate;border-spacing:0;font-size:.9rem}
caption{text-align:left;font-weight:600;padding-bottom:.3rem}
.overview th,.overview td{padding:.2rem .6rem .2rem 0;line-height:1.3;overflow-wrap:normal;
vertical-align:baseline}
.overview th:last-child,.overview td:last-child{padding-right:.2rem}
.overview thead th{max-width:8rem;vertical-align:bottom;border-bottom-color:var(--ink)}
.overview th[scope=row]{position:sticky;left:0;background:var(--paper);min-width:9.8rem}
.overview th[scope=row] span{white-space:nowrap}
.overview td{white-space:nowrap}
.overview .spread{color:var(--soft);font-size:.8em;white-space:nowrap}
.overview .first>*{border-top:1px solid var(--soft)}
.overview .mixed .first>*{border-top:0}
.overview .metric{display:inline-block}.overview thead .metric{display:block}
.sortable button{all:unset;cursor:pointer;text-decoration:underline dotted var(--soft);
text-underline-offset:.2em}
.sortable button:focus-visible,.scroll:focus-visible{outline:2px solid var(--ink);
outline-offset:2px}
[aria-sort=ascending] button::after{content:" ▲"/""}
[aria-sort=descending] button::after{content:" ▼"/""}
@media(max-width:40rem){.overview th[scope=row]{min-width:5.5rem;max-width:7.5rem}
.overview th[scope=row] span{white-space:normal}
.overview .key{display:none}}
@media print{.overview{display:block}.overview table{font-size:7.5pt}
.overview thead th{font-size:1em}
.overview th[scope=row]{position:static;min-width:0}.overview .key{display:none}
.overview th,.overview td{padding-right:.3rem;white-space:normal}
.sortable button{text-decoration:none}}
"""
