"""Regression of landmarks and poses: linear in frozen features, by absolute error, many penalties.

Every fit minimises Σ |y − θᵀx| + w·‖θ‖² over the weights and the bias θ of a target: a sum over the
rows, not a mean, and the bias is penalised like the weights. Targets share nothing but w.

The alternating direction method of multipliers solves all targets and several penalties together.
It splits the residuals from θ. A step is then a ridge regression, which on the features' principal
axes is a division, and a clipping of every row's residual. The penalties go from large to small;
each lot starts at the optimum before it.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int
from sklearn.metrics import r2_score

from cassle_jax.checks import check_at_least, check_one_of, check_positive
from cassle_jax.evaluation.findings import Chart, Finding, Score, missed_optima
from cassle_jax.evaluation.linear import PENALTIES, principal_axes

Split = tuple[Float[np.ndarray, "_ _"], Float[np.ndarray, "_ _"]]

METRICS = ("r2", "r2_pooled")

_TOLERANCE = 1e-4
_FLOOR = 1e-5
_RELAXATION = 1.7
_STRONGEST = 1e3
_STEPS_A_CHECK = 10
_TOGETHER = 9
_WORKING_BYTES = 2 << 30
# Arrays of problems × rows: targets, residuals three times, duals twice, and the clipped residuals.
_WORKING_ARRAYS = 7

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class AbsolutePath:
    """Regressions of the same rows by absolute error, one per penalty, in the requested order.

    Attributes:
      penalties: The values of w.
      weights: The weights, per penalty, target and feature.
      biases: The biases, per penalty and target.
      objectives: The objectives reached, Σ |y − θᵀx| + w·‖θ‖², per penalty and target.
      converged: Whether every target's objective is within about 1e-4 of its optimum.
    """

    penalties: Float64[np.ndarray, " penalties"]
    weights: Float32[np.ndarray, "penalties targets features"]
    biases: Float32[np.ndarray, "penalties targets"]
    objectives: Float64[np.ndarray, "penalties targets"]
    converged: Bool[np.ndarray, " penalties"]

    def predict(
        self, features: Float[np.ndarray, "rows features"]
    ) -> Float32[np.ndarray, "penalties rows targets"]:
        """Every target of every row, for each penalty."""
        products = features.astype(np.float32) @ self.weights.swapaxes(1, 2)
        return products + self.biases[:, None]


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
        exponents = np.log10(self.penalties).tolist()
        points = tuple(zip(exponents, self.val_score.tolist(), strict=True))
        return [
            Score("regression", dataset, "R²", self.test_r2),
            Score("regression", dataset, "R² pooled", self.test_r2_pooled),
            *missed_optima("regression", dataset, self.converged),
            Chart(
                "regression",
                dataset,
                "R² of the validation rows",
                "log10 of the penalty w",
                "R²" if self.metric == "r2" else "R² pooled",
                {"validation": points},
            ),
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
      metric: The metric compared on the validation rows: "r2", the mean over the targets of
        1 − Σ(y − ŷ)²/Σ(y − ȳ)², or "r2_pooled", the same of all targets together after a linear fit
        from predictions to targets, which is their squared correlation (as in the published code).

    Returns:
      Both R² of the test rows, the chosen penalty and the fit that was tested.

    Raises:
      ValueError: If a split is empty, has another width or number of targets than the training
        rows, or is not finite; if a target is the same in all rows of a split; or if a penalty or
        the metric is not a valid one.
    """
    check_one_of(METRICS, metric=metric)
    shape = train[0].shape[1:], train[1].shape[1:]
    for name, split in (("train", train), ("val", val), ("test", test)):
        _check_rows(name, *split)
        if (split[0].shape[1:], split[1].shape[1:]) != shape:
            raise ValueError(
                f"{name} has features of shape {split[0].shape} and targets of shape "
                f"{split[1].shape}; train has {train[0].shape} and {train[1].shape}"
            )
        constant = np.flatnonzero((split[1] == split[1][0]).all(axis=0))
        if len(constant):
            raise ValueError(
                f"{name} has the same value of target {constant[0]} in every row; R² needs two"
            )

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


def fit_absolute(
    features: Float[np.ndarray, "rows features"],
    targets: Float[np.ndarray, "_ targets"],
    penalties: Sequence[float] | np.ndarray,
    *,
    max_steps: int = 10_000,
) -> AbsolutePath:
    """Minimises Σ |y − θᵀx| + w·‖θ‖², weights and bias both in θ, for every target and penalty w.

    A step takes two products with the features. A few dozen steps are usual; it takes thousands
    where the penalty is tiny and there are more rows than features. A fit has converged when its
    duality gap is below 1e-4 of the objective, or below 1e-5 of the best constant's absolute error,
    which is about the resolution of float32. One part of the gap grows like 1/w; of it, only what a
    change of the predictions by twice the residuals' length can gain is counted.

    The device holds the features and, per penalty of a lot, seven numbers per row and target.

    Args:
      features: Any scale; used as they are.
      targets: Any scale.
      penalties: The values of w, each above 0, in any order.
      max_steps: Largest number of steps per lot of penalties, rounded up to tens.

    Returns:
      The solutions, in the order of `penalties`. A `UserWarning` names those that did not converge.

    Raises:
      ValueError: If there are no rows or targets, one of them is not finite, or a penalty or
        `max_steps` is not positive.
    """
    _check_rows("features", features, targets)
    penalties = np.asarray(penalties, np.float64)
    if penalties.ndim != 1 or penalties.size == 0:
        raise ValueError(f"penalties of shape {penalties.shape} must be a list of one or more")
    for penalty in penalties:
        check_positive(penalties=penalty)
    check_at_least(1, max_steps=max_steps)

    rotated, spectrum, axes = principal_axes(features)
    order = np.argsort(-penalties, kind="stable")
    lots = penalties[order].reshape(-1, _penalties_together(len(penalties), targets.size))
    solved = list(_solve_lots(rotated, spectrum, targets, lots, max_steps))
    places = np.argsort(order)
    thetas, objectives, done = (
        np.concatenate(parts)[places] for parts in zip(*solved, strict=True)
    )
    converged = done.all(axis=1)
    _warn_of(penalties[~converged])
    thetas = (thetas @ axes.T).astype(np.float32)
    return AbsolutePath(
        penalties, thetas[..., :-1], thetas[..., -1], objectives.astype(np.float64), converged
    )


def _solve_lots(
    rotated: Float64[np.ndarray, "rows axes"],
    spectrum: Float64[np.ndarray, " axes"],
    targets: Float[np.ndarray, "rows targets"],
    lots: Float64[np.ndarray, "lots together"],
    max_steps: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Solves lot after lot: θ, objectives and convergence, per penalty and target."""
    together = lots.shape[1]
    # All problems are on one axis: the penalties of the first target, then those of the next.
    repeated = jnp.repeat(jnp.asarray(targets.T, jnp.float32), together, axis=0)
    rotated, spectrum = (jnp.asarray(each, jnp.float32) for each in (rotated, spectrum))
    state = _start(repeated, spectrum)
    for penalties in lots:
        ridge = jnp.tile(jnp.asarray(2 * penalties, jnp.float32), targets.shape[1])
        state = _solve(rotated, repeated, spectrum, ridge, state, -(-max_steps // _STEPS_A_CHECK))
        yield tuple(
            np.asarray(part).reshape(-1, together, *part.shape[1:]).swapaxes(0, 1)
            for part in (state.thetas, state.objectives, state.done)
        )
        state = _restart(state, together)


def _check_rows(name: str, features: np.ndarray, targets: np.ndarray) -> None:
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"{name} has features of shape {features.shape}; rows × features is needed"
        )
    if targets.ndim != 2 or len(targets) != len(features) or targets.shape[1] == 0:
        raise ValueError(f"{name} has targets of shape {targets.shape} for {len(features)} rows")
    for what, values in (("features", features), ("targets", targets)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds {what} that are not finite")


def _r2(targets: np.ndarray, predicted: np.ndarray) -> float:
    return float(r2_score(targets, predicted))


def _r2_pooled(targets: np.ndarray, predicted: np.ndarray) -> float:
    """The squared correlation; 0 where the float32 predictions differ by rounding alone."""
    targets, predicted = targets.ravel().astype(np.float64), predicted.ravel().astype(np.float64)
    if np.ptp(predicted) <= 8 * np.finfo(np.float32).eps * np.abs(predicted).max():
        return 0.0
    targets, predicted = targets - targets.mean(), predicted - predicted.mean()
    scale = np.sum(targets**2) * np.sum(predicted**2)
    return float(np.sum(targets * predicted) ** 2 / scale) if scale > 0 else 0.0


def _penalties_together(penalties: int, targets: int) -> int:
    """The largest lot that shares out evenly, is at most 9, and needs at most 2 GiB."""
    limit = max(1, min(_TOGETHER, _WORKING_BYTES // (4 * _WORKING_ARRAYS * targets)))
    return max(lot for lot in range(1, limit + 1) if penalties % lot == 0)


def _warn_of(missed: np.ndarray) -> None:
    if missed.size:
        warnings.warn(
            f"regression did not converge for the penalties "
            f"{', '.join(f'{penalty:.3g}' for penalty in missed)}; raise max_steps, or bring the "
            f"features to a scale near 1",
            stacklevel=3,
        )


# Below, on the device: C problems (one target and one penalty each), N rows, D axes.


class _State(NamedTuple):
    """State of the method: Σ |z| + w‖θ‖² is minimised subject to z = y − θᵀx.

    `residuals` are z, `duals` are α in [−1, 1], and `strengths` are ρ, the weight of how far z is
    from y − θᵀx.

    References:
      Boyd et al., Distributed Optimization and Statistical Learning via the Alternating Direction
      Method of Multipliers, 2011, sections 3.4 and 6.1.
    """

    residuals: Float32[Array, "C N"]
    duals: Float32[Array, "C N"]
    strengths: Float32[Array, " C"]
    thetas: Float32[Array, "C D"]
    objectives: Float32[Array, " C"]
    done: Bool[Array, " C"]


@jax.jit
def _start(targets: Float32[Array, "C N"], spectrum: Float32[Array, " D"]) -> _State:
    spread = _deviations(targets) / targets.shape[1]
    return _State(
        residuals=targets,
        duals=jnp.zeros_like(targets),
        strengths=1 / jnp.where(spread > 0, spread, 1),
        thetas=jnp.zeros((len(targets), len(spectrum))),
        objectives=jnp.zeros(len(targets)),
        done=jnp.zeros(len(targets), bool),
    )


def _deviations(targets: Float32[Array, "C N"]) -> Float32[Array, " C"]:
    """The least absolute error of a constant prediction."""
    return jnp.sum(jnp.abs(targets - jnp.median(targets, axis=1, keepdims=True)), axis=1)


@partial(jax.jit, static_argnums=1)
def _restart(state: _State, together: int) -> _State:
    """Starts every problem where the smallest penalty of its target ended."""
    ended = jax.tree.map(lambda array: array[together - 1 :: together], state)
    restarted = jax.tree.map(lambda array: jnp.repeat(array, together, axis=0), ended)
    return restarted._replace(done=jnp.zeros_like(state.done))


@jax.jit
def _solve(
    features: Float32[Array, "N D"],
    targets: Float32[Array, "C N"],
    spectrum: Float32[Array, " D"],
    ridge: Float32[Array, " C"],
    state: _State,
    max_checks: int | Int[Array, ""],
) -> _State:
    """Steps until every problem has converged, checked at every tenth step.

    Strengths change after 10, 20, 40, … steps: with frequent changes they never settle.
    """

    def step(_, state):
        return _step(features, targets, spectrum, ridge, state)

    def unfinished(carried):
        check, state = carried
        return (check < max_checks) & ~state.done.all()

    def advance(carried):
        check, state = carried
        before = jax.lax.fori_loop(0, _STEPS_A_CHECK - 1, step, state)
        after = _judge(features, targets, spectrum, ridge, step(0, before))
        is_power_of_two = (check + 1) & check == 0
        factors = jnp.where(is_power_of_two, _balance(before, after, features, targets), 1)
        # With a larger strength, a dual would show the rounding of its residual.
        strongest = _STRONGEST / jnp.mean(jnp.abs(targets), axis=1)
        after = after._replace(strengths=jnp.minimum(after.strengths * factors, strongest))
        return check + 1, _keep(state, after)

    return jax.lax.while_loop(unfinished, advance, (0, state))[1]


def _step(features, targets, spectrum, ridge, state: _State) -> _State:
    """Fits θ to z, then z to θ, then corrects the duals by the difference of z and residuals."""
    strengths = state.strengths[:, None]
    scaled = state.duals / strengths
    wanted = _einsum("cn,nd->cd", targets - state.residuals + scaled, features)
    thetas = wanted / (spectrum + ridge[:, None] / strengths)
    left = targets - _einsum("cd,nd->cn", thetas, features)
    # Over-relaxation: going beyond the residuals speeds the method up.
    left = _RELAXATION * left + (1 - _RELAXATION) * state.residuals + scaled
    duals = jnp.clip(strengths * left, -1, 1)
    return state._replace(residuals=left - duals / strengths, duals=duals, thetas=thetas)


def _judge(features, targets, spectrum, ridge, state: _State) -> _State:
    """Computes the objectives, and which problems are near their optimum.

    With r the residuals and g = 2wθ − Σ αx, the objective exceeds its minimum by at most
    Σ (|r| − αr) + gᵀδ − w‖δ‖², where δ leads to the optimum. For changes δ that move the
    predictions by at most 2‖r‖, this is at most Σ (|r| − αr) + Σ g²/(4(w + λs)) + 4λ‖r‖² for every
    λ ≥ 0, with s the axes' squared lengths. λ makes the last term half of the allowed gap.
    """
    left = targets - _einsum("cd,nd->cn", state.thetas, features)
    penalty = jnp.sum(ridge[:, None] / 2 * state.thetas**2, axis=1)
    objectives = jnp.sum(jnp.abs(left), axis=1) + penalty
    slack = jnp.sum(jnp.abs(left) - state.duals * left, axis=1)
    gradients = ridge[:, None] * state.thetas - _einsum("cn,nd->cd", state.duals, features)
    allowed = jnp.maximum(_TOLERANCE * objectives, _FLOOR * _deviations(targets)) / 2
    squared = jnp.sum(left**2, axis=1)
    multiplier = allowed / (4 * jnp.where(squared > 0, squared, 1))
    curvature = 2 * ridge[:, None] + 4 * multiplier[:, None] * spectrum
    gap = slack + jnp.sum(gradients**2 / curvature, axis=1)
    return state._replace(objectives=objectives, done=state.done | (gap <= allowed))


def _balance(before: _State, after: _State, features, targets) -> Float32[Array, " C"]:
    """Factors of the strengths for which residuals and duals settle equally fast."""

    def length(rows):
        return jnp.linalg.norm(rows, axis=1)

    left = targets - _einsum("cd,nd->cn", after.thetas, features)
    moved = after.strengths * length(after.residuals - before.residuals) / length(after.duals)
    apart = length(left - after.residuals) / jnp.maximum(length(left), length(after.residuals))
    factors = jnp.sqrt(apart / moved)
    return jnp.where(jnp.isfinite(factors), jnp.clip(factors, 0.2, 5), 1)


def _keep(before: _State, after: _State) -> _State:
    """Leaves finished problems as they were."""

    def choose(old, new):
        return jnp.where(before.done.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    return jax.tree.map(choose, before, after)
