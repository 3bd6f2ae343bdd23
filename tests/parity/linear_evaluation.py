"""Linear evaluation against the published sweep of L-BFGS, which stops short of some optima."""

import numpy as np

from cassle_jax.evaluation.linear import linear_evaluation
from cassle_jax.solvers.logistic import fit_logistic
from tests.parity.comparison import Comparison, difference
from tests.parity.golden_file import GoldenFile

BOUND = 1e-4


def compare_linear_evaluation(golden: GoldenFile, comparison: Comparison) -> None:
    splits = {
        name: (golden[f"{name}_features"], golden[f"{name}_labels"])
        for name in ("train", "val", "test")
    }
    classes = len(golden["refit_bias"])

    path = fit_logistic(*splits["train"], classes, golden["penalties"])
    objectives = [
        _objective(weights, bias, *splits["train"], penalty)
        for weights, bias, penalty in zip(path.weights, path.biases, path.penalties, strict=True)
    ]
    # Lower than the golden one is better still.
    excess = difference(objectives, golden, "train_objective") / golden["train_objective"]
    comparison.within("objective above", excess.max(), BOUND, "train_objective")

    result = linear_evaluation(
        **splits, classes=classes, penalties=np.atleast_1d(golden["best_penalty"])
    )
    count = len(splits["test"][1])
    examples = np.rint(count * golden["test_accuracy"]) - np.rint(count * result.test_accuracy)
    comparison.within("test examples", abs(examples), 1, "test_accuracy")
    # What follows from how far each of the published fits came.
    golden.leave("val_accuracy", "test_class_average", "refit_weight")


def _objective(weights, bias, features, labels, penalty):
    """Σ cross-entropy + w·‖θ‖², as it is written, in float64."""
    logits = features.astype(np.float64) @ weights.T + bias
    logits -= np.take_along_axis(logits, labels[:, None], axis=1)
    squares = sum(np.sum(np.square(part, dtype=np.float64)) for part in (weights, bias))
    return np.log(np.exp(logits).sum(axis=1)).sum() + penalty * squares
