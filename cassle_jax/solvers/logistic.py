"""Multinomial logistic regression of the same features, over many penalties.

Every fit minimises Σ cross-entropy + w·‖θ‖² over the weights and biases θ: a sum over the rows, not
a mean, and the biases are penalised like the weights. So it is strictly convex, with one optimum.
Three things make the optimum quick to reach at any scale of the features, even where w is tiny and
the classes separable. All is computed in float64, except on TPUs, which have only float32:

- The features, with a column of ones for the bias, are rotated onto their principal axes. The
  rotation leaves the penalty unchanged, and one number per axis, its curvature, preconditions well
  (at θ = 0, perfectly).
- Newton's method takes its steps from preconditioned conjugate gradients. Its line search runs
  along logits already known, so it needs no product with the features. Where the classes are
  almost separable, a few rows decide, and conjugate gradients would need thousands of steps: such
  a fit is finished with a factorised Hessian, where that is small.
- The penalties go from large to small. A fit starts on the line through the two optima before it,
  extrapolated in log w: where the classes are separable, θ grows nearly along that line.

Logits are kept relative to the logit of the row's own label. The loss and the residual of a row
that is almost certain are then accurate; softmax minus one would be only rounding.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int

from cassle_jax.checks import check_at_least
from cassle_jax.solvers.inputs import check_features, checked_penalties
from cassle_jax.solvers.principal_axes import blocks, principal_axes

_TOLERANCE = 1e-6
# Conjugate-gradient steps before a small predicted decrease is believed: large ones may come late.
_SURE_STEPS = 20
_GRADIENT_STEPS = 500
_SEARCH_STEPS = 20
# A Hessian is factorised up to this many rows, and operations to compute it: to end a fit, or only
# to prove its end.
_FACTORISED_ROWS = 2000
_TO_CONVERGE, _TO_PROVE = 2e10, 2e9
# Changes of logits that are held at a time while a Hessian's columns are computed.
_HELD_CHANGES = 2**20
_TEST_ROWS = 1024
_CURVATURE_ROWS = 4096

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class LogisticPath:
    """Logistic regressions of the same rows, one per penalty, in the requested order.

    Attributes:
      penalties: The values of w.
      weights: The weights, per penalty, class and feature.
      biases: The biases, per penalty and class.
      objectives: The objectives reached, Σ cross-entropy + w·‖θ‖².
      converged: Whether the last step was predicted to lower the objective by less than 1e-6 of it.
    """

    penalties: Float64[np.ndarray, " penalties"]
    weights: Float64[np.ndarray, "penalties classes features"]
    biases: Float64[np.ndarray, "penalties classes"]
    objectives: Float64[np.ndarray, " penalties"]
    converged: Bool[np.ndarray, " penalties"]

    def predict(
        self, features: Float[np.ndarray, "rows features"]
    ) -> Int[np.ndarray, "penalties rows"]:
        """The most probable class of every row, for each penalty; ties go to the first class."""
        with widest_floats():
            weights, biases = jnp.asarray(self.weights), jnp.asarray(self.biases)
            found = [
                np.asarray(_most_probable(weights, biases, jnp.asarray(block, float)))
                for block in blocks(features, _TEST_ROWS)
            ]
        return np.concatenate(found, axis=1)


def fit_logistic(
    features: Float[np.ndarray, "rows features"],
    labels: Int[np.ndarray, " _"],
    classes: int,
    penalties: Sequence[float] | np.ndarray,
    *,
    start: tuple[np.ndarray, np.ndarray] | None = None,
    together: int = 1,
    max_steps: int = 50,
) -> LogisticPath:
    """Minimises Σ cross-entropy + w·‖θ‖², weights and biases both in θ, for every penalty w.

    A fit has converged when its last Newton step was predicted to lower the objective by less than
    1e-6 of its value. Conjugate gradients predict too little where the classes are almost
    separable. So a small fit whose gradient does not prove the optimum ends with a factorised
    Hessian, which predicts exactly; a large one can end 1e-4 above it.

    The device holds the features, all solutions, and six numbers per row, class and penalty of a
    lot. For 75 000 × 2048 features and 200 classes, these are 1.2 GB (2.5 GB on a CPU) and 0.7 GB
    per penalty. See `logistic_bytes`.

    Args:
      features: Any scale; used as they are.
      labels: From 0 to `classes` − 1.
      classes: Number of classes; a class without a row is allowed.
      penalties: The values of w, each above 0, in any order.
      start: Weights [classes, features] and biases [classes] from which the largest penalty starts;
        zero by default.
      together: Number of penalties solved at once, as a lot. With 1, each fit starts nearest to its
        optimum.
      max_steps: Largest number of Newton steps per lot, and again per fit that a factorised Hessian
        finishes.

    Returns:
      The solutions, in the order of `penalties`. A `UserWarning` names those that did not converge.

    Raises:
      ValueError: If there are no rows, features are not finite, labels are outside the classes or
        all the same, there are fewer than two classes, or a penalty or a count is not positive.
    """
    check_rows("features", features, labels, classes)
    if (labels == labels[0]).all():
        raise ValueError(f"labels are {labels[0]} in every row; at least two classes must occur")
    penalties = checked_penalties(penalties)
    check_at_least("together", together, 1)
    check_at_least("max_steps", max_steps, 1)

    order, lots = _lots(penalties, together)
    with widest_floats():
        rotated, axes = _on_device(features)
        labels = jnp.asarray(labels, jnp.int32)
        begin = _rotated_start(start, axes, classes)
        solved = _solve_lots(labels, rotated, lots, begin, max_steps, _conjugate_gradients)
        solved = jax.tree.map(lambda array: np.asarray(array)[order], solved)
        if rotated.dtype == jnp.float64 and begin.size <= _FACTORISED_ROWS:
            _finish(solved, labels, rotated, penalties, max_steps)
    return _path(penalties, axes, solved)


def _finish(
    solved: "_Solved",
    labels: Int[Array, " N"],
    features: Float[Array, "N D"],
    penalties: Float64[np.ndarray, " penalties"],
    max_steps: int,
) -> None:
    """Replaces fits that missed their optimum, or may have, where a Hessian is quick to compute."""
    operations = 4.0 * len(features) * solved.thetas[0].size ** 2
    again = ~solved.converged & (operations <= _TO_CONVERGE)
    again |= ~solved.certain & (operations <= _TO_PROVE)
    for missed in np.flatnonzero(again):
        lot, begin = penalties[missed].reshape(1, 1), solved.thetas[missed].T
        better = _solve_lots(labels, features, lot, begin, max_steps, _factorised)
        if better.converged[0] or not solved.converged[missed]:
            for arrays, found in zip(solved, better, strict=True):
                arrays[missed] = found[0]


def logistic_bytes(rows: int, features: int, classes: int) -> tuple[int, int]:
    """Bytes that `fit_logistic` takes with one penalty at a time: on the host, and on the device.

    The host needs them for the rotation, which ends before the device computes. A CPU holds the
    features twice.
    """
    axes = min(rows, features + 1)
    copies = 2 if _is_cpu() else 1
    return 8 * rows * axes, 8 * rows * (copies * axes + 6 * classes)


def _on_device(features: np.ndarray) -> tuple[Float[Array, "N D"], np.ndarray]:
    """The features on their axes, without a copy on the host, and the axes."""
    rotated, _, axes = principal_axes(features)
    return jnp.asarray(rotated, float), axes


def check_rows(name: str, features: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """Raises ValueError unless rows of finite features have one label in [0, classes) each."""
    check_at_least("classes", classes, 2)
    check_features(name, features)
    if labels.shape != (len(features),):
        raise ValueError(f"{name} has labels of shape {labels.shape} for {len(features)} rows")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{name} has labels from {labels.min()} to {labels.max()}; "
            f"classes={classes} takes 0 to {classes - 1}"
        )


def _rotated_start(start, axes: np.ndarray, classes: int) -> Float64[np.ndarray, "axes classes"]:
    if start is None:
        return np.zeros((axes.shape[1], classes))
    weights, biases = start
    if weights.shape != (classes, len(axes) - 1) or biases.shape != (classes,):
        raise ValueError(
            f"start has weights of shape {weights.shape} and biases of shape {biases.shape}; "
            f"{(classes, len(axes) - 1)} and {(classes,)} are needed"
        )
    thetas = np.column_stack([weights, biases]).astype(np.float64)
    # The mean over the classes changes no probability, and is zero at the optimum.
    return ((thetas - thetas.mean(axis=0)) @ axes).T


def _lots(
    penalties: np.ndarray, together: int
) -> tuple[Int[np.ndarray, " penalties"], Float64[np.ndarray, "lots together"]]:
    """The place of every penalty in the lots, and equal lots of penalties from large to small.

    The largest penalty, the quickest to solve, is repeated to fill the first lot up.
    """
    missing = -len(penalties) % together
    descending = np.argsort(-penalties, kind="stable")
    places = np.empty(len(penalties), int)
    places[descending] = np.arange(len(penalties)) + missing
    lots = np.concatenate([np.full(missing, penalties.max()), penalties[descending]])
    return places, lots.reshape(-1, together)


def _path(penalties: np.ndarray, axes: np.ndarray, solved: "_Solved") -> LogisticPath:
    """The solutions on the features' own axes; warns of fits that missed their optimum."""
    if not solved.converged.all():
        missed = ", ".join(f"{penalty:.3g}" for penalty in penalties[~solved.converged])
        warnings.warn(
            f"logistic regression did not converge for the penalties {missed}; raise max_steps",
            stacklevel=3,
        )
    thetas = solved.thetas @ axes.T
    squares = np.sum(np.square(solved.thetas, dtype=np.float64), axis=(1, 2))
    return LogisticPath(
        penalties=penalties,
        weights=thetas[..., :-1],
        biases=thetas[..., -1],
        objectives=np.sum(solved.losses, axis=1, dtype=np.float64) + penalties * squares,
        converged=solved.converged,
    )


def _is_cpu() -> bool:
    return jax.default_backend() == "cpu"


def widest_floats():
    """A context in which JAX computes in float64, except on TPUs."""
    return jax.enable_x64(jax.default_backend() != "tpu")


@jax.jit
def _most_probable(weights, biases, features):
    logits = _einsum("pkd,nd->pkn", weights, features) + biases[..., None]
    return jnp.argmax(logits, axis=1)


# Below, on the device: K classes, P penalties per lot, N rows, D axes. Rows come first and classes
# last, so that every product with the features is one of two matrices, and a row's classes, which
# the softmax sums over, are adjacent in memory.


class _Solved(NamedTuple):
    """The solutions, per penalty.

    Attributes:
      thetas: θ.
      losses: the losses of the rows there.
      converged: whether the last step was predicted to gain too little.
      certain: whether the gradient proves that no step gains more. The objective is 2w-strongly
        convex, so θ's lies at most ‖gradient‖² / 4w above the optimum's.
    """

    thetas: Array
    losses: Array
    converged: Array
    certain: Array


_Find = Callable[..., tuple[Float[Array, "D P K"], Float[Array, "N P K"], Float[Array, " P"]]]
"""Finds Newton's direction, see `_conjugate_gradients`."""


@partial(jax.jit, static_argnames="find")
def _solve_lots(
    labels: Int[Array, " N"],
    features: Float[Array, "N D"],
    lots: Float[Array | np.ndarray, "lots P"],
    start: Float[Array | np.ndarray, "D K"],
    max_steps: int | Int[Array, ""],
    find: _Find,
) -> _Solved:
    """Solves lot after lot, each starting where the two solutions before it lead."""
    lots, start = (each.astype(features.dtype) for each in (lots, start))
    is_label = labels[:, None, None] == jnp.arange(start.shape[-1])

    def solve(before, penalties):
        begin = _lead_on(features, is_label, penalties, *before)
        thetas, logits, converged = _newton(features, is_label, penalties, *begin, max_steps, find)
        losses, _, residuals = _softmax(logits, is_label)
        gradient = _einsum("nd,npk->dpk", features, residuals) + 2 * penalties[:, None] * thetas
        objectives = jnp.sum(losses, axis=(0, 2)) + penalties * _dot(thetas, thetas)
        certain = _dot(gradient, gradient) <= 4 * penalties * _TOLERANCE * objectives
        after = jax.tree.map(
            lambda old, new: jnp.concatenate([old, new], axis=-2)[..., -2:, :],
            before,
            (thetas, jnp.log(penalties)[:, None]),
        )
        return after, _Solved(jnp.moveaxis(thetas, 0, -1), losses[..., 0].T, converged, certain)

    before = jnp.repeat(start[:, None], 2, axis=1), jnp.zeros((2, 1), lots.dtype)
    _, solved = jax.lax.scan(solve, before, lots)
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), solved)


def _lead_on(
    features: Float[Array, "N D"],
    is_label: Bool[Array, "N 1 K"],
    penalties: Float[Array, " P"],
    thetas: Float[Array, "D 2 K"],
    exponents: Float[Array, "2 1"],
) -> tuple[Float[Array, "D P K"], Float[Array, "N P K"]]:
    """Extrapolates two solutions linearly in log w; returns the second where it is better.

    Returns:
      θ per penalty, and the relative logits there.
    """
    logits = _relative(_einsum("nd,dpk->npk", features, thetas), is_label)
    gap, beyond = exponents[1] - exponents[0], jnp.log(penalties) - exponents[1]
    ahead = jnp.where(gap == 0, 0, beyond / jnp.where(gap == 0, 1, gap))

    def at(ahead):
        thetas_there, logits_there = (
            solutions[:, 1:] + ahead[:, None] * (solutions[:, 1:] - solutions[:, :1])
            for solutions in (thetas, logits)
        )
        losses = jnp.sum(_softmax(logits_there, is_label).losses, axis=(0, 2))
        return losses + penalties * _dot(thetas_there, thetas_there), thetas_there, logits_there

    (led, *there), (least, *here) = at(ahead), at(jnp.zeros_like(ahead))
    better = (led < least)[:, None]
    return tuple(jnp.where(better, *each) for each in zip(there, here, strict=True))


def _newton(
    features: Float[Array, "N D"],
    is_label: Bool[Array, "N 1 K"],
    penalties: Float[Array, " P"],
    thetas: Float[Array, "D P K"],
    logits: Float[Array, "N P K"],
    max_steps: int | Int[Array, ""],
    find: _Find,
) -> tuple[Float[Array, "D P K"], Float[Array, "N P K"], Bool[Array, " P"]]:
    """Newton's method from `thetas`: solutions, their relative logits, and which converged."""
    ridge = 2 * penalties[:, None]
    across = features.T
    if _is_cpu():  # XLA would transpose the features for each product
        across = jax.lax.optimization_barrier(across)

    def unfinished(state):
        step, _, _, converged = state
        return (step < max_steps) & ~converged.all()

    def improve(state):
        step, thetas, logits, converged = state
        losses, probabilities, residuals = _softmax(logits, is_label)
        gradient = _einsum("dn,npk->dpk", across, residuals) + ridge * thetas

        def hessian(vector):
            change = _relative(_einsum("nd,dpk->npk", features, vector), is_label)
            mean = jnp.sum(probabilities * change, axis=-1, keepdims=True)
            flow = probabilities * (change - mean)
            return _einsum("dn,npk->dpk", across, flow) + ridge * vector, change

        variances = probabilities * jnp.where(is_label, -residuals, 1 - probabilities)
        inverse = 1 / (_curvatures(features, variances) + ridge)  # inverts the Hessian's diagonal
        objectives = jnp.sum(losses, axis=(0, 2)) + penalties * _dot(thetas, thetas)
        small = _TOLERANCE * objectives
        direction, change, decrease = find(hessian, gradient, inverse, logits, small, ~converged)
        length = _line_search(thetas, logits, direction, change, ridge, is_label)
        # Without a finite decrease there is no direction, and would be none in further steps.
        step = jnp.where(jnp.isfinite(decrease).all(), step + 1, max_steps)
        return (
            step,
            thetas + length[:, None] * direction,
            logits + length[:, None] * change,
            converged | (decrease <= small),
        )

    state = (0, thetas, logits, jnp.zeros(len(penalties), bool))
    return jax.lax.while_loop(unfinished, improve, state)[1:]


def _curvatures(
    features: Float[Array, "N D"], variances: Float[Array, "N P K"]
) -> Float[Array, "D P K"]:
    """Σ variance · feature² over the rows, in blocks: all squares would double the memory."""
    rows = min(len(features), _CURVATURE_ROWS)

    def add(index, total):
        # The last block begins early enough to be whole; its rows count once.
        first = jnp.minimum(index * rows, len(features) - rows)
        is_new = jnp.arange(rows) + first >= index * rows
        squares, weights = (
            jax.lax.dynamic_slice_in_dim(each, first, rows) for each in (features, variances)
        )
        weights = jnp.where(is_new[:, None, None], weights, 0)
        return total + _einsum("nd,npk->dpk", squares**2, weights)

    blocks_of_rows = -(-len(features) // rows)
    nothing = jnp.zeros((features.shape[1], *variances.shape[1:]), features.dtype)
    return jax.lax.fori_loop(0, blocks_of_rows, add, nothing)


def _conjugate_gradients(
    hessian, gradient: Float[Array, "D P K"], inverse, logits, small, active: Bool[Array, " P"]
) -> tuple[Float[Array, "D P K"], Float[Array, "N P K"], Float[Array, " P"]]:
    """Newton's direction, its change of the logits, and the predicted decrease of the objective.

    A penalty is finished when another step would add little to that decrease: the k-th step adds
    less than a tenth of the mean of the steps before it. A decrease below `small` would end the
    fit, so it counts only after some more steps. Where `active` is false, the direction is zero.

    References:
      Nash and Sofer, Assessing a search direction within a truncated-Newton method, Operations
      Research Letters 1990 (the rule to stop).
    """

    def preconditioned(residual):
        # The mean over the classes changes no probability: it stays zero, as in the residual.
        scaled = inverse * residual
        return scaled - jnp.mean(scaled, axis=-1, keepdims=True)

    def unfinished(state):
        step, *_, active = state
        return (step < _GRADIENT_STEPS) & active.any()

    def improve(state):
        step, direction, change, residual, vector, product, decrease, active = state
        curved, vector_change = hessian(vector)
        length = jnp.where(active, product / _dot(vector, curved), 0)
        gain = length * product / 2
        decrease = decrease + gain
        direction = direction + length[:, None] * vector
        change = change + length[:, None] * vector_change
        residual = residual - length[:, None] * curved
        scaled = preconditioned(residual)
        next_product = _dot(residual, scaled)
        unsure = (decrease <= small) & (step < _SURE_STEPS)
        active &= (next_product > 0) & (((step + 1) * gain > 0.1 * decrease) | unsure)
        # The zero keeps 0/0 out of the vector of a finished penalty.
        keep = jnp.where(active, next_product / product, 0)
        vector = scaled + keep[:, None] * vector
        return step + 1, direction, change, residual, vector, next_product, decrease, active

    vector = preconditioned(-gradient)
    product = _dot(-gradient, vector)
    active &= product > 0
    nothing = (jnp.zeros_like(gradient), jnp.zeros_like(logits))
    state = (0, *nothing, -gradient, vector, product, jnp.zeros_like(product), active)
    _, direction, change, _, _, _, decrease, _ = jax.lax.while_loop(unfinished, improve, state)
    return direction, change, decrease


def _factorised(
    hessian, gradient: Float[Array, "D P K"], inverse, logits, small, active: Bool[Array, " P"]
) -> tuple[Float[Array, "D P K"], Float[Array, "N P K"], Float[Array, " P"]]:
    """As `_conjugate_gradients`, by factorising the whole Hessian.

    Where rounding makes that impossible, the direction is zero, and the decrease infinite. At 2000
    rows, the Hessian and its copies take 0.2 GB per penalty.
    """
    del inverse, small
    axes, penalties, classes = gradient.shape
    rows = axes * classes

    def column(unit):
        return hessian(jnp.broadcast_to(unit[:, None], gradient.shape))[0]

    units = jnp.eye(rows, dtype=gradient.dtype).reshape(rows, axes, classes)
    at_a_time = max(_HELD_CHANGES // logits.size, 1)
    columns = jax.lax.map(column, units, batch_size=at_a_time)
    matrices = jnp.moveaxis(columns, 2, 0).reshape(penalties, rows, rows)
    # The mean over the classes changes no probability, so its only curvature would be the ridge.
    diagonal = jnp.diagonal(matrices, axis1=1, axis2=2).reshape(penalties, axes, classes)
    mean = jnp.full((classes, classes), 1 / classes, gradient.dtype)
    matrices += jax.vmap(lambda each: jnp.kron(jnp.diag(each), mean))(jnp.mean(diagonal, axis=-1))

    scale = jax.lax.rsqrt(jnp.diagonal(matrices, axis1=1, axis2=2))
    factor = jnp.linalg.cholesky(matrices * scale[:, None] * scale[..., None])
    against = scale * jnp.moveaxis(gradient, 1, 0).reshape(penalties, rows)
    solved = scale * jax.scipy.linalg.cho_solve((factor, True), against[..., None])[..., 0]
    direction = -jnp.moveaxis(solved.reshape(penalties, axes, classes), 0, 1)
    direction -= jnp.mean(direction, axis=-1, keepdims=True)
    decrease = -_dot(gradient, direction) / 2
    is_sound = active & (decrease >= 0) & jnp.isfinite(decrease)
    direction = jnp.where(is_sound[:, None], direction, 0)
    otherwise = jnp.where(active, jnp.inf, 0)
    return direction, hessian(direction)[1], jnp.where(is_sound, decrease, otherwise)


def _line_search(
    thetas: Float[Array, "D P K"],
    logits: Float[Array, "N P K"],
    direction: Float[Array, "D P K"],
    change: Float[Array, "N P K"],
    ridge: Float[Array, "P 1"],
    is_label: Bool[Array, "N 1 K"],
) -> Float[Array, " P"]:
    """The step lengths at which the slope along the direction has almost vanished.

    Newton's method in one variable, between the longest step known to fall short and the shortest
    known to go too far; a step at most doubles.
    """
    ridge = ridge[:, 0]
    inward, squared = _dot(thetas, direction), _dot(direction, direction)

    def slope_and_curvature(length):
        _, probabilities, residuals = _softmax(logits + length[:, None] * change, is_label)
        mean = jnp.sum(probabilities * change, axis=-1, keepdims=True)
        variance = jnp.sum(probabilities * change**2, axis=-1, keepdims=True) - mean**2
        slope = _dot(residuals, change) + ridge * (inward + length * squared)
        return slope, jnp.sum(variance, axis=(0, 2)) + ridge * squared

    def unfinished(state):
        step, *_, found = state
        return (step < _SEARCH_STEPS) & ~found.all()

    def improve(state):
        step, length, short, far, first_slope, found = state
        slope, curvature = slope_and_curvature(length)
        first_slope = jnp.where(step == 0, slope, first_slope)
        found |= (step > 0) & (jnp.abs(slope) <= 0.1 * jnp.abs(first_slope))
        short, far = jnp.where(slope < 0, length, short), jnp.where(slope < 0, far, length)
        longest = 2 * jnp.maximum(length, 0.5)
        proposed = length - slope / curvature
        inside = (proposed > short) & (proposed < far)
        # The bound also holds for the middle: where slopes are all rounding, `far` may be infinite.
        proposed = jnp.minimum(jnp.where(inside, proposed, (short + far) / 2), longest)
        return step + 1, jnp.where(found, length, proposed), short, far, first_slope, found

    zero = jnp.zeros_like(squared)
    state = (0, zero, zero, jnp.full_like(zero, jnp.inf), zero, squared == 0)
    return jax.lax.while_loop(unfinished, improve, state)[1]


def _relative(
    logits: Float[Array, "N P K"], is_label: Bool[Array, "N 1 K"]
) -> Float[Array, "N P K"]:
    """Logits minus the logit of the row's label, which becomes zero."""
    return logits - jnp.sum(jnp.where(is_label, logits, 0), axis=-1, keepdims=True)


class _Softmax(NamedTuple):
    losses: Float[Array, "N P 1"]
    probabilities: Float[Array, "N P K"]
    residuals: Float[Array, "N P K"]


def _softmax(logits: Float[Array, "N P K"], is_label: Bool[Array, "N 1 K"]) -> _Softmax:
    """Softmax of relative logits; residuals (probability minus one-hot) without cancellation."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    others = jnp.where(is_label, 0, jnp.exp(logits - top))
    rest = jnp.sum(others, axis=-1, keepdims=True)
    own = jnp.exp(-top)
    total = own + rest
    # Where the label is the most probable, own is 1 and the loss may be far below its rounding.
    losses = top + jnp.where(top > 0, jnp.log(total), jnp.log1p(rest))
    return _Softmax(
        losses,
        jnp.where(is_label, own, others) / total,
        jnp.where(is_label, -rest, others) / total,
    )


def _dot(a: Float[Array, "X P K"], b: Float[Array, "X P K"]) -> Float[Array, " P"]:
    return jnp.sum(a * b, axis=(0, 2))
