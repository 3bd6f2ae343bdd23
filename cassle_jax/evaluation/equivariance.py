"""Predicts the change between two views from their features, and a view from the change."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits

from cassle_jax.checks import check_at_least
from cassle_jax.data import Drawn, Source
from cassle_jax.data.objects import ObjectSource
from cassle_jax.data.pipeline import evenly_spaced
from cassle_jax.data.splits import ObjectPart, rows_by_label
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.factor_probes import group_means
from cassle_jax.evaluation.findings import Chart, Finding, Score, half_interval
from cassle_jax.evaluation.needs import Needs
from cassle_jax.evaluation.protocol import DRAWN, OBJECTS, Protocol
from cassle_jax.evaluation.settings import Seeded, setting
from cassle_jax.evaluation.spectrum import unit_rows
from cassle_jax.solvers.quadratic import fit_quadratic

VIEWS = 16
"""Views per drawn object of the test part."""

RETRIEVAL = ("MRR", "H@1", "H@5")
_EQUAL = 1e-9  # cosines that differ by rounding alone
RIGHT, WRONG, CHANCE = "right change", "another pair's change", "chance"

Rows = Float[np.ndarray, "pairs _"]
Change = Mapping[str, Rows]


@dataclasses.dataclass(frozen=True)
class EquivarianceSettings(Seeded):
    """Settings of the pairs."""

    pairs: int = setting(1000, "Most pairs of views per part; time grows with its cube.")

    def __post_init__(self):
        super().__post_init__()
        check_at_least("pairs", self.pairs, 10)


@dataclasses.dataclass(frozen=True)
class Views:
    """Frozen features of images that show objects in several views.

    Attributes:
      features: one row per image.
      objects: the number of the object that an image shows, per image.
      factors: the values in which views of an object differ, per image; [images, 3] for a rotation.

    Raises:
      ValueError: the objects or a factor have another length than the features.
    """

    features: Float[np.ndarray, "images features"]
    objects: Int[np.ndarray, " images"]
    factors: Mapping[str, np.ndarray]

    def __post_init__(self):
        for name, values in {"objects": self.objects, **self.factors}.items():
            if len(values) != len(self.features):
                raise ValueError(
                    f"{name} has {len(values)} rows, and features {len(self.features)}"
                )


@dataclasses.dataclass(frozen=True)
class Equivariance:
    """Scores of features on the change between two views of an object.

    Attributes:
      read: R² of the change in each factor, predicted from the features of both views.
      found: MRR, H@1 and H@5 per test object, by the change that the predictor takes: `RIGHT` or
        `WRONG`; `CHANCE` for a random order of the views.
    """

    read: Mapping[str, float]
    found: Mapping[str, Float[np.ndarray, "objects 3"]]

    def findings(self, dataset: str, groups: Mapping[str, str]) -> list[Finding]:
        """R² by factor, and retrieval of the other view, as scores and as bars.

        Args:
          dataset: name of the dataset.
          groups: the group per factor.
        """
        score, chart = (partial(kind, PROTOCOL.name, dataset) for kind in (Score, Chart))
        means = group_means(self.read, groups)
        read = {f"mean, {group}": mean for group, mean in means.items()} | dict(self.read)
        scores = [score(f"{name}: R² of the change", value) for name, value in read.items()]
        for place, metric in enumerate(RETRIEVAL):
            for given, values in self.found.items():
                shares = values[:, place]
                interval = None if given == CHANCE or len(shares) < 2 else half_interval(shares)
                better = True if given == RIGHT else None
                scores.append(score(f"{metric}, {given}", float(shares.mean()), interval, better))
        bars = {
            given: tuple(zip(RETRIEVAL, values.mean(axis=0).tolist(), strict=True))
            for given, values in self.found.items()
        }
        return [
            *scores,
            chart(
                "How well the change between two views is read off their features",
                "factor",
                "R²",
                {"features": tuple(self.read.items())},
            ),
            chart(
                "How well a view is found among those of its object, from another one",
                "measure",
                "share",
                bars,
            ),
        ]


# On busy cores the threads of these small fits spend far longer waiting than working.
@threadpool_limits.wrap(limits=1, user_api="blas")
def equivariance(
    train: Views, val: Views, test: Views, kinds: Mapping[str, str], *, seed: int = 0
) -> Equivariance:
    """Measures how well features reveal, and follow, the change between two views of an object.

    Each image forms a pair with another image of its object, drawn at random. Two ridge regressions
    with a kernel of degree 2 are fitted to the training pairs. One predicts the change in each
    factor from both features. The other predicts the second feature from the first feature and all
    changes. Among its solutions are all maps of the feature that are linear in the change, such as
    the hypernetwork of SIE (Garrido et al., 2023). The object's views, the first one included, are
    then ranked by the cosine of their standardised features with the prediction. MRR is the mean of
    1/rank of the second view. H@k is the share of pairs whose second view is among the first k.
    Views of equal cosine are ranked at random: both measures are the mean over their orders.

    ========= ========================================= ============================
    kind      change                                    R²
    ========= ========================================= ============================
    value     second − first                            of the number
    angle     (sin, cos) of second − first              of both numbers together
    rotation  quaternion (x, y, z, w) of first⁻¹·second of all four numbers together
    ========= ========================================= ============================

    Features are standardised with the training images' mean and deviation. The penalty, in units of
    the mean loss, is the power of ten from 100 to 1e-5 that does best on the validation pairs, for
    each factor and for the predictor; the regression is then fitted to both parts.

    Args:
      train: the images to fit.
      val: images of other objects, which choose the penalties.
      test: images of further objects, which are measured.
      kinds: the kind per factor: value, angle or rotation.
      seed: seed of the pairs.

    Raises:
      ValueError: a part has no two views of an object.
    """
    from sklearn.metrics import r2_score  # commands start faster without scikit-learn

    exact = [np.asarray(part.features, np.float64) for part in (train, val, test)]
    centre, scale = exact[0].mean(axis=0), exact[0].std(axis=0)
    scale = np.where(scale > 0, scale, 1)
    parts = [
        dataclasses.replace(part, features=(features - centre) / scale)
        for part, features in zip((train, val, test), exact, strict=True)
    ]
    fitted, chosen, tested = (
        _Pairs.of(part, kinds, seed + place) for place, part in enumerate(parts)
    )
    read = fit_quadratic(*((each.both(), each.changes) for each in (fitted, chosen)))
    predict = fit_quadratic(*((each.given(), {"second": each.second}) for each in (fitted, chosen)))
    predicted = {
        RIGHT: predict(tested.given())["second"],
        WRONG: predict(tested.with_another_change().given())["second"],
        CHANCE: np.zeros_like(tested.second),
    }
    scores = {
        name: float(r2_score(tested.changes[name], values, multioutput="variance_weighted"))
        for name, values in read(tested.both()).items()
    }
    found = {name: _retrieved(parts[2], tested, each) for name, each in predicted.items()}
    return Equivariance(scores, found)


class _Pairs(NamedTuple):
    """Pairs of views: rows, features, and the change from the first view to the second."""

    rows: Int[np.ndarray, "pairs 2"]
    first: Rows
    second: Rows
    changes: Change

    @classmethod
    def of(cls, views: Views, kinds: Mapping[str, str], seed: int) -> "_Pairs":
        """One pair for each image with another view of its object."""
        rows = pairs_of(views.objects, seed)
        first, second = rows.T
        changes = {
            name: change_of(kind, views.factors[name][first], views.factors[name][second])
            for name, kind in kinds.items()
        }
        features = views.features
        return cls(rows, features[first], features[second], changes)

    def both(self) -> list[Rows]:
        """The inputs that predict a change."""
        return [self.first, self.second]

    def given(self) -> list[Rows]:
        """The inputs that predict the second feature."""
        return [self.first, np.concatenate(list(self.changes.values()), axis=1)]

    def with_another_change(self) -> "_Pairs":
        """The pairs, each with the change of the previous pair."""
        rolled = {name: np.roll(each, 1, axis=0) for name, each in self.changes.items()}
        return self._replace(changes=rolled)


def pairs_of(objects: Int[np.ndarray, " images"], seed: int) -> Int[np.ndarray, "pairs 2"]:
    """Pairs each image with another view of its object, drawn at random; returns their rows.

    Leaves out images without another view of their object.

    Raises:
      ValueError: no image is left.
    """
    draw, pairs = np.random.default_rng(seed), []
    for rows in rows_by_label(objects).values():
        if len(rows) > 1:
            steps = draw.integers(1, len(rows), len(rows))
            partners = rows[(np.arange(len(rows)) + steps) % len(rows)]
            pairs.append(np.stack([rows, partners], axis=1))
    if not pairs:
        raise ValueError(f"none of the {len(objects)} images shows the same object as another one")
    return np.concatenate(pairs)


def change_of(kind: str, first: np.ndarray, second: np.ndarray) -> Rows:
    """The change in a factor from the first view to the second one, by the table of `equivariance`.

    Args:
      kind: value, angle or rotation.
      first: the factor's values in the first views: [pairs], for a rotation [pairs, 3].
      second: likewise in the second views.

    Raises:
      ValueError: the kind is another one.
    """
    first, second = (np.asarray(each, np.float64) for each in (first, second))
    if kind == "rotation":
        from scipy.spatial.transform import Rotation  # commands start faster without SciPy

        turns = [Rotation.from_euler("xyz", each) for each in (first, second)]
        return (turns[0].inv() * turns[1]).as_quat()
    if kind == "angle":
        return np.stack([np.sin(second - first), np.cos(second - first)], axis=1)
    if kind == "value":
        return (second - first)[:, None]
    raise ValueError(f"a factor of kind {kind!r} has no change; use value, angle or rotation")


def _retrieved(views: Views, pairs: _Pairs, predicted: Rows) -> Float[np.ndarray, "objects 3"]:
    """MRR, H@1 and H@5 per object, for predictions of the pairs' second features."""
    found = []
    rows_of = rows_by_label(views.objects)
    for each, own in rows_by_label(views.objects[pairs.rows[:, 0]]).items():
        rows = rows_of[each]
        cosines = unit_rows(predicted[own]) @ unit_rows(views.features[rows]).T
        right = np.searchsorted(rows, pairs.rows[own, 1])
        ahead = cosines - np.take_along_axis(cosines, right[:, None], axis=1)
        better, equal = np.sum(ahead > _EQUAL, axis=1), np.sum(np.abs(ahead) <= _EQUAL, axis=1)
        found.append(retrieval(better, equal).mean(axis=0))
    return np.stack(found)


def retrieval(
    better: Int[np.ndarray, " pairs"], equal: Int[np.ndarray, " pairs"]
) -> Float[np.ndarray, "pairs 3"]:
    """The mean reciprocal rank, and the shares of ranks up to 1 and up to 5, of right answers.

    Args:
      better: answers ahead of the right one.
      equal: answers as good as the right one, itself included; every order of them is as likely.
    """
    harmonic = np.append(0, np.cumsum(1 / np.arange(1, (better + equal).max() + 1)))
    mean = (harmonic[better + equal] - harmonic[better]) / equal
    hits = [np.clip(most - better, 0, equal) / equal for most in (1, 5)]
    return np.stack([mean, *hits], axis=1)


def _in_views(part: Source, images: int, most_views: int | None) -> ObjectSource:
    """Objects of a part, with at most `images` images in all and `most_views` views per object.

    Drawn objects are drawn again, with the views they need.
    """
    images = min(images, len(part))
    if isinstance(part, Drawn):
        views = min(most_views or VIEWS, images)
        return part.in_views(images // views * views, views)
    views = min(most_views or part.views, part.views)
    objects = evenly_spaced(len(part) // part.views, max(1, images // views))
    return ObjectPart(part, objects, f"{views} views of {len(objects)} objects", views)


def _run(bench: Bench, settings: EquivarianceSettings) -> list[Finding]:
    def views(part: Source, most_views: int | None) -> Views:
        images = min(settings.pairs, bench.store.limit or settings.pairs)
        source = _in_views(part, images, most_views)
        found = bench.store(source)
        factors = source.factors_of(found.places)
        return Views(found.features, found.places // source.views, factors)

    data, known = bench.data, bench.data.test.changing
    kinds = {name: factor.kind for name, factor in known.items()}
    groups = {name: factor.group for name, factor in known.items()}
    # Fits see two views per object, so that there are many objects; retrieval sees all views.
    parts = views(data.train, 2), views(data.val, 2), views(data.test, None)
    return equivariance(*parts, kinds, seed=settings.seed).findings(data.name, groups)


PROTOCOL = Protocol(
    "equivariance",
    title="Equivariance",
    takes=(DRAWN, OBJECTS),
    needs=Needs(train=10, val=2, test=2),
    settings=EquivarianceSettings,
    run=_run,
)
