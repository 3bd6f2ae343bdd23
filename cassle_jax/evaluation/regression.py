"""Regression of landmarks and poses: linear in frozen features, by absolute error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64

from cassle_jax.checks import check_one_of
from cassle_jax.data.landmarks import TargetSource
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Finding, Score, missed_optima
from cassle_jax.evaluation.linear import PENALTIES, penalty_chart
from cassle_jax.evaluation.memory import check_memory
from cassle_jax.evaluation.needs import Needs
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Settings
from cassle_jax.evaluation.store import Features
from cassle_jax.solvers.absolute_error import absolute_bytes, check_rows, fit_absolute

Split = tuple[Float[np.ndarray, "_ _"], Float[np.ndarray, "_ _"]]

METRICS = ("r2", "r2_pooled")


@dataclass(frozen=True)
class RegressionResult:
    """R² of the regression.

    Attributes:
      metric: The metric compared on the validation rows.
      penalty: The w that did best there.
      penalties: All values of w tried.
      val_score: That metric on the validation rows, per penalty, fitted to the training rows.
      converged: Whether each of these fits, and at the end the fit to both splits, reached its
        optimum.
      test_r2: R² of the test rows, the mean over the targets, fitted to both splits.
      test_r2_pooled: The squared correlation of all test predictions with all test targets.
      weights: Weights fitted to both splits with the best w.
      biases: Biases of that fit.
    """

    metric: str
    penalty: float
    penalties: Float64[np.ndarray, " penalties"]
    val_score: Float64[np.ndarray, " penalties"]
    converged: Bool[np.ndarray, " fits"]
    test_r2: float
    test_r2_pooled: float
    weights: Float32[np.ndarray, "targets features"]
    biases: Float32[np.ndarray, " targets"]

    def findings(self, dataset: str) -> list[Finding]:
        """Both R² of the test rows, and the validation curve over the penalties."""
        shown = "R² of the validation rows", "R²" if self.metric == "r2" else "R² pooled"
        return [
            Score(PROTOCOL.name, dataset, "R²", self.test_r2),
            Score(PROTOCOL.name, dataset, "R² pooled", self.test_r2_pooled),
            missed_optima(PROTOCOL.name, dataset, self.converged),
            penalty_chart(PROTOCOL.name, dataset, *shown, self.penalties, self.val_score),
        ]


def regression(
    train: Split,
    val: Split,
    test: Split,
    *,
    penalties: Sequence[float] | np.ndarray = PENALTIES,
    metric: str = "r2",
) -> RegressionResult:
    """The CASSLE paper's regression: choose w on validation rows, refit to both, then test.

    Features and targets are used as they are. Ties between penalties go to the first.

    Args:
      train: Features and targets of the rows to fit.
      val: Features and targets of the rows that choose the penalty.
      test: Features and targets of the rows that R² is reported for.
      penalties: The values of w to try.
      metric: The metric compared on the validation rows. "r2" is the mean over the targets of
        1 − Σ(y − ŷ)²/Σ(y − ȳ)². "r2_pooled" is the squared correlation of all predictions with all
        targets, as in the published code.

    Returns:
      Both R² of the test rows, the chosen penalty and the fit that was tested.

    Raises:
      ValueError: If a split is empty, has another width or number of targets than the training
        rows, or is not finite; if a target is the same in all rows of a split; or if a penalty or
        the metric is not a valid one.
    """
    check_one_of("metric", metric, METRICS)
    _check_splits({"train": train, "val": val, "test": test})
    path = fit_absolute(*train, penalties)
    score = {"r2": _r2, "r2_pooled": _r2_pooled}[metric]
    val_score = np.array([score(val[1], predicted) for predicted in path.predict(val[0])])
    best = int(np.argmax(val_score))
    both = [np.concatenate(parts) for parts in zip(train, val, strict=True)]
    refit = fit_absolute(*both, path.penalties[best : best + 1])
    predicted = refit.predict(test[0])[0]
    return RegressionResult(
        metric=metric,
        penalty=float(path.penalties[best]),
        penalties=path.penalties,
        val_score=val_score,
        converged=np.append(path.converged, refit.converged),
        test_r2=_r2(test[1], predicted),
        test_r2_pooled=_r2_pooled(test[1], predicted),
        weights=refit.weights[0],
        biases=refit.biases[0],
    )


def _check_splits(splits: Mapping[str, Split]) -> None:
    """Raises the errors of `regression` about its splits."""
    features, targets = splits["train"]
    for name, split in splits.items():
        check_rows(name, *split)
        if (split[0].shape[1:], split[1].shape[1:]) != (features.shape[1:], targets.shape[1:]):
            raise ValueError(
                f"{name} has features of shape {split[0].shape} and targets of shape "
                f"{split[1].shape}; train has {features.shape} and {targets.shape}"
            )
        constant = np.flatnonzero((split[1] == split[1][0]).all(axis=0))
        if len(constant):
            raise ValueError(
                f"{name} has the same value of target {constant[0]} in every row; R² needs two"
            )


def _r2(targets: np.ndarray, predicted: np.ndarray) -> float:
    from sklearn.metrics import r2_score  # commands start faster without scikit-learn

    return float(r2_score(targets, predicted))


def _r2_pooled(targets: np.ndarray, predicted: np.ndarray) -> float:
    """The squared correlation; 0 where it, or the spread of the predictions, is only rounding."""
    targets, predicted = targets.ravel().astype(np.float64), predicted.ravel().astype(np.float64)
    if np.ptp(predicted) <= 8 * np.finfo(np.float32).eps * np.abs(predicted).max():
        return 0.0
    targets, predicted = targets - targets.mean(), predicted - predicted.mean()
    products = targets * predicted
    if abs(np.sum(products)) <= len(products) * np.finfo(np.float64).eps * np.abs(products).sum():
        return 0.0
    return float(np.sum(products) ** 2 / (np.sum(targets**2) * np.sum(predicted**2)))


def _run(bench: Bench, _: Settings) -> list[Finding]:
    def split(part: Features, source: TargetSource) -> Split:
        return part.features, source.targets[part.places]

    data = bench.data
    check_memory(bench, absolute_bytes)
    parts = zip((*bench.fitted, bench.test), (data.train, data.val, data.test), strict=True)
    result = regression(*(split(*each) for each in parts))
    return result.findings(data.name)


PROTOCOL = Protocol(
    "regression",
    title="Regression",
    takes=("regression",),
    needs=Needs(train=2, val=2, test=2),
    run=_run,
)
