"""Linear evaluation: logistic regression on frozen features, over many penalties."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from cassle_jax.checks import check_one_of
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Chart, Finding, Score, missed_optima
from cassle_jax.evaluation.memory import check_memory
from cassle_jax.evaluation.needs import Needs
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Settings
from cassle_jax.solvers.logistic import check_rows, fit_logistic, logistic_bytes

PENALTIES = np.logspace(-6, 5, 45)

Split = tuple[Float[np.ndarray, "_ _"], Int[np.ndarray, " _"]]


@dataclass(frozen=True)
class LinearResult:
    """Accuracies of linear evaluation.

    Attributes:
      penalty: The w that did best on the validation rows.
      penalties: All values of w tried.
      val_accuracy: The chosen metric on the validation rows, per penalty, fitted to the training
        rows.
      converged: Whether each of these fits, and at the end the fit to both splits, reached its
        optimum.
      test_accuracy: Share of the test rows classified correctly, fitted to both splits.
      test_class_average: The mean of that share over the classes of the test rows.
      weights: Weights fitted to both splits with the best w.
      biases: Biases of that fit.
    """

    penalty: float
    penalties: Float64[np.ndarray, " penalties"]
    val_accuracy: Float64[np.ndarray, " penalties"]
    converged: Bool[np.ndarray, " fits"]
    test_accuracy: float
    test_class_average: float
    weights: Float64[np.ndarray, "classes features"]
    biases: Float64[np.ndarray, " classes"]

    def findings(self, dataset: str, metric: str = "accuracy") -> list[Finding]:
        """Test accuracies, the dataset's metric first, and the validation curve over penalties."""
        values = {"accuracy": self.test_accuracy, "mean per class": self.test_class_average}
        names = sorted(values, key=lambda name: name != metric.replace("_", " "))
        shown = "Accuracy of the validation rows", metric.replace("_", " ")
        curve = penalty_chart(PROTOCOL.name, dataset, *shown, self.penalties, self.val_accuracy)
        scores = [Score(PROTOCOL.name, dataset, name, values[name]) for name in names]
        return [*scores, missed_optima(PROTOCOL.name, dataset, self.converged), curve]


def penalty_chart(
    task: str, dataset: str, title: str, metric: str, penalties: np.ndarray, values: np.ndarray
) -> Chart:
    """A chart of the validation rows' score over the penalties."""
    points = tuple(zip(np.log10(penalties).tolist(), values.tolist(), strict=True))
    return Chart(task, dataset, title, "log10 of the penalty w", metric, {"validation": points})


def linear_evaluation(
    train: Split,
    val: Split,
    test: Split,
    *,
    classes: int,
    penalties: Sequence[float] | np.ndarray = PENALTIES,
    metric: str = "accuracy",
) -> LinearResult:
    """The CASSLE paper's linear evaluation: choose w on validation rows, refit to both, then test.

    Features are used as they are. Ties between penalties go to the first: with `PENALTIES` the
    smallest, as in the published code.

    Args:
      train: Features and labels (from 0) of the rows to fit.
      val: Features and labels of the rows that choose the penalty.
      test: Features and labels of the rows that the accuracies are reported for.
      classes: Number of classes.
      penalties: The values of w to try.
      metric: The metric compared on the validation rows: "accuracy", the share of rows classified
        correctly, or "mean_per_class", the mean of that share over the classes (the paper's for
        Pets, Caltech-101, Flowers and Aircraft).

    Returns:
      The accuracies, in [0, 1], the chosen penalty and the fit that was tested.

    Raises:
      ValueError: If a split is empty, has another width than the training rows, is not finite or
        has labels outside the classes; if there are fewer than two classes or the training rows
        hold one only; or if a penalty or the metric is not a valid one.
    """
    check_one_of("metric", metric, ("accuracy", "mean_per_class"))
    width = train[0].shape[1]
    for name, split in (("train", train), ("val", val), ("test", test)):
        check_rows(name, *split, classes)
        if split[0].shape[1] != width:
            raise ValueError(f"{name} has {split[0].shape[1]} features; train has {width}")

    path = fit_logistic(*train, classes, penalties)
    # One accuracy per penalty; argmax takes the first of equal ones.
    val_accuracy = np.array(
        [_accuracies(predicted, val[1])[metric] for predicted in path.predict(val[0])]
    )
    best = int(np.argmax(val_accuracy))

    both = [np.concatenate(parts) for parts in zip(train, val, strict=True)]
    start = path.weights[best], path.biases[best]
    refit = fit_logistic(*both, classes, path.penalties[best : best + 1], start=start)
    tested = _accuracies(refit.predict(test[0])[0], test[1])
    return LinearResult(
        penalty=float(path.penalties[best]),
        penalties=path.penalties,
        val_accuracy=val_accuracy,
        converged=np.append(path.converged, refit.converged),
        test_accuracy=tested["accuracy"],
        test_class_average=tested["mean_per_class"],
        weights=refit.weights[0],
        biases=refit.biases[0],
    )


def _accuracies(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The share of rows classified correctly, and its mean over the classes that occur."""
    right = predicted == labels
    counts = np.bincount(labels)
    occurs = counts > 0
    shares = np.bincount(labels, weights=right)[occurs] / counts[occurs]
    return {"accuracy": float(right.mean()), "mean_per_class": float(shares.mean())}


NEEDS = Needs(train=2, val=1, labels=True)


def check_linear_memory(bench: Bench, *, copies: int = 1) -> None:
    """Raises DataError where this machine's memory cannot hold the fits; see `check_memory`."""
    check_memory(bench, partial(logistic_bytes, classes=bench.data.classes), copies=copies)


def _run(bench: Bench, _: Settings) -> list[Finding]:
    check_linear_memory(bench, copies=10 if bench.data.ten_crops else 1)
    parts = [(part.features, part.labels) for part in bench.cropped()]
    metric = bench.data.metric
    result = linear_evaluation(*parts, classes=bench.data.classes, metric=metric)
    return result.findings(bench.data.name, metric)


PROTOCOL = Protocol(
    "linear",
    title="Linear evaluation",
    takes=("classification",),
    needs=NEEDS,
    run=_run,
)
