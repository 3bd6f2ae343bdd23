"""Formats self-contained HTML pages in the style that all pages share."""

from collections.abc import Sequence
from html import escape

from cassle_jax.report.palette import RUN_COLOURS


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


def _style() -> str:
    light = "".join(f"--run-{i}:{colours[0]};" for i, colours in enumerate(RUN_COLOURS))
    dark = "".join(f"--run-{i}:{colours[1]};" for i, colours in enumerate(RUN_COLOURS))
    runs = "".join(f".run-{i}{{--run:var(--run-{i})}}" for i in range(len(RUN_COLOURS)))
    return _STYLE.replace("{light}", light).replace("{dark}", dark) + runs


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
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
svg,img{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px;text-anchor:middle}
svg text.left{text-anchor:end}svg text.right{text-anchor:start}
.grid{stroke:var(--rule);stroke-width:1;fill:none}
.line,.dot{fill:none;stroke:var(--run);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.dot{stroke-width:7}
@media print{body{padding:0;max-width:none;font-size:10pt}h2{break-after:avoid}}
"""
