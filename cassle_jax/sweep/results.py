"""What a table's runs add up to: means over seeds, and differences of the same seeds."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cassle_jax.evaluation.findings import Finding, Score
from cassle_jax.report.comparison import Estimate
from cassle_jax.report.evaluation_page import write_report
from cassle_jax.storage import write_whole
from cassle_jax.sweep.table import Table

JSON, CSV = "results.json", "results.csv"
COLUMNS = (
    "row", "task", "dataset", "metric", "higher_is_better", "seeds", "mean", "interval", "against",
    "difference", "difference_interval", "paired_seeds",
)  # fmt: skip

# By subject, by seed, what was found.
Found = Mapping[str, Mapping[int, Sequence[Finding]]]
Key = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Line:
    """One metric of one row.

    Attributes:
      row: its subject.
      score: the first seed's, for its names.
      values: by seed.
      against: the subject it is compared with; "" for none.
      differences: to that subject by seed, of the seeds that both have.
    """

    row: str
    score: Score
    values: Mapping[int, float]
    against: str
    differences: Mapping[int, float]

    def cells(self) -> dict[str, object]:
        """What the CSV has of it, by column; half a width of 95 % for an interval."""
        score, (mean, interval) = self.score, _estimated(self.values, self.score.interval)
        difference, its_interval = _estimated(self.differences)
        values = (
            self.row, score.task, score.dataset, score.metric, score.higher_is_better,
            len(self.values), mean, interval, self.against, difference, its_interval,
            len(self.differences),
        )  # fmt: skip
        return dict(zip(COLUMNS, values, strict=True))


def write_results(
    folder: Path,
    table: Table,
    found: Found,
    facts: Mapping[str, Mapping[str, object]],
    runs: Sequence[Mapping[str, object]],
    note: str = "",
) -> Path:
    """Writes `results.json`, `results.csv` and the page of all that finished.

    A metric that several datasets have gets a line with its mean over them. On the page every task
    is followed by what each row is ahead of the one it is compared with: the mean over seeds that
    both have, ± half the 95 % interval of the differences (Student's t).

    Args:
      folder: where the files go.
      table: the experiment.
      found: of every run that finished.
      facts: by subject, of its first run.
      runs: how each run of the table stands.
      note: for the page's summary.

    Returns:
      The path of the page.
    """
    found = {
        subject: {seed: with_means(findings) for seed, findings in seeds.items()}
        for subject, seeds in found.items()
    }
    lines = list(lines_of(table, found))
    held = {
        "title": table.title,
        "question": table.question,
        "runs": list(runs),
        "lines": [{**line.cells(), "values": dict(line.values)} for line in lines],
    }
    write_whole(folder / JSON, json.dumps(held, indent=1, ensure_ascii=False).encode())
    write_whole(folder / CSV, _csv(lines).encode())
    subjects = {subject: list(seeds.values()) for subject, seeds in found.items()}
    for line in lines:
        for seed, difference in line.differences.items():
            place = list(found[line.row]).index(seed)
            subjects[line.row][place] = [
                *subjects[line.row][place],
                dataclasses.replace(
                    line.score,
                    task=f"{line.score.task}: ahead of the row compared with",
                    value=difference,
                    interval=None,
                ),
            ]
    summary = f"{_summary(table, found)} {note}".rstrip()
    return write_report(folder, subjects, title=table.title, summary=summary, provenance=facts)


def with_means(findings: Sequence[Finding]) -> list[Finding]:
    """Findings, and of each metric that several datasets have its mean over them."""
    values: dict[tuple[str, str, bool], list[float]] = {}
    for each in findings:
        if isinstance(each, Score) and each.higher_is_better is not None:
            key = each.task, each.metric, each.higher_is_better
            values.setdefault(key, []).append(float(each.value))
    means = [
        Score(task, f"mean of {len(its)}", metric, sum(its) / len(its), higher_is_better=better)
        for (task, metric, better), its in values.items()
        if len(its) > 1
    ]
    return [*findings, *means]


def lines_of(table: Table, found: Found) -> Iterator[Line]:
    """Every metric of every row that has finished runs, in the order of the table."""
    for row in table.rows:
        against = table.against(row)
        own, theirs = _by_metric(found.get(row.subject, {})), _by_metric(found.get(against, {}))
        for key, scores in own.items():
            first = next(iter(scores.values()))
            other = {} if first.higher_is_better is None else theirs.get(key, {})
            differences = {
                seed: float(score.value) - float(other[seed].value)
                for seed, score in scores.items()
                if seed in other
            }
            values = {seed: float(score.value) for seed, score in scores.items()}
            yield Line(row.subject, first, values, against, differences)


def _by_metric(seeds: Mapping[int, Sequence[Finding]]) -> dict[Key, dict[int, Score]]:
    scores: dict[Key, dict[int, Score]] = {}
    for seed, findings in seeds.items():
        for each in findings:
            if isinstance(each, Score):
                scores.setdefault((each.task, each.dataset, each.metric), {})[seed] = each
    return scores


def _estimated(
    values: Mapping[int, float], own: float | None = None
) -> tuple[float | None, float | None]:
    """The mean over seeds and half its interval; `None` where there are too few."""
    if not values:
        return None, None
    estimate = Estimate(tuple(values.values()), own)
    return estimate.mean, estimate.interval


def _csv(lines: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(line.cells() for line in lines)
    return text.getvalue()


def _summary(table: Table, found: Found) -> str:
    against = {row.subject: table.against(row) for row in table.rows}
    compared = "; ".join(
        f"{row} with {other}" for row, other in against.items() if {row, other} <= found.keys()
    )
    seeds = ", ".join(f"{subject}: {len(each)}" for subject, each in found.items())
    return (
        f"{table.question}\n\nSeeds of each row: {seeds}. Means ± half their 95 % intervals. "
        f"Compared are, seed by seed: {compared or 'none'}."
    )
