"""Logistic regressions of many small sets of rows, one class against the rest, side by side.

They are those of scikit-learn's liblinear: each class minimises
½‖θ‖² + C·Σ log(1 + exp(−y·θᵀx)) with C = 1 on the features as they are. The intercept is the weight
of a constant one and is penalised like the others. The objective is strictly convex, with one
optimum.

The optimum lies in the span of an episode's N·K images. So each episode is rotated onto the
principal axes of that span (in float64, on the host), which leaves the penalty unchanged. Newton's
method solves all classes of many episodes there in one batch.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64

_TOLERANCE = 1e-6
_MAX_STEPS = 50
_LONGEST = 1e4
_SEARCH_LENGTHS = 0.5 ** np.arange(16)

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class OneAgainstRest(NamedTuple):
    """Weights, intercept and whether they are the optimum, per episode and class."""

    weights: Float32[Array, "episodes ways features"]
    intercepts: Float32[Array, "episodes ways"]
    converged: Bool[Array, "episodes ways"]


def fit_one_against_rest(
    support: Float[np.ndarray, "episodes ways shots features"],
) -> OneAgainstRest:
    """Fits scikit-learn's liblinear logistic regression, C = 1, to the images of each episode.

    A fit has converged when its last Newton step was predicted to lower the objective by less than
    1e-6 of its value. Images longer than 1e4 never count as converged: in float32 their curvature
    swallows the penalty's.

    Args:
      support: The features of each episode's classes; used as they are.

    Returns:
      The classifier that separates each class from the episode's other classes.
    """
    episodes, ways, shots, _ = support.shape
    images = support.astype(np.float32).reshape(episodes, ways * shots, -1)
    images = np.pad(images, ((0, 0), (0, 0), (0, 1)), constant_values=1)
    is_own = np.arange(ways)[:, None] == np.arange(ways).repeat(shots)
    rows, lengths = _principal_axes(images)
    return _fit(images, rows, np.where(is_own, np.float32(1), -1), lengths <= _LONGEST)


def _principal_axes(
    images: Float32[np.ndarray, "episodes rows _"],
) -> tuple[Float32[np.ndarray, "episodes rows rows"], Float64[np.ndarray, " episodes"]]:
    """Each episode's images on the principal axes of their span; the length of its longest one."""
    images = images.astype(np.float64)
    gram = images @ images.swapaxes(1, 2)
    spectrum, axes = np.linalg.eigh(gram)
    rows = axes * np.sqrt(spectrum.clip(0))[:, None, :]
    return rows.astype(np.float32), np.sqrt(gram.max(axis=(1, 2)))


# E episodes, W ways (one problem each), R rows to fit, A axes of their span.


@jax.jit
def _fit(
    images: Float32[Array | np.ndarray, "E R D"],
    rows: Float32[Array | np.ndarray, "E R A"],
    signs: Float32[Array | np.ndarray, "W R"],
    is_solvable: Bool[Array | np.ndarray, " E"],
) -> OneAgainstRest:
    margins, converged = _newton(jnp.asarray(rows), jnp.asarray(signs))
    # At the optimum θ is the sum of the images weighted by their residuals, whatever the axes.
    thetas = _einsum("ewr,erd->ewd", signs * jax.nn.sigmoid(-margins), images)
    return OneAgainstRest(thetas[..., :-1], thetas[..., -1], converged & is_solvable[:, None])


def _newton(
    rows: Float32[Array, "E R A"], signs: Float32[Array, "W R"]
) -> tuple[Float32[Array, "E W R"], Bool[Array, "E W"]]:
    """Minimises ½‖θ‖² + Σ log(1 + exp(−sign·θᵀrow)); returns sign·θᵀrow and what converged."""
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
    return margins_of(thetas), converged


def _line_search(
    thetas: Float32[Array, "E W A"],
    margins: Float32[Array, "E W R"],
    direction: Float32[Array, "E W A"],
    change: Float32[Array, "E W R"],
) -> Float32[Array, "E W"]:
    """The longest step of 1, ½, ¼, … at whose end the objective still falls, or hardly rises.

    Slopes are compared, not values: near the optimum, differences of values are all rounding.
    """

    def slope(length):
        wrong = jax.nn.sigmoid(-margins - length * change)
        inward = jnp.sum((thetas + length * direction) * direction, axis=-1)
        return inward - jnp.sum(wrong * change, axis=-1)

    allowed = 0.1 * jnp.abs(slope(0.0))
    lengths = jnp.asarray(_SEARCH_LENGTHS, jnp.float32)
    within = jax.lax.map(lambda length: slope(length) <= allowed, lengths)
    return lengths[jnp.argmax(within, axis=0)]
