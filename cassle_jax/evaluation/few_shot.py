"""Few-shot classification: logistic regressions of many small episodes, solved side by side.

An episode draws N classes, and per class K images to fit and 16 others to classify. It is solved
as scikit-learn's liblinear solves it: one class against the rest, each class minimising
½‖θ‖² + C·Σ log(1 + exp(−y·θᵀx)) with C = 1 on the features as they are. The intercept is the weight
of a constant one and is penalised like the others. That is strictly convex, with one optimum.

The optimum lies in the span of the N·K images. So each episode is rotated onto the principal axes
of that span (in float64, on the host), which leaves the penalty unchanged, and solved there by
Newton's method, all classes of many episodes in one batch.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int

from cassle_jax.checks import check_at_least
from cassle_jax.evaluation.findings import Finding, Score, missed_optima

QUERIES = 16  # per class and episode

_TOLERANCE = 1e-6
_MAX_STEPS = 50
_LONGEST = 1e4
_SEARCH_LENGTHS = 0.5 ** np.arange(16)
_TOGETHER = 256
_WORKING_BYTES = 1 << 30

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class FewShotResult:
    """Accuracies of few-shot classification.

    Attributes:
      ways: Classes per episode (N).
      shots: Images per class to fit (K).
      queries: Images per class to classify.
      accuracies: Share of the queries classified correctly, per episode.
      converged: Whether the fits of an episode reached their optimum.
    """

    ways: int
    shots: int
    queries: int
    accuracies: Float64[np.ndarray, " episodes"]
    converged: Bool[np.ndarray, " episodes"]

    @property
    def mean(self) -> float:
        """Mean accuracy over the episodes, in [0, 1]."""
        return float(self.accuracies.mean())

    @property
    def interval(self) -> float:
        """Half the width of the mean's 95 % interval: 1.96σ/√n."""
        return float(1.96 * self.accuracies.std() / np.sqrt(len(self.accuracies)))

    def findings(self, dataset: str) -> list[Finding]:
        """The mean accuracy with its interval."""
        setting = f"{self.ways}-way {self.shots}-shot"
        score = Score("few-shot", dataset, f"{setting} accuracy", self.mean, self.interval)
        return [score, *missed_optima("few-shot", dataset, self.converged, f"{setting} fits")]


class OneAgainstRest(NamedTuple):
    """Weights, intercept and whether they are the optimum, per episode and class."""

    weights: Float32[Array, "episodes ways features"]
    intercepts: Float32[Array, "episodes ways"]
    converged: Bool[Array, "episodes ways"]


def few_shot(
    features: Float[np.ndarray, "rows features"],
    labels: Int[np.ndarray, " _"],
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = QUERIES,
    episodes: int = 2000,
    seed: int = 0,
) -> FewShotResult:
    """The CASSLE paper's few-shot protocol on frozen features.

    The same seed draws the same episodes, on any device and for any number solved together.

    Args:
      features: One row per image; used as they are.
      labels: The classes of the images, any integers.
      ways: Classes per episode (N).
      shots: Images per class to fit (K).
      queries: Images per class to classify.
      episodes: Number of episodes to draw.
      seed: Seed of the draws.

    Returns:
      The accuracy of every episode, with their mean and its interval. A `UserWarning` reports the
      number of episodes that did not reach their optimum.

    Raises:
      ValueError: If a feature is not finite, there are fewer classes than `ways`, a class has fewer
        images than an episode draws, or a number is too small.
    """
    check_at_least(1, shots=shots, queries=queries, episodes=episodes)
    check_at_least(2, ways=ways)
    features = np.asarray(features, np.float32)
    rows_of = _rows_of_classes(features, labels, ways, shots + queries)
    drawn = _draw(rows_of, ways, shots + queries, episodes, seed)

    together = _episodes_together(drawn.shape, shots, features.shape[1])
    table = jnp.asarray(features)
    right, converged = [], []
    for part in _parts(drawn, together):
        fit = fit_one_against_rest(features[part[:, :, :shots]])
        right.append(_count_right(table, part[:, :, shots:], fit.weights, fit.intercepts))
        converged.append(fit.converged.all(axis=1))
    right, converged = (np.concatenate(parts)[:episodes] for parts in (right, converged))
    if not converged.all():
        warnings.warn(
            f"{np.sum(~converged)} of {episodes} episodes did not reach their optimum; bring the "
            f"features to a scale near 1",
            stacklevel=2,
        )
    accuracies = right.astype(np.float64) / (ways * queries)
    return FewShotResult(ways, shots, queries, accuracies, converged)


def fit_one_against_rest(
    support: Float[np.ndarray, "episodes ways shots features"],
) -> OneAgainstRest:
    """Fits scikit-learn's liblinear logistic regression, C = 1, to the images of each episode.

    A fit has converged when its last Newton step was predicted to lower the objective by less than
    1e-6 of its value. Images longer than 1e4 never count as converged: float32 loses the penalty's
    curvature beside theirs.

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


def _rows_of_classes(
    features: np.ndarray, labels: np.ndarray, ways: int, images: int
) -> list[Int[np.ndarray, " _"]]:
    """The rows of each class; raises ValueError where a class has too few."""
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features of shape {features.shape} must be rows × features")
    if labels.shape != (len(features),):
        raise ValueError(f"labels of shape {labels.shape} do not fit {len(features)} rows")
    if not np.isfinite(features).all():
        raise ValueError("features holds values that are not finite")
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < ways:
        raise ValueError(f"ways={ways} is more than the {len(classes)} classes of the labels")
    if counts.min() < images:
        fewest = int(np.argmin(counts))
        raise ValueError(
            f"class {classes[fewest]} has {counts[fewest]} images; an episode takes {images} of a "
            f"class (shots + queries)"
        )
    return [np.flatnonzero(labels == label) for label in classes]


def _draw(
    rows_of: list[np.ndarray], ways: int, images: int, episodes: int, seed: int
) -> Int[np.ndarray, "episodes ways images"]:
    """Rows of each episode's images; neither classes nor images repeat within an episode."""
    generator = np.random.default_rng(seed)
    drawn = np.empty((episodes, ways, images), np.int32)
    for episode in drawn:
        for way, label in enumerate(generator.choice(len(rows_of), ways, replace=False)):
            episode[way] = generator.choice(rows_of[label], images, replace=False)
    return drawn


def _episodes_together(drawn: tuple[int, int, int], shots: int, width: int) -> int:
    """The number of episodes that fit in 1 GiB, at most 256."""
    episodes, ways, images = drawn
    fitted = ways * shots
    # The images (those to fit twice), and per class a Hessian, with its parts and its factor.
    numbers = ways * images * width + fitted * (width + 1) + 4 * ways * fitted**2
    return max(1, min(_TOGETHER, episodes, _WORKING_BYTES // (4 * numbers)))


def _parts(drawn: np.ndarray, together: int) -> Iterator[np.ndarray]:
    """Equally many episodes at a time; the last part is filled up with the first episodes."""
    missing = -len(drawn) % together
    filled = np.concatenate([drawn, drawn[:missing]])
    yield from np.split(filled, len(filled) // together)


def _principal_axes(
    images: Float32[np.ndarray, "episodes rows _"],
) -> tuple[Float32[np.ndarray, "episodes rows rows"], Float64[np.ndarray, " episodes"]]:
    """Every episode's images on the principal axes of their span; the longest image's length."""
    images = images.astype(np.float64)
    gram = images @ images.swapaxes(1, 2)
    spectrum, axes = np.linalg.eigh(gram)
    rows = axes * np.sqrt(spectrum.clip(0))[:, None, :]
    return rows.astype(np.float32), np.sqrt(gram.max(axis=(1, 2)))


@jax.jit
def _count_right(
    features: Float32[Array, "rows features"],
    queries: Int[Array | np.ndarray, "episodes ways queries"],
    weights: Float32[Array, "episodes ways features"],
    intercepts: Float32[Array, "episodes ways"],
) -> Int[Array, " episodes"]:
    """The number of queries classified correctly, per episode."""
    scores = _einsum("evqd,ewd->evqw", features[queries], weights)
    found = jnp.argmax(scores + intercepts[:, None, None], axis=-1)
    return jnp.sum(found == jnp.arange(queries.shape[1])[:, None], axis=(1, 2))


# E episodes, W ways (one problem each), R rows to fit, A axes of their span.


@jax.jit
def _fit(
    images: Float32[Array | np.ndarray, "E R D"],
    rows: Float32[Array | np.ndarray, "E R A"],
    signs: Float32[Array | np.ndarray, "W R"],
    is_solvable: Bool[Array | np.ndarray, " E"],
) -> OneAgainstRest:
    margins, converged = _newton(jnp.asarray(rows), jnp.asarray(signs))
    # At the optimum θ is the sum of the images weighted by their residuals: no need of the axes.
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
