"""Compares findings of several subjects: means over seeds, and the best subjects per row."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeVar

import numpy as np

from cassle_jax.evaluation.findings import Chart, Failure, Finding, Gallery, Score, half_interval

# Findings by subject, one list per seed.
FindingsBySubject = Mapping[str, Sequence[Sequence[Finding]]]
Kind = TypeVar("Kind", Score, Chart, Gallery)


@dataclass(frozen=True)
class Estimate:
    """A mean over the seeds of a subject.

    Attributes:
      values: one value per seed, in the order of the seeds; a seed without the value is missing.
      own_interval: half the interval that the protocol reports; used with a single seed.
      runs: the place of every value's run among the subject's runs.
    """

    values: tuple[float, ...]
    own_interval: float | None = None
    runs: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """The mean over seeds; NaN if a value is NaN."""
        return float(np.mean(self.values))

    @property
    def interval(self) -> float | None:
        """Half the 95 % interval of the mean: Student's t over seeds, or the protocol's own."""
        return self.own_interval if len(self.values) == 1 else half_interval(self.values)

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest value; NaN if a value is NaN."""
        return float(np.min(self.values)), float(np.max(self.values))


@dataclass(frozen=True)
class Row:
    """A metric of a task on a dataset, for all subjects that have it.

    Attributes:
      task: name of the task.
      dataset: name of the dataset.
      metric: name of the metric.
      higher_is_better: `False` where lower is better, `None` where neither is.
      estimates: estimates by subject.
    """

    task: str
    dataset: str
    metric: str
    higher_is_better: bool | None
    estimates: Mapping[str, Estimate]

    @property
    def best(self) -> frozenset[str]:
        """The best subject, the subjects whose intervals overlap its interval, and those between.

        Empty if that is every subject with a value, or if neither higher nor lower is better. An
        unknown interval counts as zero.
        """
        if self.higher_is_better is None:
            return frozenset()
        sign = 1 if self.higher_is_better else -1
        values = {
            subject: (sign * estimate.mean, _width(estimate))
            for subject, estimate in self.estimates.items()
            if not math.isnan(estimate.mean)
        }
        if not values:
            return frozenset()
        value, width = max(values.values())
        least = min(mean for mean, half in values.values() if mean + half >= value - width)
        best = {name for name, (mean, _) in values.items() if mean >= least}
        return frozenset(best) if len(best) < len(values) else frozenset()


@dataclass(frozen=True)
class Comparison:
    """A chart of several subjects, with an estimate per point.

    Attributes:
      chart: chart of the first subject, for names and labels.
      is_bars: whether x values are names.
      series: names of all series, in order of appearance.
      points: estimates by subject, series and x, in order of appearance.
    """

    chart: Chart
    is_bars: bool
    series: tuple[str, ...]
    points: Mapping[str, Mapping[str, Mapping[Real | str, Estimate]]]


def check_subjects(subjects: FindingsBySubject) -> None:
    """Raises ValueError without subjects or runs, or if a run has a finding twice."""
    if not subjects:
        raise ValueError("a report needs at least one subject")
    for name, runs in subjects.items():
        if not runs:
            raise ValueError(f"subject {name!r} has no runs; a report needs at least one")
    seen = set()
    for name, run, finding in each_finding(subjects):
        key = name, run, type(finding), *_key(finding)
        if key in seen:
            raise ValueError(
                f"subject {name!r}, run {run} has two findings for {', '.join(_key(finding))}"
            )
        seen.add(key)


def tasks_of(subjects: FindingsBySubject) -> list[str]:
    """The tasks with results, in order of appearance."""
    results = (each for _, _, each in each_finding(subjects) if not isinstance(each, Failure))
    return list(dict.fromkeys(finding.task for finding in results))


def failures_of(
    subjects: FindingsBySubject, seeds: Mapping[str, Sequence[int]] | None = None
) -> list[tuple[str, Failure]]:
    """The tasks that failed, each with its subject; with its run, too, where it has several.

    Args:
      subjects: the findings.
      seeds: seeds by subject where they are known.
    """

    def name_of(subject: str, run: int) -> str:
        known = (seeds or {}).get(subject, ())
        count = max(len(subjects[subject]), len(known))
        seed = f" (seed {known[run]})" if known else ""
        return subject if count == 1 else f"{subject}, run {run + 1} of {count}{seed}"

    return [
        (name_of(subject, run), each)
        for subject, run, each in each_finding(subjects)
        if isinstance(each, Failure)
    ]


def rows_of(subjects: FindingsBySubject, task: str) -> list[Row]:
    """The scores of a task, in order of appearance.

    Raises:
      ValueError: If `higher_is_better` differs between subjects.
    """
    return [_row(by_subject) for by_subject in _matched(subjects, task, Score)]


def charts_of(subjects: FindingsBySubject, task: str) -> list[Comparison]:
    """The charts of a task, in order of appearance."""
    return [
        _comparison({name: list(of_runs.values()) for name, of_runs in by_subject.items()})
        for by_subject in _matched(subjects, task, Chart)
    ]


def galleries_of(subjects: FindingsBySubject, task: str) -> list[Mapping[str, Gallery]]:
    """The galleries of a task by subject, from the first seed that has one."""
    return [
        {subject: next(iter(of_runs.values())) for subject, of_runs in by_subject.items()}
        for by_subject in _matched(subjects, task, Gallery)
    ]


def _matched(
    subjects: FindingsBySubject, task: str, kind: type[Kind]
) -> list[Mapping[str, Mapping[int, Kind]]]:
    """Groups findings of the same name, by subject and the place of the run."""
    matched: dict[tuple[str, ...], dict[str, dict[int, Kind]]] = {}
    for subject, run, finding in each_finding(subjects):
        if isinstance(finding, kind) and finding.task == task:
            matched.setdefault(_key(finding), {}).setdefault(subject, {})[run] = finding
    return list(matched.values())


def each_finding(subjects: FindingsBySubject) -> Iterator[tuple[str, int, Finding]]:
    """Yields every finding with its subject and the place of its run."""
    for subject, runs in subjects.items():
        for run, findings in enumerate(runs):
            for finding in findings:
                yield subject, run, finding


def _key(finding: Finding) -> tuple[str, ...]:
    names = {Score: "metric", Failure: "reason"}
    return finding.task, finding.dataset, getattr(finding, names.get(type(finding), "title"))


def _row(by_subject: Mapping[str, Mapping[int, Score]]) -> Row:
    first = next(score for scores in by_subject.values() for score in scores.values())
    for subject, scores in by_subject.items():
        for score in scores.values():
            if score.higher_is_better != first.higher_is_better:
                raise ValueError(
                    f"higher_is_better of {', '.join(_key(score))} is {score.higher_is_better} "
                    f"for {subject!r} and {first.higher_is_better} for {next(iter(by_subject))!r}"
                )
    estimates = {subject: _estimate(scores) for subject, scores in by_subject.items()}
    return Row(first.task, first.dataset, first.metric, first.higher_is_better, estimates)


def _estimate(scores: Mapping[int, Score]) -> Estimate:
    own = next(iter(scores.values())).interval
    values = tuple(float(score.value) for score in scores.values())
    return Estimate(values, None if own is None else float(own), tuple(scores))


def _comparison(by_subject: Mapping[str, Sequence[Chart]]) -> Comparison:
    charts = [chart for of_subject in by_subject.values() for chart in of_subject]
    series = tuple(dict.fromkeys(name for chart in charts for name in chart.series))
    points = {
        subject: {name: _points(of_subject, name) for name in series}
        for subject, of_subject in by_subject.items()
    }
    return Comparison(charts[0], any(chart.is_bars for chart in charts), series, points)


def _points(charts: Sequence[Chart], series: str) -> dict[Real | str, Estimate]:
    values: dict[Real | str, list[float]] = {}
    for chart in charts:
        for x, y in chart.series.get(series, ()):
            values.setdefault(x, []).append(float(y))
    return {x: Estimate(tuple(of_x)) for x, of_x in values.items()}


def _width(estimate: Estimate) -> float:
    """Half the interval; zero if unknown."""
    interval = estimate.interval
    return 0.0 if interval is None or math.isnan(interval) else interval
