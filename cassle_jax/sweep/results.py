"""Aggregates a table's results: means over seeds, and paired differences between rows."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cassle_jax.evaluation.findings import Finding, Score, plain
from cassle_jax.report.comparison import Estimate
from cassle_jax.report.files import write_report
from cassle_jax.report.overview import MEAN_OF, Pairing, paired
from cassle_jax.storage import write_whole
from cassle_jax.sweep.table import Table

JSON, CSV = "results.json", "results.csv"
COLUMNS = (
    "row", "task", "dataset", "metric", "higher_is_better", "seeds", "mean", "interval", "against",
    "difference", "difference_interval", "paired_seeds",
)  # fmt: skip

# Findings by subject and seed.
FindingsBySeed = Mapping[str, Mapping[int, Sequence[Finding]]]
Key = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Line:
    """One metric of one row.

    Attributes:
      row: subject of the row.
      score: score of the first seed, for the names of task, dataset and metric.
      values: values by seed.
      against: subject of the baseline row; "" for none.
      differences: differences to the baseline by seed, for the seeds that both rows have.
    """

    row: str
    score: Score
    values: Mapping[int, float]
    against: str
    differences: Mapping[int, float]

    def cells(self) -> dict[str, object]:
        """Cells of the CSV by column; an interval is half the 95 % interval."""
        score, (mean, interval) = self.score, _estimated(self.values, self.score.interval)
        difference, difference_interval = _estimated(self.differences)
        values = (
            self.row, score.task, score.dataset, score.metric, score.higher_is_better,
            len(self.values), mean, interval, self.against, difference, difference_interval,
            len(self.differences),
        )  # fmt: skip
        return dict(zip(COLUMNS, values, strict=True))


def write_results(
    folder: Path,
    table: Table,
    found: FindingsBySeed,
    facts: Mapping[str, Mapping[str, object]],
    runs: Sequence[Mapping[str, object]],
    note: str = "",
) -> Path:
    """Writes `results.json`, `results.csv` and the page of the finished runs.

    A metric with several datasets gets a line for its mean over them. The difference of a row to
    its baseline is the mean over the seeds of both rows, ± half the 95 % interval of the paired
    differences (Student's t). Numbers that are not finite, which JSON lacks, become "nan", "inf"
    and "-inf" there.

    Args:
      folder: folder of the files.
      table: the experiment.
      found: findings of the finished runs.
      facts: provenance of the first run, by subject.
      runs: states of the table's runs.
      note: a sentence for the page's summary.

    Returns:
      The path of the page.
    """
    found = {
        subject: {seed: with_means(findings) for seed, findings in seeds.items()}
        for subject, seeds in found.items()
    }
    lines = list(lines_of(table, found))
    content = {
        "title": table.title,
        "question": table.question,
        "runs": [_plain(run) for run in runs],
        "lines": [{**_plain(line.cells()), "values": _plain(line.values)} for line in lines],
    }
    write_whole(folder / JSON, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))
    write_whole(folder / CSV, _csv(lines))
    subjects = {subject: list(seeds.values()) for subject, seeds in found.items()}
    return write_report(
        folder,
        subjects,
        title=table.title,
        question=table.question,
        summary=f"{_compared(table, found)} {note}".rstrip(),
        provenance=facts,
        pairing=Pairing(
            {subject: list(seeds) for subject, seeds in found.items()},
            {row.subject: other for row in table.rows if (other := table.against(row))},
        ),
    )


def with_means(findings: Sequence[Finding]) -> list[Finding]:
    """Adds the mean over datasets to the findings, for every metric with several datasets."""
    values: dict[tuple[str, str, bool], list[float]] = {}
    for finding in findings:
        if isinstance(finding, Score) and finding.higher_is_better is not None:
            key = finding.task, finding.metric, finding.higher_is_better
            values.setdefault(key, []).append(float(finding.value))
    means = [
        Score(task, f"{MEAN_OF}{len(own)}", metric, sum(own) / len(own), higher_is_better=better)
        for (task, metric, better), own in values.items()
        if len(own) > 1
    ]
    return [*findings, *means]


def lines_of(table: Table, found: FindingsBySeed) -> Iterator[Line]:
    """Yields every metric of every row with finished runs, in the order of the table."""
    for row in table.rows:
        against = table.against(row)
        own, theirs = _by_metric(found.get(row.subject, {})), _by_metric(found.get(against, {}))
        for key, scores in own.items():
            first = next(iter(scores.values()))
            other = {} if first.higher_is_better is None else theirs.get(key, {})
            values, baseline = _values(scores), _values(other)
            yield Line(row.subject, first, values, against, paired(values, baseline))


def _by_metric(seeds: Mapping[int, Sequence[Finding]]) -> dict[Key, dict[int, Score]]:
    scores: dict[Key, dict[int, Score]] = {}
    for seed, findings in seeds.items():
        for finding in findings:
            if isinstance(finding, Score):
                key = finding.task, finding.dataset, finding.metric
                scores.setdefault(key, {})[seed] = finding
    return scores


def _values(scores: Mapping[int, Score]) -> dict[int, float]:
    return {seed: float(score.value) for seed, score in scores.items()}


def _estimated(
    values: Mapping[int, float], own: float | None = None
) -> tuple[float | None, float | None]:
    """The mean over seeds and half its 95 % interval; `None` with too few seeds."""
    if not values:
        return None, None
    estimate = Estimate(tuple(values.values()), own)
    return estimate.mean, estimate.interval


def _plain(values: Mapping[Any, object]) -> dict[Any, object]:
    return {name: plain(value) for name, value in values.items()}


def _csv(lines: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(line.cells() for line in lines)
    return text.getvalue()


def _compared(table: Table, found: FindingsBySeed) -> str:
    against = {row.subject: table.against(row) for row in table.rows}
    compared = "; ".join(
        f"{row} with {other}" for row, other in against.items() if {row, other} <= found.keys()
    )
    return f"Comparisons, paired by seed: {compared or 'none'}."
