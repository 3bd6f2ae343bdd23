"""Writes the findings of one or several subjects as a page, as JSON and as CSV."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from cassle_jax.checks import ConfigError
from cassle_jax.evaluation.findings import Finding, Score, from_json, to_json
from cassle_jax.report.comparison import (
    FindingsBySubject,
    check_subjects,
    each_finding,
    failures_of,
)
from cassle_jax.report.comparison_page import Facts, comparison_page
from cassle_jax.report.former_names import renamed
from cassle_jax.report.overview import Pairing, named_baselines
from cassle_jax.storage import make_shared, read_surely, write_whole

Parts = Mapping[str, Sequence[Sequence[tuple[str, int]]]]
"""For each subject and run, in order: a key, "" for none, and the number of findings under it."""

HTML, JSON, CSV = "report.html", "report.json", "report.csv"
CSV_COLUMNS = (
    "subject", "run", "task", "dataset", "metric", "value", "interval", "higher_is_better"
)  # fmt: skip

# Errors of reading a file that is not a report, or only a part of one.
_DAMAGE = (AttributeError, KeyError, RecursionError, TypeError, ValueError)


def write_report(
    folder: str | PathLike[str],
    subjects: FindingsBySubject,
    *,
    title: str = "Evaluation",
    summary: str = "",
    question: str = "",
    provenance: Facts | None = None,
    pairing: Pairing | None = None,
    parts: Parts | None = None,
    kept: Mapping[str, Sequence[Finding]] | None = None,
    complete: bool = True,
) -> Path:
    """Writes `report.html`, `report.json` and `report.csv` that compare subjects.

    The page loads no other file; it suits phones, print and dark screens. With several subjects it
    begins with an overview: subjects as rows, datasets as columns, the mean rank, and differences
    to the baseline with the same seeds. Its only script sorts these tables. A section per task has
    a table of all metrics, charts and galleries; a long table is a heat map. Tables give the mean
    over a subject's seeds ± half the 95 % interval (Student's t). Charts show the mean and the
    range, galleries the pictures of the first seed. Numbers are printed to three decimals, with all
    digits in a tooltip. A dash marks a missing value; a red line at the top names a failed task.
    All text is escaped.

    The JSON holds everything; `read_report` reads it. The CSV has one row per score and run, in
    full precision.

    Args:
      folder: Folder of the files; created where missing, and existing files are replaced. The JSON
        is written last, so the others exist where it does.
      subjects: Lists of findings by subject, one list per seed; the report keeps the order.
      title: The heading.
      summary: Text under the heading, or under the overview; an empty line starts a new paragraph.
      question: Text between the heading and the overview.
      provenance: Facts by subject, such as the weights' fingerprint, versions and the
        configuration; long facts are listed below the table.
      pairing: Seeds and baselines; `None` for no seeds, and the subjects called `plain` as
        baselines.
      parts: Keys of the findings, see `Parts`; for `read_parts`.
      kept: Findings by key that are not part of the page; the JSON holds them for `read_parts`.
      complete: Whether no results are to follow; see `read_complete`.

    Returns:
      The path of the page.

    Raises:
      ValueError: If there is no subject, a subject has no runs, a run has two findings of the same
        name, subjects differ in `higher_is_better`, or `provenance` names an unknown subject.
    """
    check_subjects(subjects)
    provenance = provenance or {}
    for name in provenance:
        if name not in subjects:
            raise ValueError(
                f"provenance of {name!r}, which is not a subject; use one of {', '.join(subjects)}"
            )
    pairing = pairing or Pairing(against=named_baselines(list(subjects)))
    texts = (question if complete else f"INCOMPLETE. {question}".strip(), summary)
    page = comparison_page(subjects, title, texts, provenance, pairing)
    folder = Path(folder)
    make_shared(folder)
    write_whole(folder / HTML, page)
    write_whole(folder / CSV, _csv(subjects))
    summary = "\n\n".join(filter(None, (question, summary)))
    held = {"title": title, "summary": summary, "complete": complete}
    held["kept"] = {key: to_json(findings) for key, findings in (kept or {}).items()}
    write_whole(folder / JSON, _json(held, subjects, provenance, parts or {}))
    return folder / HTML


def read_report(path: str | PathLike[str]) -> tuple[FindingsBySubject, Facts]:
    """Reads the findings and the provenance that `write_report` wrote to `report.json`.

    Findings of earlier versions get today's names.

    Raises:
      ConfigError: the file is damaged.
      OSError, Outage: it cannot be read, for good or for now.
    """
    subjects, facts, _ = _read(path)
    return subjects, facts


def read_parts(path: str | PathLike[str]) -> dict[str, list[Finding]]:
    """The findings of all `parts` and `kept` of a report, by key; empty without a file.

    Raises:
      OSError, Outage: the file cannot be read, for good or for now.
      ConfigError: it is damaged.
    """
    try:
        held = _held(path)
        read = {key: from_json(findings) for key, findings in held.get("kept", {}).items()}
        for one in held["subjects"].values():
            for run, parts in zip(one["runs"], one.get("parts", ()), strict=False):
                read |= _by_key(run, parts)
    except FileNotFoundError:
        return {}
    except _DAMAGE as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return read


def _by_key(run, parts) -> dict[str, list[Finding]]:
    """The findings of a run as JSON, by their keys, see `Parts`."""
    read, first = {}, 0
    for key, count in parts:
        if not isinstance(key, str) or type(count) is not int:
            raise ValueError(f"{key!r}, {count!r} is not a part")
        if key:
            read[key] = from_json(run[first : first + count])
        first += count
    return read


def read_complete(path: str | PathLike[str]) -> tuple[FindingsBySubject, Facts] | None:
    """The report, as `read_report` returns it, of an evaluation without failures; else `None`.

    A damaged file is not complete: the evaluation writes it again.
    """
    try:
        subjects, facts, complete = _read(path)
    except (FileNotFoundError, ConfigError):
        return None
    return (subjects, facts) if complete and not failures_of(subjects) else None


def is_complete(path: str | PathLike[str]) -> bool:
    """Whether the path is the `report.json` of an evaluation that finished without a failure."""
    return read_complete(path) is not None


def _read(path: str | PathLike[str]) -> tuple[FindingsBySubject, Facts, bool]:
    """The findings, the provenance, and whether the evaluation finished; see `read_report`."""
    try:
        held = _held(path)
        entries = held["subjects"]
        subjects = {
            name: [[renamed(each) for each in from_json(run)] for run in entry["runs"]]
            for name, entry in entries.items()
        }
        given = {name: entry["provenance"] for name, entry in entries.items()}
    except _DAMAGE as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove it, and the evaluation "
            "writes it again"
        ) from error
    facts = {name: facts for name, facts in given.items() if facts}
    return subjects, facts, held.get("complete", True)


def _held(path: str | PathLike[str]) -> dict:
    held = json.loads(read_surely(Path(path)))
    if not isinstance(held, dict):
        raise ValueError("it holds no report")
    return held


def _json(
    held: Mapping[str, object], subjects: FindingsBySubject, facts: Facts, parts: Parts
) -> str:
    # Values that JSON cannot represent, such as NaN, a path or a date, become text.
    plain = json.loads(json.dumps(facts, default=str), parse_constant=str)
    by_name = {
        name: {
            "provenance": plain.get(name, {}),
            "parts": parts.get(name, ()),
            "runs": [to_json(run) for run in runs],
        }
        for name, runs in subjects.items()
    }
    content = {**held, "subjects": by_name}
    return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _csv(subjects: FindingsBySubject) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for name, run, each in each_finding(subjects):
        if isinstance(each, Score):
            writer.writerow([name, run, *_csv_cells(each)])
    return text.getvalue()


def _csv_cells(score: Score) -> list[str]:
    interval = "" if score.interval is None else repr(float(score.interval))
    better = {True: "true", False: "false", None: ""}[score.higher_is_better]
    return [score.task, score.dataset, score.metric, repr(float(score.value)), interval, better]
