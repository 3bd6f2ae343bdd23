"""Ridge regression on all products of two inputs, by a kernel; penalties chosen by validation."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

PENALTIES = tuple(np.logspace(2, -5, 8))

Rows = Float[np.ndarray, "_ _"]
Blocks = Sequence[Rows]
Targets = Mapping[str, Rows]


def fit_quadratic(
    train: tuple[Blocks, Targets],
    val: tuple[Blocks, Targets],
    penalties: Sequence[float] = PENALTIES,
) -> Callable[[Blocks], dict[str, Rows]]:
    """Fits targets by polynomials of degree 2, with the kernel (1 + Σ ⟨a, b⟩ / width)² over blocks.

    Columns are standardised with the training rows. Every block has the same weight, whatever its
    width. Each target takes the penalty with the least squared error on the validation rows (ties
    go to the first), and is then fitted to both parts. Time grows with the cube of the rows, memory
    with their square.

    Args:
      train: blocks of inputs and targets by name, one row per example.
      val: likewise, of the rows that choose the penalties.
      penalties: the penalties to try, above 0, in units of the mean loss.

    Returns:
      A function from blocks to the predicted targets, by name.
    """
    scaled = _scaling(train[0])
    rows, val_rows = scaled(train[0]), scaled(val[0])
    kernel, across = _kernel(rows, rows), _kernel(val_rows, rows)
    tried = {each: _predictor(kernel, train[1], each)(across) for each in penalties}
    both = np.concatenate([rows, val_rows])
    targets = {name: np.concatenate([each, val[1][name]]) for name, each in train[1].items()}
    best: dict[float, list[str]] = {}
    for name, wanted in val[1].items():
        errors = [np.sum((answers[name] - wanted) ** 2) for answers in tried.values()]
        best.setdefault(penalties[int(np.argmin(errors))], []).append(name)
    kernel = _kernel(both, both)
    fits = [
        _predictor(kernel, {name: targets[name] for name in names}, penalty)
        for penalty, names in best.items()
    ]

    def predict(blocks: Blocks) -> dict[str, Rows]:
        across = _kernel(scaled(blocks), both)
        found = {name: each for fit in fits for name, each in fit(across).items()}
        return {name: found[name] for name in targets}

    return predict


def _scaling(blocks: Blocks) -> Callable[[Blocks], Rows]:
    """Standardises the columns of all blocks, and puts each over the root of its block's width."""
    columns = np.concatenate(blocks, axis=1)
    widths = np.concatenate([np.full(each.shape[1], each.shape[1]) for each in blocks])
    centre, deviation = columns.mean(axis=0), columns.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1) * np.sqrt(widths)
    return lambda others: (np.concatenate(others, axis=1) - centre) / scale


def _kernel(first: Rows, second: Rows) -> Rows:
    return (1 + first @ second.T) ** 2


def _predictor(kernel: Rows, targets: Targets, penalty: float) -> Callable[[Rows], dict[str, Rows]]:
    """A ridge regression, as a function of the kernel between other rows and the fitted ones."""
    from sklearn.kernel_ridge import KernelRidge  # commands start faster without scikit-learn

    together = np.concatenate(list(targets.values()), axis=1)
    ends = np.cumsum([each.shape[1] for each in targets.values()])[:-1]
    mean = together.mean(axis=0)
    ridge = KernelRidge(alpha=penalty * len(kernel), kernel="precomputed")
    ridge.fit(kernel, together - mean)

    def predict(across: Rows) -> dict[str, Rows]:
        found = np.split(ridge.predict(across) + mean, ends, axis=1)
        return dict(zip(targets, found, strict=True))

    return predict
