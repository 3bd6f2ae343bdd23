"""Logistic regressions of many small sets of rows, one class against the rest, side by side.

They are those of scikit-learn's liblinear: each class minimises
½‖θ‖² + C·Σ log(1 + exp(−y·θᵀx)) with C = 1 on the features as they are. The intercept is the weight
of a constant one and is penalised like the others. The objective is strictly convex, with one
optimum.

The optimum lies in the span of an episode's N·K images. So each episode is rotated onto the
principal axes of that span (on the host), which leaves the penalty unchanged. Newton's method
solves all classes of many episodes there in one batch. All is computed in float64, except that TPUs
have only float32: where features differ little from their mean, float32 loses what they differ in.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64

from cassle_jax.solvers.logistic import widest_floats

_TOLERANCE = 1e-6
_MAX_STEPS = 50
_LONGEST = {np.float32: 1e4, np.float64: 1e7}
_SEARCH_LENGTHS = 0.5 ** np.arange(16)

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class OneAgainstRest(NamedTuple):
    """Weights, intercept and whether they are the optimum, per episode and class."""

    weights: Float64[np.ndarray, "episodes ways features"]
    intercepts: Float64[np.ndarray, "episodes ways"]
    converged: Bool[np.ndarray, "episodes ways"]


def fit_one_against_rest(
    support: Float[np.ndarray, "episodes ways shots features"],
) -> OneAgainstRest:
    """Fits scikit-learn's liblinear logistic regression, C = 1, to the images of every episode.

    A fit has converged when its last Newton step was predicted to lower the objective by less than
    1e-6 of its value. Images longer than 1e7 (on TPUs 1e4) never count as converged: their
    curvature swallows the penalty's.

    Args:
      support: The features to fit, per episode and class; used as they are.

    Returns:
      The classifier that separates each class from the episode's other classes.
    """
    episodes, ways, shots, _ = support.shape
    images = support.astype(np.float64).reshape(episodes, ways * shots, -1)
    images = np.pad(images, ((0, 0), (0, 0), (0, 1)), constant_values=1)
    is_own = np.arange(ways)[:, None] == np.arange(ways).repeat(shots)
    spectrum, axes = np.linalg.eigh(images @ images.swapaxes(1, 2))
    lengths = np.sqrt(spectrum.clip(0))[:, None]
    with widest_floats():
        rows, signs = (jnp.asarray(each, float) for each in (axes * lengths, 2 * is_own - 1))
        solved, converged = map(np.asarray, _newton(rows, signs))
    # Without a length, an axis has no image to separate, and θ is 0 on it.
    onto_images = (axes / np.where(lengths > 0, lengths, np.inf)).swapaxes(1, 2)
    thetas = solved @ onto_images @ images
    longest = np.linalg.norm(images, axis=2).max(axis=1, keepdims=True)
    is_solvable = longest <= _LONGEST[solved.dtype.type]
    return OneAgainstRest(thetas[..., :-1], thetas[..., -1], converged & is_solvable)


# E episodes, W ways (one problem each), R rows to fit, A axes of their span.


@jax.jit
def _newton(
    rows: Float[Array, "E R A"], signs: Float[Array, "W R"]
) -> tuple[Float[Array, "E W A"], Bool[Array, "E W"]]:
    """Minimises ½‖θ‖² + Σ log(1 + exp(−sign·θᵀrow)); returns θ and what converged."""
    identity = jnp.eye(rows.shape[2])

    def margins_of(thetas):
        return signs * _einsum("ewa,era->ewr", thetas, rows)

    def unfinished(state):
        step, _, _, converged = state
        return (step < _MAX_STEPS) & ~converged.all()

    def improve(state):
        step, thetas, margins, converged = state
        wrong = jax.nn.sigmoid(-margins)
        gradient = thetas - _einsum("ewr,era->ewa", signs * wrong, rows)
        spread = wrong * jax.nn.sigmoid(margins)
        hessian = identity + _einsum("era,ewr,erb->ewab", rows, spread, rows)
        factor = jax.scipy.linalg.cho_factor(hessian)
        direction = -jax.scipy.linalg.cho_solve(factor, gradient[..., None])[..., 0]
        change = margins_of(direction)
        length = _line_search(thetas, margins, direction, change)[..., None]
        objective = jnp.sum(thetas**2, axis=-1) / 2 + jnp.sum(jax.nn.softplus(-margins), axis=-1)
        decrease = -jnp.sum(gradient * direction, axis=-1) / 2
        converged |= decrease <= _TOLERANCE * objective
        return step + 1, thetas + length * direction, margins + length * change, converged

    thetas = jnp.zeros((len(rows), len(signs), rows.shape[2]))
    state = (0, thetas, margins_of(thetas), jnp.zeros(thetas.shape[:2], bool))
    _, thetas, _, converged = jax.lax.while_loop(unfinished, improve, state)
    return thetas, converged


def _line_search(
    thetas: Float[Array, "E W A"],
    margins: Float[Array, "E W R"],
    direction: Float[Array, "E W A"],
    change: Float[Array, "E W R"],
) -> Float[Array, "E W"]:
    """The longest step of 1, ½, ¼, … at whose end the objective still falls, or hardly rises.

    Slopes are compared, not values: near the optimum, differences of values are all rounding.
    """

    def slope(length):
        wrong = jax.nn.sigmoid(-margins - length * change)
        inward = jnp.sum((thetas + length * direction) * direction, axis=-1)
        return inward - jnp.sum(wrong * change, axis=-1)

    allowed = 0.1 * jnp.abs(slope(0.0))
    lengths = jnp.asarray(_SEARCH_LENGTHS, float)
    within = jax.lax.map(lambda length: slope(length) <= allowed, lengths)
    return lengths[jnp.argmax(within, axis=0)]
