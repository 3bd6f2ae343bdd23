"""Predicts how a view was augmented from frozen features, with linear probes."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from cassle_jax.augment import DESCRIPTORS, AugmentSpec, describe
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.factor_probes import probe_factors
from cassle_jax.evaluation.findings import Chart, Finding, Score
from cassle_jax.evaluation.needs import Needs
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Analysis
from cassle_jax.evaluation.views import (
    Batch,
    of_all_images,
    plain_view,
    protocol_key,
    view_as_in_training,
)
from cassle_jax.methods import Networks, ViewBatch
from cassle_jax.methods.base import PyTree
from cassle_jax.parallel import REPLICATED, SHARDED, parallel

_HELD_OUT_OF = 4
FEWEST_IMAGES = 13
_CONSTANT = "constant answer"


@dataclasses.dataclass(frozen=True)
class Reading:
    """Scores of linear probes that predict one component of a view's descriptors.

    The probes are tested on held-out images.

    Attributes:
      metric: `R²` for numbers; `accuracy` for yes-or-no components and the quarter turns.
      from_pair: score from the features of the plain and the augmented image, side by side.
      from_augmented: score from the features of the augmented image alone.
      constant: score of the best constant answer: 0 for R², the most frequent class's share for
        accuracy.
    """

    metric: Literal["R²", "accuracy"]
    from_pair: float
    from_augmented: float
    constant: float

    def by_source(self) -> dict[str, float]:
        """The scores by what the probe sees. A constant answer's R² is 0 and is left out."""
        scores = {"plain and augmented": self.from_pair, "augmented": self.from_augmented}
        return scores | ({_CONSTANT: self.constant} if self.metric == "accuracy" else {})


@dataclasses.dataclass(frozen=True)
class AugmentationReadings:
    """Scores of linear probes that predict how views were augmented.

    Attributes:
      readings: the scores by component, such as `crop row` or `grayscale`.
      images: number of images, those held out included.
    """

    readings: Mapping[str, Reading]
    images: int

    def findings(self, dataset: str) -> list[Finding]:
        """The readings, as scores and as bars."""
        scores = [
            Score(PROTOCOL.name, dataset, f"{reading.metric} of {name}, {source}", value)
            for name, reading in self.readings.items()
            for source, value in reading.by_source().items()
            if source != _CONSTANT
        ]
        charts = [self._bars(dataset, metric) for metric in ("R²", "accuracy")]
        return [*scores, *filter(None, charts)]

    def _bars(self, dataset: str, metric: str) -> Chart | None:
        """The readings in one metric; `None` where there are none."""
        values = {
            name: reading.by_source()
            for name, reading in self.readings.items()
            if reading.metric == metric
        }
        if not values:
            return None
        sources = next(iter(values.values()))
        return Chart(
            PROTOCOL.name,
            dataset,
            f"{metric} of a linear probe on frozen features",
            "descriptor",
            metric,
            {
                source: tuple((name, each[source]) for name, each in values.items())
                for source in sources
            },
        )


def augmentation_prober(
    networks: Networks, spec: AugmentSpec, neutral: Float[Array, " D"], mesh: Mesh
) -> Callable[..., AugmentationReadings]:
    """Returns a function that probes features for augmentations; its first call compiles it.

    Encodes every image plain (its largest centred square) and augmented as in training. Holds out
    every fourth image. On the others, `probe_factors` fits a ridge regression to each component of
    each descriptor, or a logistic regression to a class, and chooses the penalty on a part of them.
    Leaves out components that are constant over the fitted or the held-out images. An encoder
    conditioned on ω gets `neutral`.

    Args:
      networks: the run's networks.
      spec: the run's augmentation.
      neutral: ω of an image that was not augmented, as the run conditions on it.
      mesh: the devices.

    Returns:
      A function of variables (`params` and `batch_stats`), batches (as from `evaluation_batches`)
      and the seed of the augmentations (default 0). Every process gets the same result. Raises
      ValueError for fewer than 13 images, features that are not finite, or augmentations that never
      differ.
    """
    encode = parallel(
        _encoding(networks, spec, neutral),
        mesh,
        inputs=(REPLICATED, REPLICATED, SHARDED),
        outputs=SHARDED,
    )

    def probe(variables: PyTree, batches: Iterable[Batch], seed: int = 0) -> AugmentationReadings:
        key = protocol_key("augmentation probes", seed)
        return read_augmentations(*of_all_images(partial(encode, variables, key), batches, mesh))

    return probe


def read_augmentations(
    plain: Float[np.ndarray, "N F"],
    augmented: Float[np.ndarray, "N F"],
    descriptors: Mapping[str, Float[np.ndarray, "N _"]],
) -> AugmentationReadings:
    """Probes features for each component of the descriptors; every fourth row is held out.

    Args:
      plain: features of the unaugmented images.
      augmented: features of one augmented view per image.
      descriptors: the descriptors of these views, by name, as `describe` returns them.

    Raises:
      ValueError: for fewer than 13 rows, features that are not finite, or descriptors that never
        differ.
    """
    if len(plain) < FEWEST_IMAGES:
        raise ValueError(f"{len(plain)} images are too few to probe; use at least {FEWEST_IMAGES}")
    held_out = np.arange(len(plain)) % _HELD_OUT_OF == _HELD_OUT_OF - 1
    factors = {
        name: values
        for name, values in _factors(descriptors).items()
        if np.ptp(values[held_out]) > 0 and np.ptp(values[~held_out]) > 0
    }
    if not factors:
        raise ValueError(
            "all views have the same augmentation, so there is nothing to predict; use "
            "augmentations that are drawn at random"
        )
    kinds = {
        name: "class" if np.issubdtype(values.dtype, np.integer) else "value"
        for name, values in factors.items()
    }
    fitted = {name: values[~held_out] for name, values in factors.items()}
    tested = {name: values[held_out] for name, values in factors.items()}
    from_pair, from_augmented = (
        probe_factors(features[~held_out], fitted, features[held_out], tested, kinds)
        for features in (np.concatenate([plain, augmented], axis=1), augmented)
    )
    readings = {
        name: _reading(from_pair[name], from_augmented[name], tested[name], kind == "class")
        for name, kind in kinds.items()
    }
    return AugmentationReadings(readings, len(plain))


def _encoding(networks: Networks, spec: AugmentSpec, neutral: Array) -> Callable[..., PyTree]:
    """Returns the function of variables, key and batch that every device runs.

    It returns plain features, augmented features and descriptors.
    """

    def encode(variables, key, batch):
        augmented = view_as_in_training(key, batch, spec)
        views = jnp.concatenate([plain_view(batch, spec).image, augmented.image])
        view = ViewBatch(views, jnp.broadcast_to(neutral, (len(views), neutral.size)))
        features = networks.apply(variables, view, train=False, method="encode")
        plain, features = jnp.split(features.astype(jnp.float32), 2)
        descriptors = jax.vmap(lambda each: describe(each, spec))(augmented)
        return plain, features, descriptors

    return encode


def _factors(descriptors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values of every component, numbers or classes [N], by name."""
    factors = {}
    for name, values in descriptors.items():
        descriptor = DESCRIPTORS[name]
        if descriptor.restates:
            continue
        if descriptor.kind == "class":
            factors[name] = values.argmax(axis=1)
        elif descriptor.kind == "binary":
            factors[name] = values[:, 0].astype(int)
        else:
            for component, column in zip(descriptor.components, values.T, strict=True):
                factors[f"{name} {component}"] = column
    return factors


def _reading(
    from_pair: float, from_augmented: float, tested: np.ndarray, is_class: bool
) -> Reading:
    """The reading of a component, from its scores by `probe_factors`."""
    if not is_class:
        return Reading("R²", from_pair, from_augmented, 0.0)
    constant = np.unique(tested, return_counts=True)[1].max() / len(tested)
    pair, augmented = (1 - (1 - score) * (1 - constant) for score in (from_pair, from_augmented))
    return Reading("accuracy", float(pair), float(augmented), float(constant))


def _run(bench: Bench, settings: Analysis) -> list[Finding]:
    subject = bench.subject
    prober = bench.once(
        augmentation_prober, subject.networks, subject.spec, subject.conditioning.neutral
    )
    batches = bench.analysed(settings.analysed)
    return prober(bench.store.variables, batches, settings.seed).findings(bench.data.name)


PROTOCOL = Protocol(
    "augmentation_probes",
    title="Augmentation probes",
    needs=Needs(analysed=FEWEST_IMAGES),
    settings=Analysis,
    run=_run,
)
