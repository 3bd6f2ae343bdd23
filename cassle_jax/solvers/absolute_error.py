"""Linear regression of several targets by absolute error, over many penalties.

Every fit minimises Σ |y − θᵀx| + w·‖θ‖² over the weights and the bias θ of a target: a sum over the
rows, not a mean, and the bias is penalised like the weights. Targets share nothing but w.

The alternating direction method of multipliers solves all targets and several penalties together.
It splits the residuals from θ. A step is then a ridge regression, which is a division on the
features' principal axes, and a clipping of every row's residual. The penalties go from large to
small; each lot starts at the previous optimum.
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

from cassle_jax.checks import check_at_least, check_finite
from cassle_jax.solvers.inputs import check_features, checked_penalties
from cassle_jax.solvers.principal_axes import principal_axes

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


def fit_absolute(
    features: Float[np.ndarray, "rows features"],
    targets: Float[np.ndarray, "_ targets"],
    penalties: Sequence[float] | np.ndarray,
    *,
    max_steps: int = 10_000,
) -> AbsolutePath:
    """Minimises Σ |y − θᵀx| + w·‖θ‖², weights and bias both in θ, for every target and penalty w.

    A step takes two products with the features. A few dozen steps are usual; a tiny penalty takes
    thousands where there are more rows than features. A fit has converged when its duality gap is
    below 1e-4 of the objective, or below 1e-5 of the best constant's absolute error, which is about
    the resolution of float32. One part of the gap grows like 1/w. It counts only up to the gain
    from changing the predictions by twice the residuals' length.

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
    check_rows("features", features, targets)
    penalties = checked_penalties(penalties)
    check_at_least("max_steps", max_steps, 1)

    rotated, spectrum, axes = _on_device(features)
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
    rotated: Float32[Array, "rows axes"],
    spectrum: Float64[np.ndarray, " axes"],
    targets: Float[np.ndarray, "rows targets"],
    lots: Float64[np.ndarray, "lots together"],
    max_steps: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Solves lot after lot: θ, objectives and convergence, per penalty and target."""
    together = lots.shape[1]
    # All problems are on one axis: the penalties of the first target, then those of the next.
    repeated = jnp.repeat(jnp.asarray(targets.T, jnp.float32), together, axis=0)
    spectrum = jnp.asarray(spectrum, jnp.float32)
    state = _start(repeated, spectrum)
    for penalties in lots:
        ridge = jnp.tile(jnp.asarray(2 * penalties, jnp.float32), targets.shape[1])
        state = _solve(rotated, repeated, spectrum, ridge, state, -(-max_steps // _STEPS_A_CHECK))
        yield tuple(
            np.asarray(part).reshape(-1, together, *part.shape[1:]).swapaxes(0, 1)
            for part in (state.thetas, state.objectives, state.done)
        )
        state = _restart(state, together)


def absolute_bytes(rows: int, features: int) -> tuple[int, int]:
    """Bytes that `fit_absolute` takes: on the host, for the rotation, and on the device."""
    axes = min(rows, features + 1)
    return 8 * rows * axes, 4 * rows * axes + _WORKING_BYTES


def _on_device(
    features: np.ndarray,
) -> tuple[Float32[Array, "rows axes"], Float64[np.ndarray, " axes"], np.ndarray]:
    """As `principal_axes`, without a copy of the rotated features on the host."""
    rotated, spectrum, axes = principal_axes(features)
    return jnp.asarray(rotated, jnp.float32), spectrum, axes


def check_rows(name: str, features: np.ndarray, targets: np.ndarray) -> None:
    """Raises ValueError unless rows of finite features have one row of finite targets each."""
    check_features(name, features)
    if targets.ndim != 2 or len(targets) != len(features) or targets.shape[1] == 0:
        raise ValueError(f"{name} has targets of shape {targets.shape} for {len(features)} rows")
    check_finite(name, targets, "targets")


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
    """Steps until every problem has converged; checks every tenth step.

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
