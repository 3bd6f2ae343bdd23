"""Puts findings side by side: a mean over the seeds of each subject, and which is the best."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeVar

import numpy as np

from cassle_jax.evaluation.findings import Chart, Finding, Gallery, Score, half_interval

Subjects = Mapping[str, Sequence[Sequence[Finding]]]
Kind = TypeVar("Kind", Score, Chart, Gallery)


@dataclass(frozen=True)
class Estimate:
    """A value over the seeds of a subject.

    Attributes:
      values: one a seed, in the order of the seeds that have it.
      own_interval: what a protocol says of its only value; not for several.
    """

    values: tuple[float, ...]
    own_interval: float | None = None

    @property
    def mean(self) -> float:
        """Over the seeds; NaN where one of them is."""
        return float(np.mean(self.values))

    @property
    def interval(self) -> float | None:
        """Half the 95 % interval of the mean: Student's t over seeds, or the protocol's own."""
        return self.own_interval if len(self.values) == 1 else half_interval(self.values)

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest value; NaN where one is."""
        return float(np.min(self.values)), float(np.max(self.values))


@dataclass(frozen=True)
class Row:
    """A number of a protocol on a dataset, of every subject that has it.

    Attributes:
      task: the protocol.
      dataset: by its name.
      metric: by its name.
      higher_is_better: or lower, or neither (`None`).
      estimates: by subject.
    """

    task: str
    dataset: str
    metric: str
    higher_is_better: bool | None
    estimates: Mapping[str, Estimate]

    @property
    def best(self) -> frozenset[str]:
        """The best subject, all whose intervals overlap its own, and all that lie between them.

        Nobody, where that is everyone with a value, or where neither higher nor lower is better.
        An interval that is not known counts as zero.
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
    """A chart of several subjects, with what was found of every point.

    Attributes:
      chart: the first of them, for its names and labels.
      is_bars: whether x are names.
      series: the names of all series, in the order they came.
      points: of every subject that has the chart, by series, by x, in the order they came.
    """

    chart: Chart
    is_bars: bool
    series: tuple[str, ...]
    points: Mapping[str, Mapping[str, Mapping[Real | str, Estimate]]]


def check_subjects(subjects: Subjects) -> None:
    """Raises ValueError if there is nothing to compare or a subject says something twice."""
    if not subjects:
        raise ValueError("a report needs at least one subject")
    for name, runs in subjects.items():
        if not runs:
            raise ValueError(f"subject {name!r} has no runs; a report needs one at least")
        for seed, findings in enumerate(runs):
            seen = set()
            for finding in findings:
                key = (type(finding), *_key(finding))
                if key in seen:
                    raise ValueError(
                        f"subject {name!r}, run {seed} has two findings for {', '.join(key[1:])}"
                    )
                seen.add(key)


def tasks_of(subjects: Subjects) -> list[str]:
    """The protocols, in the order they came."""
    return list(dict.fromkeys(finding.task for _, _, finding in _each(subjects)))


def rows_of(subjects: Subjects, task: str) -> list[Row]:
    """The scores of a protocol, in the order they came.

    Raises:
      ValueError: If two subjects do not agree on whether higher is better.
    """
    return [_row(by_subject) for by_subject in _matched(subjects, task, Score)]


def charts_of(subjects: Subjects, task: str) -> list[Comparison]:
    """The charts of a protocol, in the order they came."""
    return [_comparison(by_subject) for by_subject in _matched(subjects, task, Chart)]


def galleries_of(subjects: Subjects, task: str) -> list[Mapping[str, Gallery]]:
    """The galleries of a protocol by subject, of the first of its seeds that has one."""
    return [
        {subject: galleries[0] for subject, galleries in by_subject.items()}
        for by_subject in _matched(subjects, task, Gallery)
    ]


def _matched(subjects: Subjects, task: str, kind: type[Kind]) -> list[Mapping[str, list[Kind]]]:
    """Findings of the same name, each by subject, one a seed."""
    found: dict[tuple[str, ...], dict[str, list[Kind]]] = {}
    for subject, _, finding in _each(subjects):
        if isinstance(finding, kind) and finding.task == task:
            found.setdefault(_key(finding), {}).setdefault(subject, []).append(finding)
    return list(found.values())


def _each(subjects: Subjects) -> Iterator[tuple[str, int, Finding]]:
    """Every finding with its subject and the number of its seed."""
    for subject, runs in subjects.items():
        for seed, findings in enumerate(runs):
            for finding in findings:
                yield subject, seed, finding


def _key(finding: Finding) -> tuple[str, ...]:
    what = finding.metric if isinstance(finding, Score) else finding.title
    return finding.task, finding.dataset, what


def _row(by_subject: Mapping[str, Sequence[Score]]) -> Row:
    first = next(iter(by_subject.values()))[0]
    for subject, scores in by_subject.items():
        for score in scores:
            if score.higher_is_better != first.higher_is_better:
                raise ValueError(
                    f"higher_is_better of {', '.join(_key(score))} is {score.higher_is_better} "
                    f"of {subject!r} and {first.higher_is_better} of {next(iter(by_subject))!r}"
                )
    estimates = {
        subject: Estimate(
            tuple(float(score.value) for score in scores),
            None if scores[0].interval is None else float(scores[0].interval),
        )
        for subject, scores in by_subject.items()
    }
    return Row(first.task, first.dataset, first.metric, first.higher_is_better, estimates)


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
    """Half the interval, zero where it is not known."""
    interval = estimate.interval
    return 0.0 if interval is None or math.isnan(interval) else interval
