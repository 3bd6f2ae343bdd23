"""Few-shot classification: logistic regressions of many small episodes.

An episode draws N classes, and per class K images to fit and 16 others to classify. Its logistic
regressions separate every class from the others.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int

from cassle_jax.checks import check_at_least, check_finite
from cassle_jax.data.splits import rows_by_label
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Finding, Score, missed_optima
from cassle_jax.evaluation.needs import Needs
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Seeded, check_distinct, setting
from cassle_jax.solvers.one_against_rest import fit_one_against_rest

QUERIES = 16  # per class and episode

_TOGETHER = 256
_WORKING_BYTES = 1 << 30


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
    def interval(self) -> float | None:
        """Half the width of the mean's 95 % interval, 1.96σ/√n; `None` for a single episode."""
        count = len(self.accuracies)
        return float(1.96 * self.accuracies.std() / np.sqrt(count)) if count > 1 else None

    def findings(self, dataset: str) -> list[Finding]:
        """The mean accuracy with its interval."""
        setting = f"{self.ways}-way {self.shots}-shot"
        score = Score(PROTOCOL.name, dataset, f"{setting} accuracy", self.mean, self.interval)
        return [score, missed_optima(PROTOCOL.name, dataset, self.converged, f"{setting} fits")]


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

    The same seed draws the same episodes on any device.

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
    check_at_least("shots", shots, 1)
    check_at_least("queries", queries, 1)
    check_at_least("episodes", episodes, 1)
    check_at_least("ways", ways, 2)
    features = np.asarray(features, np.float32)
    rows_of = _rows_of_classes(features, labels, ways, shots + queries)
    drawn = _draw(rows_of, ways, shots + queries, episodes, seed)

    together = _episodes_together(drawn.shape, shots, features.shape[1])
    right, converged = [], []
    for part in _parts(drawn, together):
        fit = fit_one_against_rest(features[part[:, :, :shots]])
        # Their mean over the classes changes no choice; without it, float32 suffices for the rest.
        thetas = ((each - each.mean(axis=1, keepdims=True)).astype(np.float32) for each in fit[:2])
        right.append(_count_right(features[part[:, :, shots:]], *thetas))
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


def _rows_of_classes(
    features: np.ndarray, labels: np.ndarray, ways: int, images: int
) -> list[Int[np.ndarray, " _"]]:
    """The rows per class; raises the errors of `few_shot`."""
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features of shape {features.shape} are not [rows, features]")
    if labels.shape != (len(features),):
        raise ValueError(f"labels of shape {labels.shape} do not fit {len(features)} rows")
    check_finite("features", features)
    rows_of = rows_by_label(labels)
    if len(rows_of) < ways:
        raise ValueError(f"ways={ways} is more than the {len(rows_of)} classes of the labels")
    fewest = min(rows_of, key=lambda label: len(rows_of[label]))
    if len(rows_of[fewest]) < images:
        raise ValueError(
            f"class {fewest} has {len(rows_of[fewest])} images; an episode takes {images} of a "
            f"class (shots + queries)"
        )
    return list(rows_of.values())


def _draw(
    rows_of: list[np.ndarray], ways: int, images: int, episodes: int, seed: int
) -> Int[np.ndarray, "episodes ways images"]:
    """Rows of the episodes' images; neither classes nor images repeat within an episode."""
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
    # Images to fit (with ones and without), weights, and per class a Hessian, its summands and its
    # factor are in float64. All images are in float32, on host and device.
    numbers = (2 * fitted + ways) * (width + 1) + 4 * ways * fitted**2 + ways * images * width
    return max(1, min(_TOGETHER, episodes, _WORKING_BYTES // (8 * numbers)))


def _parts(drawn: np.ndarray, together: int) -> Iterator[np.ndarray]:
    """Yields parts of `together` episodes; fills the last part up with the first episodes."""
    missing = -len(drawn) % together
    filled = np.concatenate([drawn, drawn[:missing]])
    yield from np.split(filled, len(filled) // together)


@jax.jit
def _count_right(
    queries: Float32[Array | np.ndarray, "episodes ways queries features"],
    weights: Float32[Array | np.ndarray, "episodes ways features"],
    intercepts: Float32[Array | np.ndarray, "episodes ways"],
) -> Int[Array, " episodes"]:
    """The number of queries classified correctly, per episode."""
    scores = jnp.einsum("evqd,ewd->evqw", queries, weights, precision=jax.lax.Precision.HIGHEST)
    found = jnp.argmax(scores + intercepts[:, None, None], axis=-1)
    return jnp.sum(found == jnp.arange(queries.shape[1])[:, None], axis=(1, 2))


@dataclass(frozen=True)
class FewShotSettings(Seeded):
    """Settings of the protocol."""

    shots: tuple[int, ...] = setting((1, 5), "Images per class to fit; one result per number.")
    ways: int = setting(5, "Classes per episode.")
    episodes: int = setting(2000, "Number of episodes.")

    def __post_init__(self):
        super().__post_init__()
        check_distinct("shots", self.shots)
        for shots in self.shots:
            check_at_least("shots", shots, 1)
        check_at_least("ways", self.ways, 2)
        check_at_least("episodes", self.episodes, 1)


def _run(bench: Bench, settings: FewShotSettings) -> list[Finding]:
    parts = [bench.test] if bench.data.task == "few-shot" else [*bench.fitted, bench.test]
    features, labels = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("features", "labels")
    )
    chosen = {"ways": settings.ways, "episodes": settings.episodes, "seed": settings.seed}
    results = [few_shot(features, labels, shots=shots, **chosen) for shots in settings.shots]
    return [finding for result in results for finding in result.findings(bench.data.name)]


PROTOCOL = Protocol(
    "few_shot",
    title="Few-shot classification",
    takes=("few-shot", "classification"),
    usual=("few-shot",),
    needs=lambda settings, _: Needs(
        labels=True, ways=settings.ways, of_a_class=max(settings.shots) + QUERIES
    ),
    settings=FewShotSettings,
    run=_run,
)
