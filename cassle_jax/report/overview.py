"""Computes the overview of a report: methods by datasets, their ranks and differences."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cassle_jax.report.comparison import Estimate, FindingsBySubject, Row, rows_of, tasks_of

PLAIN = "plain"
MEAN_OF = "mean of "
"""Prefix of the dataset's name in a mean over datasets."""

_MOST_COLUMNS = 12


class Pairing(NamedTuple):
    """Pairs the runs of a subject with those of its baseline.

    Attributes:
      seeds: seeds of the runs by subject, in the order of the runs. A subject without seeds, or
        with a seed twice, has no differences.
      against: baseline by subject; a missing subject has none.
    """

    seeds: Mapping[str, Sequence[int]] = {}
    against: Mapping[str, str] = {}


@dataclass(frozen=True)
class Overview:
    """A task's main metric on every dataset.

    Attributes:
      task: name of the task.
      columns: the metrics, one or several per dataset, means over datasets last.
      differences: differences to the baseline by subject, for each of `columns`.
      ranked: number of columns that every subject has; the mean ranks are over these.
      mean_ranks: mean rank by subject, 1 for the best; equal values share the mean of their ranks.
    """

    task: str
    columns: tuple[Row, ...]
    differences: tuple[Mapping[str, Estimate], ...]
    ranked: int
    mean_ranks: Mapping[str, float]


def overviews_of(subjects: FindingsBySubject, pairing: Pairing) -> list[Overview]:
    """The overviews of all tasks that have a main metric, in order of appearance.

    A task with many metrics, such as one per augmentation, has none: see `is_long`.
    """
    found = []
    for task in tasks_of(subjects):
        rows = rows_of(subjects, task)
        if columns := _main(rows):
            ranked = _ranked(columns)
            found.append(
                Overview(
                    task,
                    columns,
                    tuple(differences_of(row, pairing) for row in columns),
                    len(ranked),
                    _mean_ranks(ranked),
                )
            )
    return found


def group_of(subject: str) -> str:
    """The base method of a subject such as `SimCLR, CASSLE`; "" for a subject without a comma."""
    return subject.rpartition(",")[0]


def named_baselines(subjects: Sequence[str]) -> dict[str, str]:
    """The baseline of every subject whose group has one called `plain`."""
    named = {
        group_of(subject): subject
        for subject in subjects
        if subject.rpartition(",")[2].strip().casefold() == PLAIN
    }
    return {
        subject: named[group]
        for subject in subjects
        if (group := group_of(subject)) in named and subject != named[group]
    }


def paired(own: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    """Differences of values by seed, for the seeds that both have."""
    return {seed: value - other[seed] for seed, value in own.items() if seed in other}


def differences_of(row: Row, pairing: Pairing) -> dict[str, Estimate]:
    """The mean difference to the baseline with the same seeds, by subject.

    Its interval is that of the paired differences (Student's t), so one seed gives none. Empty for
    a metric where neither higher nor lower is better.
    """
    if row.higher_is_better is None:
        return {}
    found = {}
    for subject in row.estimates:
        values = paired(
            _by_seed(row, subject, pairing),
            _by_seed(row, pairing.against.get(subject, ""), pairing),
        )
        if values:
            found[subject] = Estimate(tuple(values.values()))
    return found


def difference_rows(rows: Sequence[Row], pairing: Pairing) -> list[Row]:
    """The rows with differences to the baseline in place of values; leaves out rows without any."""
    differences = [(row, differences_of(row, pairing)) for row in rows]
    return [replace(row, estimates=found) for row, found in differences if found]


def is_long(rows: Sequence[Row]) -> bool:
    """Whether a dataset has too many metrics to compare by their numbers alone."""
    counts = [row.dataset for row in rows if row.higher_is_better is not None]
    return max(map(counts.count, counts), default=0) > _MOST_COLUMNS


def shades_of(rows: Sequence[Row], pairing: Pairing) -> list[dict[str, float]]:
    """The advantage of each subject over its baseline, or else over the mean, per row.

    The largest difference of all rows is 1 where it is an improvement, else -1. A value that is not
    finite has no shade.
    """
    shades = []
    for row in rows:
        sign = {True: 1, False: -1, None: 0}[row.higher_is_better]
        means = {name: e.mean for name, e in row.estimates.items() if math.isfinite(e.mean)}
        if pairing.against:
            found = {name: e.mean for name, e in differences_of(row, pairing).items()}
        else:
            middle = sum(means.values()) / max(len(means), 1)
            found = {name: mean - middle for name, mean in means.items()}
        shades.append({n: sign * value for n, value in found.items() if math.isfinite(value)})
    largest = max((abs(value) for row in shades for value in row.values()), default=0.0) or 1.0
    return [{name: value / largest for name, value in row.items()} for row in shades]


def _main(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The first metric per dataset that says which value is better, and the others of its kind."""
    kinds: dict[str, str] = {}
    chosen = []
    for row in rows:
        if row.higher_is_better is not None:
            kind = _kind(row.metric)
            if kinds.setdefault(row.dataset, kind) == kind:
                chosen.append(row)
    if is_long(rows) and not all(kind == "mean" for kind in kinds.values()):
        return ()
    return tuple(sorted(chosen, key=_is_mean))


def _kind(metric: str) -> str:
    """The metric without numbers and what follows a comma: both `5-way 1-shot` and `… 5-shot`."""
    return re.sub(r"\d", "", metric.partition(",")[0])


def _is_mean(row: Row) -> bool:
    return row.dataset.startswith(MEAN_OF)


def _by_seed(row: Row, subject: str, pairing: Pairing) -> dict[int, float]:
    """The values of a subject by seed; none where its seeds are unknown or not distinct."""
    seeds, estimate = pairing.seeds.get(subject, ()), row.estimates.get(subject)
    if estimate is None or not seeds or len(set(seeds)) < len(seeds):
        return {}
    return {seeds[run]: v for run, v in zip(estimate.runs, estimate.values, strict=True)}


def _ranked(columns: Sequence[Row]) -> list[Row]:
    """The columns of single datasets that have a number for every subject of any column."""
    subjects = {name for row in columns for name in row.estimates}
    return [
        row
        for row in columns
        if not _is_mean(row)
        and subjects == {name for name, e in row.estimates.items() if not math.isnan(e.mean)}
    ]


def _mean_ranks(columns: Sequence[Row]) -> dict[str, float]:
    """The mean rank by subject; empty without columns."""
    ranks = [_ranks(row) for row in columns]
    subjects = ranks[0] if ranks else ()
    return {name: sum(each[name] for each in ranks) / len(ranks) for name in subjects}


def _ranks(row: Row) -> dict[str, float]:
    sign = -1 if row.higher_is_better else 1
    # Equal means of other seeds, or of seeds in another order, differ in their last digits.
    values = {name: sign * float(f"{e.mean:.12g}") for name, e in row.estimates.items()}
    return {
        name: sum(other < own for other in values.values())
        + (sum(other == own for other in values.values()) + 1) / 2
        for name, own in values.items()
    }
