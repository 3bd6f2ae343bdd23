"""Prints the JSON of `python -m benchmarks --to=FILE` as Markdown, for docs/performance.md.

python -m benchmarks.table performance.json
"""

import json
import statistics
import sys
from itertools import groupby
from pathlib import Path


def tables(written: dict) -> str:
    """Formats one table per measurement: median and range over rounds, and ratio ours/theirs."""
    about, parts = written["about"], []
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts.append(f"{about['device']}, {about['cpus']} CPUs, Python {about['python']}, {versions}.")
    settings = ", ".join(f"{name} {value}" for name, value in written["workload"].items())
    parts.append(f"Workload: {settings}.")
    for measurement, rows in groupby(written["rows"], key=lambda row: row["measurement"]):
        rows = list(rows)
        unit = rows[0]["unit"]
        same = len({row["unit"] for row in rows}) == 1
        lines = [f"| {measurement}{f', {unit}' if same and unit else ''} | median | range | × |"]
        lines.append("|---|---:|---:|---:|")
        lines += [_line(row, with_unit=not same) for row in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(row: dict, *, with_unit: bool) -> str:
    name = f"{row['name']}, {row['unit']}" if with_unit and row["unit"] else row["name"]
    if not row["values"]:
        return f"| {name} | {row['note']} | | |"
    median, least, most = (f(row["values"]) for f in (statistics.median, min, max))
    spread = f"{least:.4g}–{most:.4g}" if len(row["values"]) > 1 else ""
    ratio = f"{row['ratio']:.3g}" if row["ratio"] else ""
    if len(row["ratios"]) > 1:
        ratio += f" ({min(row['ratios']):.3g}–{max(row['ratios']):.3g})"
    return f"| {name} | {median:.4g} | {spread} | {ratio} |"


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
