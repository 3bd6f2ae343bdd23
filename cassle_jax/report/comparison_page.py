"""Makes the page that compares the findings of one or several subjects."""

import json
from collections.abc import Mapping, Sequence
from html import escape

from cassle_jax.evaluation.findings import Gallery
from cassle_jax.evaluation.protocols import title_of
from cassle_jax.report.comparison import (
    Estimate,
    FindingsBySubject,
    Row,
    charts_of,
    failures_of,
    galleries_of,
    rows_of,
    tasks_of,
)
from cassle_jax.report.comparison_chart import chart_html, key_html
from cassle_jax.report.gallery import rows_html
from cassle_jax.report.overview import Pairing, difference_rows, is_long, overviews_of, shades_of
from cassle_jax.report.overview_table import (
    ARROWS,
    STYLE,
    interval_text,
    overviews_html,
    scroll_html,
)
from cassle_jax.report.page import html_page, paragraphs_html
from cassle_jax.report.table import cell_text, decimals_of

Facts = Mapping[str, Mapping[str, object]]

_SHORT_FACT = 64


def comparison_page(
    subjects: FindingsBySubject, title: str, texts: tuple[str, str], facts: Facts, pairing: Pairing
) -> str:
    """The page's HTML.

    Args:
      subjects: lists of findings by subject, one list per seed.
      title: the heading.
      texts: paragraphs under the heading, and under the overview.
      facts: facts by subject, for the last section.
      pairing: seeds and baselines.
    """
    sections = [
        (*_heading(task), _task_html(subjects, task, pairing)) for task in tasks_of(subjects)
    ]
    if facts:
        sections.append(("Provenance", "", _provenance_html(list(subjects), facts)))
    header = f"<header><h1>{escape(title)}</h1>{paragraphs_html(texts[0])}</header>"
    names = [name for name, _, _ in sections]
    parts = [
        header,
        _failures_html(subjects, pairing),
        _overview_html(subjects, pairing),
        paragraphs_html(texts[1]),
        _contents_html(names),
    ]
    parts += [
        f'<section id="section-{index}"><h2>{escape(name)}{note}</h2>{body}</section>'
        for index, (name, note, body) in enumerate(sections)
    ]
    return html_page(title, parts, STYLE + _STYLE)


def _heading(task: str) -> tuple[str, str]:
    """The title of a task, and its name as a note where the two differ."""
    title = title_of(task)
    return title, "" if title == task else f' <span class="metric">{escape(task)}</span>'


def _failures_html(subjects: FindingsBySubject, pairing: Pairing) -> str:
    """The failed tasks, in red; empty where all succeeded. Means lack the runs of these lines."""
    lines = "".join(
        f"<li><b>{escape(failure.task)}</b> of {escape(name)} on {escape(failure.dataset)}: "
        f"{escape(failure.reason)}</li>"
        for name, failure in failures_of(subjects, pairing.seeds)
    )
    return f'<section class="failed"><h2>Failed</h2><ul>{lines}</ul></section>' if lines else ""


def _overview_html(subjects: FindingsBySubject, pairing: Pairing) -> str:
    """Compares the subjects, and explains the page's notation; without scores, lists them."""
    counts = {name: len(runs) for name, runs in subjects.items()}
    overviews = overviews_of(subjects, pairing) if len(subjects) > 1 else []
    tables = overviews_html(overviews, counts)
    if not tables:
        items = "".join(
            f"<li>{key_html(index)}<b>{escape(name)}</b> {_seeds(count)}</li>"
            for index, (name, count) in enumerate(counts.items())
        )
        tables = f'<ul class="keys">{items}</ul>'
    compared = [name for overview in overviews for each in overview.differences for name in each]
    baselines = list(dict.fromkeys(pairing.against[name] for name in compared))
    return f'{tables}<p class="note">{escape(" ".join(_notes(counts, baselines)))}</p>'


def _notes(counts: Mapping[str, int], baselines: Sequence[str]) -> list[str]:
    """Explains the page's notation, one sentence per sign."""
    notes = ["± is half the 95 % interval of the protocol, if it has one."]
    if any(count > 1 for count in counts.values()):
        notes = [
            "± is half the 95 % interval of the mean: Student’s t over several seeds, otherwise "
            "the interval of the protocol, if it has one.",
            "Bands and whiskers of charts give the range over seeds.",
        ]
    if len(counts) > 1:
        notes.append(
            "Bold: the best value per dataset and metric, values whose intervals overlap its "
            "interval, and values between those; no bold where that is every value."
        )
    if baselines:
        notes.append(
            f"Second line of a cell: difference to {' or '.join(baselines)} with the same seeds."
        )
    notes.append("↑ higher is better, ↓ lower is better; – not evaluated.")
    return notes


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _contents_html(names: Sequence[str]) -> str:
    """Links to the sections; empty for fewer than three."""
    if len(names) < 3:
        return ""
    links = "".join(
        f'<li><a href="#section-{index}">{escape(name)}</a></li>'
        for index, name in enumerate(names)
    )
    return f'<nav aria-label="Contents"><ol>{links}</ol></nav>'


def _task_html(subjects: FindingsBySubject, task: str, pairing: Pairing) -> str:
    names = list(subjects)
    rows, charts = rows_of(subjects, task), charts_of(subjects, task)
    changed = difference_rows(rows, pairing)
    shaded_by = pairing if changed else Pairing()
    parts = [_scores_html(names, rows, title_of(task), shaded_by)] if rows else []
    if changed:
        title = "Difference to the baseline, same seeds"
        table = _scores_html(names, changed, f"{title_of(task)}: {title.lower()}")
        parts.append(f"<details><summary>{title}</summary>{table}</details>")
    if charts:
        drawn = "".join(chart_html(names, chart) for chart in charts)
        parts.append(f'<div class="charts">{drawn}</div>')
    parts += [_gallery_html(subjects, by_subject) for by_subject in galleries_of(subjects, task)]
    return "".join(parts)


def _scores_html(
    names: Sequence[str], rows: Sequence[Row], name: str, pairing: Pairing | None = None
) -> str:
    """A table with one row per dataset and metric, and columns of values and intervals.

    Many rows of several subjects become a heat map.
    """
    is_map = pairing is not None and len(names) > 1 and is_long(rows)
    shades = shades_of(rows, pairing) if is_map else [{}] * len(rows)
    head = "".join(
        f'<th scope="col" colspan="2">{key_html(index)}<br>{escape(subject)}</th>'
        for index, subject in enumerate(names)
    )
    body = "".join(_row_html(names, *each) for each in zip(rows, shades, strict=True))
    table = (
        '<table class="scores"><thead><tr><th scope="col">dataset</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    return scroll_html(name, table) + (_shade_note(pairing) if is_map else "")


def _shade_note(pairing: Pairing) -> str:
    reference = "the baseline with the same seeds" if pairing.against else "the mean of the row"
    return (
        f'<p class="note"><span class="better" style="--shade:40%">Blue</span>: better than '
        f'{reference}; <span class="worse" style="--shade:40%">orange</span>: worse; the stronger, '
        "the larger the difference.</p>"
    )


def _row_html(names: Sequence[str], row: Row, shades: Mapping[str, float]) -> str:
    decimals = decimals_of([estimate.mean for estimate in row.estimates.values()])
    cells = "".join(
        _estimate_html(
            row.estimates.get(name), decimals, _shade(shades.get(name, 0.0)), name in row.best
        )
        for name in names
    )
    return (
        f'<tr><th scope="row"><span>{escape(row.dataset)}</span> '
        f'<span class="metric">{escape(row.metric)}{ARROWS[row.higher_is_better]}</span></th>'
        f"{cells}</tr>"
    )


def _shade(value: float) -> tuple[str, str]:
    """Class and style of a cell, shaded by a value from -1, the worst, to 1, the best."""
    percent = round(40 * abs(value))
    if not percent:
        return "", ""
    return " better" if value > 0 else " worse", f' style="--shade:{percent}%"'


def _estimate_html(
    estimate: Estimate | None, decimals: int, shade: tuple[str, str], is_best: bool
) -> str:
    if estimate is None:
        return '<td class="number">–</td><td></td>'
    value = cell_text(estimate.mean, decimals)
    value = f"<strong>{value}</strong>" if is_best else value
    title, spread = repr(estimate.mean), interval_text(estimate, decimals)
    if spread:
        title += f" ± {estimate.interval!r}"
    if len(estimate.values) > 1:
        title += f"; {_seeds(len(estimate.values))}: {', '.join(map(repr, estimate.values))}"
    kind, style = shade
    return (
        f'<td class="number{kind}"{style} title="{title}">{value}</td>'
        f'<td class="spread{kind}"{style}>{spread}</td>'
    )


def _gallery_html(subjects: FindingsBySubject, by_subject: Mapping[str, Gallery]) -> str:
    """One block of pictures per subject."""
    first = next(iter(by_subject.values()))
    blocks = "".join(
        f"<h3>{key_html(index)}{escape(name)}{_of_seeds(runs) if name in by_subject else ''}</h3>"
        f"{rows_html(by_subject[name].rows) if name in by_subject else '<p>–</p>'}"
        for index, (name, runs) in enumerate(subjects.items())
    )
    return (
        f'<figure class="gallery"><figcaption>{escape(first.title)} '
        f'<span class="metric">{escape(first.dataset)}</span></figcaption>{blocks}</figure>'
    )


def _of_seeds(runs: Sequence[object]) -> str:
    note = f"first of {len(runs)} seeds"
    return f' <span class="metric">{note}</span>' if len(runs) > 1 else ""


def _provenance_html(names: Sequence[str], facts: Facts) -> str:
    """A table of the short facts with one column per subject, followed by the long facts."""
    written = {name: {fact: _fact(value) for fact, value in facts[name].items()} for name in facts}
    every = dict.fromkeys(fact for texts in written.values() for fact in texts)
    long = {fact for texts in written.values() for fact, text in texts.items() if _is_long(text)}
    head = "".join(
        f'<th scope="col">{key_html(index)}<br>{escape(name)}</th>'
        for index, name in enumerate(names)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(fact)}</th>'
        + "".join(f"<td>{escape(written.get(name, {}).get(fact, '–'))}</td>" for name in names)
        + "</tr>"
        for fact in every
        if fact not in long
    )
    table = (
        '<table class="facts"><thead><tr><th scope="col">fact</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    return (scroll_html("Provenance", table) if body else "") + "".join(
        f"<details><summary>{escape(fact)} of {escape(name)}</summary><pre>{escape(text)}</pre>"
        "</details>"
        for fact in every
        if fact in long
        for name, texts in written.items()
        for text in [texts.get(fact, "–")]
    )


def _fact(value: object) -> str:
    if isinstance(value, Mapping):
        return json.dumps(dict(value), indent=2, ensure_ascii=False, default=str)
    return str(value)


def _is_long(text: str) -> bool:
    return "\n" in text or len(text) > _SHORT_FACT


# CSS in addition to the style that all pages share.
_STYLE = """
:root{--failed:#b3261e}
@media screen and (prefers-color-scheme:dark){:root{--failed:#ff8a80}}
h1{overflow-wrap:anywhere}
h3{font-size:.95rem;font-weight:600;margin:1rem 0 .4rem}
.failed{color:var(--failed)}
.note{font-size:.9rem;color:var(--soft)}
.keys{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1.2rem;margin:.4rem 0;padding:0;
font-size:.9rem;color:var(--soft)}
.keys b{color:var(--ink)}
figure .keys{margin:.1rem 0 .5rem}
svg.key{display:inline-block;width:1.7em;height:.65em;margin-right:.45em;vertical-align:baseline}
.key .line{stroke-width:3}
.line.neutral{--run:var(--soft)}
.dash-1{stroke-dasharray:5 5}.dash-2{stroke-dasharray:1 4}
.dash-3{stroke-dasharray:9 4 1 4}
.band{fill:var(--run);fill-opacity:.18}
.bar{fill:var(--run)}
[class*=" dash-"].bar{fill-opacity:.3;stroke:var(--run);stroke-width:1.5}
.zero,.whisker{stroke:var(--ink);stroke-width:1;fill:none}
svg text.value{font-size:11px;fill:var(--ink);font-variant-numeric:tabular-nums}
nav ol{margin:1rem 0;padding:0;list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;
font-size:.95rem}
a{color:inherit;text-decoration-color:var(--soft);text-underline-offset:.2em}
.scores{margin-bottom:1.2rem;border-collapse:separate;border-spacing:0}
.scores td,.scores th{white-space:nowrap}
.scores thead th{vertical-align:bottom;padding-right:1.4rem;line-height:1.3;white-space:normal;
min-width:9rem}
.scores .number{width:4rem;padding-right:.35rem}
.scores .spread{color:var(--soft);font-size:.85em;padding-right:1.6rem;vertical-align:baseline}
.scores td,.scores th[scope=row]{vertical-align:baseline}
.scores th[scope=row]{position:sticky;left:0;background:var(--paper)}
.scores th[scope=row] span{display:inline-block;min-width:8.5rem}
.scores .spread.better,.scores .spread.worse,.note>span{color:var(--ink)}
.better{background:color-mix(in srgb,var(--run-0) var(--shade),var(--paper))}
.worse{background:color-mix(in srgb,var(--run-1) var(--shade),var(--paper))}
.metric{font-weight:400;color:var(--soft);font-size:.9em}
.panels{display:grid;gap:.8rem 1.5rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr))}
figure:not(.wide)>.panels{display:block}
.wide{grid-column:1/-1;break-inside:auto}
.panels>div{break-inside:avoid}
.panels h3{margin:.2rem 0;font-size:.9rem;font-weight:400}
.gallery{margin-top:1.5rem;break-inside:auto}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(4.6rem,1fr));gap:.5rem;
margin:.2rem 0 .8rem;color:var(--soft);break-inside:avoid}
.strip figcaption{font-weight:400;font-size:.78rem;line-height:1.25;margin:.15rem 0 0;
overflow-wrap:anywhere}
.strip img{border-radius:3px;aspect-ratio:1;object-fit:contain}
.strip img.pixels{image-rendering:pixelated}
.strip figure:first-child img{outline:2px solid var(--ink);outline-offset:1px}
.strip figure:first-child figcaption{color:var(--ink)}
.facts thead th{vertical-align:bottom}.facts td{font-size:.9rem;min-width:9rem}
details{margin:.6rem 0}summary{cursor:pointer}
pre{font-size:.8rem;line-height:1.4;white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:40rem){
.scores th[scope=row]{white-space:normal;padding-right:.7rem}
.scores th[scope=row] span{display:block;min-width:0!important;line-height:1.3}
.scores thead th{min-width:0;padding-right:.6rem;overflow-wrap:break-word}
.scores .spread{padding-right:1rem}.scores .spread:empty{padding-right:.4rem}
.strip{grid-template-columns:repeat(auto-fill,minmax(3.8rem,1fr))}}
@media print{nav{display:none}.scroll{overflow:visible}thead{display:table-header-group}
tr{break-inside:avoid}h3,figcaption,.keys{break-after:avoid}
.scores{font-size:8.5pt}.scores thead th,.scores th[scope=row] span{min-width:0}
.scores th[scope=row]{position:static;background:none}
.scores th[scope=row] span{display:block}.scores .number{width:3rem}
.scores .spread{font-size:inherit}.scores .spread,.scores thead th{padding-right:.7rem}
.charts{grid-template-columns:1fr 1fr}.wide .panels{grid-template-columns:repeat(3,1fr)}
details::details-content{content-visibility:visible;display:block}
.bar,.band,.better,.worse{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
