"""Times the 45 penalties of linear evaluation on synthetic features, ours and the published way.

python -m benchmarks.linear_evaluation

The published way needs PyTorch. It fits one penalty after the other, from the smallest up, with
float32 L-BFGS and a strong Wolfe line search, and starts from the previous solution.
"""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags

from benchmarks.contest import Contender, Row, contest
from benchmarks.rivals.published import torch_device
from benchmarks.workload import Workload
from cassle_jax import command
from cassle_jax.checks import check_at_least
from cassle_jax.evaluation.linear import PENALTIES
from cassle_jax.solvers.logistic import fit_logistic

SIZES = (8000, 512, 10)  # CIFAR-10's rows, ResNet-18's features, classes


def measure(work: Workload) -> list[Row]:
    """Measures penalties/s; ours converges for all, the published way stalls at some."""
    features, labels = synthetic_features(*SIZES)

    def ours():
        return fit_logistic(features, labels, SIZES[2], PENALTIES)

    def published():
        published_sweep(features, labels, SIZES[2], PENALTIES[-1:])  # loads the device's libraries
        return lambda: published_sweep(features, labels, SIZES[2])

    converged = ours().converged
    contenders = [
        Contender(f"cassle_jax: {converged.sum()} of {len(PENALTIES)} converged", lambda: ours),
        Contender("PyTorch, published: one after the other", published),
    ]
    rounds = min(3, work.rounds)
    return contest("linear evaluation", "penalties/s", len(PENALTIES), contenders, rounds)


def synthetic_features(rows: int, features: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rectified features with an encoder's decaying spectrum, and overlapping classes.

    Classes are equally large. There must be at least as many features as classes.
    """
    random = np.random.default_rng(0)
    labels = random.permutation(np.arange(rows) % classes)
    factors = random.standard_normal((rows, features)) / np.sqrt(1 + np.arange(features))
    factors[:, :classes] += 0.5 * np.eye(classes)[labels]
    mixing = random.standard_normal((features, features))
    return np.maximum(factors @ mixing, 0).astype(np.float32), labels


def published_sweep(
    features: np.ndarray, labels: np.ndarray, classes: int, penalties: Sequence[float] = PENALTIES
) -> np.ndarray:
    """Final objectives of L-BFGS, per penalty."""
    import torch

    device = torch_device()
    inputs, targets = torch.from_numpy(features).to(device), torch.from_numpy(labels).to(device)
    classifier = torch.nn.Linear(features.shape[1], classes).to(inputs.device)

    def objective(penalty):
        loss = torch.nn.functional.cross_entropy(classifier(inputs), targets, reduction="sum")
        return loss + penalty * sum(p.square().sum() for p in classifier.parameters())

    def fit(penalty):
        optimizer = torch.optim.LBFGS(
            classifier.parameters(),
            max_iter=5000,
            tolerance_grad=1e-10,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            loss = objective(penalty)
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            return objective(penalty).item()

    return np.array([fit(penalty) for penalty in penalties])


def timed(function: Callable) -> tuple[float, object]:
    """Seconds of a call, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main() -> None:
    """Prints a table: seconds, penalties within 1e-4 of the best objective seen, and the ratio."""
    check_at_least("features", FEATURES.value, 2)
    check_at_least("classes", CLASSES.value, 2, most=FEATURES.value)
    check_at_least("rows", ROWS.value, CLASSES.value)
    features, labels = synthetic_features(ROWS.value, FEATURES.value, CLASSES.value)

    def sweep():
        return fit_logistic(features, labels, CLASSES.value, PENALTIES).objectives

    rows = [("first, with compilation", *timed(sweep)), ("again", *timed(sweep))]
    if PUBLISHED.value:
        arguments = features, labels, CLASSES.value
        rows.append(("published", *timed(lambda: published_sweep(*arguments))))
    least = np.min([objectives for _, _, objectives in rows], axis=0)
    reference = rows[1][1]
    print(f"{features.shape[0]} × {features.shape[1]}, {CLASSES.value} classes, on ", end="")
    print(jax.devices()[0].device_kind)
    print(f"{'':26}{'seconds':>10}{'× again':>10}{'at the optimum':>18}")
    for name, seconds, objectives in rows:
        optimal = int(np.sum(objectives <= least * (1 + 1e-4)))
        print(f"{name:26}{seconds:10.2f}{seconds / reference:10.2f}{optimal:15d}/{len(PENALTIES)}")


if __name__ == "__main__":
    ROWS = flags.DEFINE_integer("rows", SIZES[0], "Rows to fit.")
    FEATURES = flags.DEFINE_integer("features", SIZES[1], "Features per row.")
    CLASSES = flags.DEFINE_integer("classes", SIZES[2], "Number of classes.")
    PUBLISHED = flags.DEFINE_boolean("published", True, "Also time the published way.")
    command.run(main)
