"""Linear evaluation over random splits, for small datasets, where one split is mostly noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cassle_jax.data.splits import rows_by_label
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Finding, Score, half_interval, missed_optima
from cassle_jax.evaluation.linear import (
    NEEDS,
    PENALTIES,
    Split,
    check_linear_memory,
    linear_evaluation,
)
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Seeded


@dataclass(frozen=True)
class ResampledResult:
    """Accuracies of linear evaluation on every split.

    Attributes:
      accuracies: accuracies on the test rows, in the dataset's metric, one per split.
      converged: whether every fit of a split reached its optimum.
    """

    accuracies: tuple[float, ...]
    converged: tuple[bool, ...]

    def findings(self, dataset: str, metric: str) -> list[Finding]:
        """The mean over the splits, and half its 95 % interval: over splits, not over seeds."""
        mean, half = float(np.mean(self.accuracies)), half_interval(self.accuracies)
        score = Score(PROTOCOL.name, dataset, metric.replace("_", " "), mean, half)
        return [score, missed_optima(PROTOCOL.name, dataset, np.array(self.converged))]


def resampled_linear_evaluation(
    parts: Sequence[Split],
    *,
    classes: int,
    penalties: Sequence[float] | np.ndarray = PENALTIES,
    metric: str = "accuracy",
    splits: int = 5,
    seed: int = 0,
) -> ResampledResult:
    """Linear evaluation on random splits of all rows, in the proportions of the given parts.

    Each class is shuffled and cut in these proportions, so a part holds the same share of every
    class, or nearly so. The splits depend on the labels and the seed alone, so all encoders get the
    same ones.

    Args:
      parts: features and labels (from 0) of the training, validation and test rows.
      classes: number of classes.
      penalties: the values of w to try.
      metric: `accuracy` or `mean_per_class`, as for `linear_evaluation`.
      splits: number of splits, 2 or more.
      seed: seed of the splits.

    Raises:
      ValueError: fewer than 2 splits, or an error of `linear_evaluation`.
    """
    if splits < 2:
        raise ValueError(f"splits={splits} gives no interval; use 2 or more")
    features, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    shares = np.cumsum([len(part[1]) for part in parts]) / len(labels)
    results = []
    for split in range(splits):
        places = split_by_class(labels, shares[:-1], np.random.default_rng([seed, split]))
        drawn = [(features[rows], labels[rows]) for rows in places]
        results.append(
            linear_evaluation(*drawn, classes=classes, penalties=penalties, metric=metric)
        )
    accuracy = "test_accuracy" if metric == "accuracy" else "test_class_average"
    return ResampledResult(
        tuple(float(getattr(result, accuracy)) for result in results),
        tuple(bool(result.converged.all()) for result in results),
    )


def split_by_class(
    labels: Int[np.ndarray, " rows"],
    cuts: Float[np.ndarray, " cuts"],
    generator: np.random.Generator,
) -> list[Int[np.ndarray, " part"]]:
    """The rows of every part: each class shuffled and cut at the given shares.

    Chance decides which part has one row more or less of a class that does not divide evenly. The
    parts have their shares of all rows, even where every class has only a few; a class of few rows
    may be absent from a part.
    """
    shuffled = [generator.permutation(rows) for rows in rows_by_label(labels).values()]
    offsets = generator.random(len(shuffled))
    places = [
        (np.arange(len(rows)) + offset) / len(rows)
        for rows, offset in zip(shuffled, offsets, strict=True)
    ]
    rows, ranks = np.concatenate(shuffled), np.argsort(np.argsort(np.concatenate(places)))
    part_of = np.searchsorted(np.rint(cuts * len(rows)), ranks, side="right")
    return [rows[part_of == part] for part in range(len(cuts) + 1)]


def _run(bench: Bench, settings: Seeded) -> list[Finding]:
    check_linear_memory(bench)
    parts = [(part.features, part.labels) for part in (*bench.fitted, bench.test)]
    metric = bench.data.metric
    result = resampled_linear_evaluation(
        parts, classes=bench.data.classes, metric=metric, seed=settings.seed
    )
    return result.findings(bench.data.name, metric)


PROTOCOL = Protocol(
    "linear_resampled",
    title="Linear evaluation on random splits",
    takes=("classification",),
    usual=(),
    needs=NEEDS,
    settings=Seeded,
    run=_run,
)
