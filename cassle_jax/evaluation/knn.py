"""Classifies features by their nearest neighbours under cosine similarity."""

import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from cassle_jax.checks import check_at_least, check_finite
from cassle_jax.data.splits import rows_by_label
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Finding, Score
from cassle_jax.evaluation.needs import Needs
from cassle_jax.evaluation.neighbours import Parts, is_collapsed, nearest, parts_of
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Settings, setting

_VOTE_ROWS = 1024


@dataclass(frozen=True)
class KnnResult:
    """Accuracies of classification by nearest neighbours.

    Attributes:
      k: Number of neighbours that vote.
      accuracy: Share of the test rows classified correctly, in [0, 1].
      class_average: The mean of that share over the classes of the test rows.
    """

    k: int
    accuracy: float
    class_average: float

    def findings(self, dataset: str) -> list[Finding]:
        """Both accuracies; their names contain k unless it is 1."""
        scores = {"accuracy": self.accuracy, "mean per class": self.class_average}
        note = "" if self.k == 1 else f", k = {self.k}"
        return [
            Score(PROTOCOL.name, dataset, f"{name}{note}", value) for name, value in scores.items()
        ]


def knn_evaluation(
    train: tuple[Float[np.ndarray, "_ _"] | Parts, Int[np.ndarray, " _"]],
    test: tuple[Float[np.ndarray, "_ _"], Int[np.ndarray, " _"]],
    *,
    k: int = 1,
) -> KnnResult:
    """Classifies test rows by their neighbours among the training rows, as `knn_accuracy` does.

    Args:
      train: Features and labels (any integers) of the rows to search; the features of several
        parts may be in as many arrays.
      test: Features and labels of the rows to classify.
      k: Number of neighbours; the CASSLE paper uses 1.

    Returns:
      The accuracies over the rows and over the classes. A `UserWarning` says that the features have
      collapsed to one direction.

    Raises:
      ValueError: If a split has no rows, another number of labels, another width or a feature that
        is not finite; if the training rows are all of one class; or if ``k`` is out of range.
    """
    width = test[0].shape[-1]
    for name, (features, labels) in (("train", train), ("test", test)):
        for part in parts_of(features):
            if part.ndim != 2 or 0 in part.shape:
                raise ValueError(f"{name} has features of shape {part.shape}; use [rows, features]")
            if part.shape[1] != width:
                raise ValueError(f"test has {width} features; train has {part.shape[1]}")
        _check_labels(name, labels, features)
    if (train[1] == train[1][0]).all():
        raise ValueError(f"train has labels {train[1][0]} only; at least two classes must occur")
    right = _predict(*train, test[0], k) == test[1]
    shares = [right[rows].mean() for rows in rows_by_label(test[1]).values()]
    return KnnResult(k, float(right.mean()), float(np.mean(shares)))


def knn_accuracy(
    train_features: Float[Array | np.ndarray, "train features"],
    train_labels: Int[Array | np.ndarray, " train"],
    test_features: Float[Array | np.ndarray, "test features"],
    test_labels: Int[Array | np.ndarray, " test"],
    k: int = 1,
) -> float:
    """Share of test rows whose label wins the vote of the ``k`` most similar training rows.

    The search is exact and in float32. Similarity is the cosine; a row of zeros has similarity 0
    to everything. Among equally similar training rows the earlier one is the nearer. Every
    neighbour has one vote; among labels with equally many votes, the one with the nearest
    neighbour wins. The CASSLE paper uses ``k = 1``.

    Memory in addition to the features: see `nearest`.

    Args:
      train_features: Features of the rows to search, any scale.
      train_labels: Their labels, any integers.
      test_features: Features of the rows to classify.
      test_labels: Their labels.
      k: Number of neighbours, from 1 to the number of training rows.

    Returns:
      Accuracy in [0, 1]. A `UserWarning` says that the features have collapsed to one direction.

    Raises:
      ValueError: If ``k`` is out of range, there are no test rows, a split has another number of
        labels than rows, or a feature is not finite.
    """
    _check_labels("train", train_labels, train_features)
    _check_labels("test", test_labels, test_features)
    predicted = _predict(train_features, train_labels, test_features, k)
    return float(np.mean(predicted == np.asarray(test_labels)))


def _check_labels(name: str, labels: Array | np.ndarray, features) -> None:
    """Refuses labels that are not one per row, with which NumPy would compare every row."""
    rows = sum(map(len, parts_of(features)))
    if np.shape(labels) != (rows,):
        raise ValueError(f"{name} has labels of shape {np.shape(labels)} for {rows} rows")


def _predict(train_features, train_labels, test_features, k: int) -> Shaped[np.ndarray, " test"]:
    """The label each test row's k nearest training rows vote for."""
    parts = [np.asarray(part, np.float32) for part in parts_of(train_features)]
    test_features = np.asarray(test_features, np.float32)
    rows = sum(map(len, parts))
    if not 1 <= k <= rows:
        raise ValueError(f"k={k} is not from 1 to the number of training rows, {rows}")
    if len(test_features) == 0:
        raise ValueError("test_features has no rows")
    for name, arrays in (("train_features", parts), ("test_features", [test_features])):
        for array in arrays:
            check_finite(name, array)
    if is_collapsed([*parts, test_features]):
        warnings.warn(
            "k-NN: all features have one direction, as those of a collapsed encoder; rounding and "
            "the order of the images decide the accuracy",
            stacklevel=3,
        )
    classes, labels = np.unique(np.asarray(train_labels), return_inverse=True)
    votes = labels.astype(np.int32)[nearest(test_features, parts, k).rows]
    winners = [
        np.asarray(_winner(jnp.asarray(votes[first : first + _VOTE_ROWS])))
        for first in range(0, len(votes), _VOTE_ROWS)
    ]
    return classes[np.concatenate(winners)]


@jax.jit
def _winner(votes: Int[Array, "test k"]) -> Int[Array, " test"]:
    """Majority vote per row, votes from the nearest neighbour on; ties go to the nearer neighbour.

    Compares every vote with every other, which for many classes is less than counting per class.
    """
    counts = jnp.sum(votes[:, :, None] == votes[:, None, :], axis=2)
    return jnp.take_along_axis(votes, jnp.argmax(counts, axis=1)[:, None], axis=1)[:, 0]


@dataclass(frozen=True)
class KnnSettings(Settings):
    """Settings of the protocol."""

    neighbours: int = setting(1, "Number of neighbours that vote, k.")

    def __post_init__(self):
        check_at_least("neighbours", self.neighbours, 1)


def _run(bench: Bench, settings: KnnSettings) -> list[Finding]:
    train = [part.features for part in bench.fitted]
    labels = np.concatenate([part.labels for part in bench.fitted])
    test = (bench.test.features, bench.test.labels)
    result = knn_evaluation((train, labels), test, k=settings.neighbours)
    return result.findings(bench.data.name)


PROTOCOL = Protocol(
    "knn",
    title="k-NN",
    takes=("classification",),
    needs=lambda settings, _: Needs(labels=True, neighbours=settings.neighbours),
    settings=KnnSettings,
    run=_run,
)
