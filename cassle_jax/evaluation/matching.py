"""Matches the two views of an image by features, and by projections with right, wrong or no ω.

Also measures how well ω alone matches, with features that say nothing about the image.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from cassle_jax.augment import AugmentSpec
from cassle_jax.evaluation.agreement import TEMPERATURE, Agreement, both_ways
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Chart, Finding, Score
from cassle_jax.evaluation.needs import Needs
from cassle_jax.evaluation.projection import (
    check_two,
    circle,
    encoder_takes_omega,
    has_projector,
    project,
    projector_takes_omega,
    with_wrong_omega,
)
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Analysis
from cassle_jax.evaluation.views import Batch, of_all_images, protocol_key, view_as_in_training
from cassle_jax.methods import Networks, ViewBatch
from cassle_jax.methods.base import PyTree
from cassle_jax.methods.build import Conditioning
from cassle_jax.parallel import REPLICATED, SHARDED, parallel

LOG = logging.getLogger(__name__)

FEATURES, RIGHT, WRONG, NONE = "features", "right ω", "wrong ω", "no ω"
PROJECTED = "what the projector sees"  # where it sees the features of an earlier stage
MEAN, ANOTHER = "ω alone (mean features)", "ω alone (another image's features)"
CHANCE = "chance"

_PAIRS_AT_ONCE = 64  # per device

Pairs = dict[str, Float[Array, "B 2 D"]]
"""Embeddings of the two views of every image, by name."""


@dataclasses.dataclass(frozen=True)
class Matching:
    """Agreement of two views of an image.

    Attributes:
      agreements: agreements by name of the compared embeddings. `FEATURES` are the encoder's.
        `RIGHT`, `WRONG` and `NONE` are projections with the view's own ω, with another image's, and
        with that of an unaugmented image; a projector without ω has `NONE` alone. `MEAN` and
        `ANOTHER` are projections, with the right ω, of features that say nothing about the image:
        the mean of all images' features, or another image's.
      images: number of images; a view is looked for among all of them.
    """

    agreements: Mapping[str, Agreement]
    images: int

    def findings(self, dataset: str) -> list[Finding]:
        """InfoNCE and accuracy as scores and as bars, beside their chance levels.

        Chance is the level of embeddings that are equal for all images. With ω alone, InfoNCE
        exceeds it where the embeddings differ by something that an image's views do not share;
        accuracy exceeds it only where ω distinguishes images.
        """
        scores, charts = [], []
        for metric, better, value, chance in (
            ("InfoNCE", False, lambda agreement: agreement.info_nce, math.log(self.images)),
            ("accuracy", True, lambda agreement: agreement.accuracy, 1 / self.images),
        ):
            points = tuple((name, value(each)) for name, each in self.agreements.items())
            points += ((CHANCE, chance),)
            scores += [
                Score(PROTOCOL.name, dataset, f"{metric}, {name}", found,
                      higher_is_better=better if name in (FEATURES, RIGHT, NONE) else None)
                for name, found in points
            ]  # fmt: skip
            charts.append(
                Chart(
                    PROTOCOL.name,
                    dataset,
                    f"{metric} of matching two views among {self.images} images",
                    "features, or the projector with",
                    metric,
                    {metric: points},
                )
            )
        return scores + charts


class ViewMatcher:
    """Measures how well views match. The first call compiles it.

    The encoder and the projector embed two views of every image, augmented as in training. The
    projector takes the view's own ω, then that of the same view of another image
    (`another_image`), then that of an unaugmented image. Each view looks for the other among the
    views of all images. So the result does not depend on the batch size, the order of the images
    or the number of devices. It depends on the number of images: matching among more is harder.

    To show the effect of ω alone, the mean of all features replaces each image's features, and so
    do the features of other images (`donors`; needs 4 images). This part leaves out encoders that
    are conditioned on ω, as they have no features without it.

    The host keeps the features and embeddings of all images.
    """

    def __init__(
        self,
        networks: Networks,
        conditioning: Conditioning,
        specs: Sequence[AugmentSpec],
        mesh: Mesh,
    ):
        """Keeps the settings of the measurement.

        Args:
          networks: the run's networks; without a projector, only features are matched.
          conditioning: the projector's conditioning.
          specs: the run's augmentation per view; the first two are compared.
          mesh: the devices.
        """
        self._networks = networks
        self._conditioning = conditioning
        self._specs = tuple(specs[:2])
        self._mesh = mesh
        compiled = partial(parallel, mesh=mesh, outputs=SHARDED)
        self._describe = compiled(self._omega, inputs=(REPLICATED, SHARDED))
        self._embed = compiled(self._embeddings, inputs=(REPLICATED, REPLICATED, SHARDED))
        self._project = compiled(self._projections, inputs=(REPLICATED, SHARDED))

    def __call__(
        self, variables: PyTree, batches: Callable[[], Iterable[Batch]], seed: int = 0
    ) -> Matching:
        """Matches the views of all images.

        Args:
          variables: `params` and `batch_stats`.
          batches: returns the batches, as `evaluation_batches` does; called twice where the
            projector takes ω.
          seed: seed of the augmentations.

        Raises:
          ValueError: there are fewer than two images, or an embedding is not finite.
        """
        circle_key, *keys = jax.random.split(protocol_key("matching", seed), 3)
        keys = jnp.stack(keys)
        conditioned = has_projector(variables) and projector_takes_omega(self._conditioning)
        if conditioned:
            describe = partial(self._describe, keys)
            analysed = with_wrong_omega(describe, batches, circle_key, self._mesh)
        else:
            analysed = batches()
        index, (omega, pairs) = of_all_images(
            lambda batch: (batch["index"], self._embed(variables, keys, batch)),
            analysed,
            self._mesh,
        )
        check_two(len(index))
        if conditioned and not encoder_takes_omega(self._networks):
            projected = pairs.get(PROJECTED, pairs[FEATURES])
            for name, features in _replaced(projected, circle_key, index).items():
                rows = _batches_of({"features": features, "omega": omega}, self._mesh)
                pairs[name] = of_all_images(partial(self._project, variables), rows, self._mesh)
        agreements = {
            name: both_ways(pairs[name], TEMPERATURE, name)
            for name in (FEATURES, RIGHT, WRONG, NONE, MEAN, ANOTHER)
            if name in pairs
        }
        return Matching(agreements, len(index))

    def _views(self, keys, batch):
        """The images of both views one after the other, and ω of both."""
        pair = [
            view_as_in_training(key, batch, spec)
            for key, spec in zip(keys, self._specs, strict=True)
        ]
        images = jnp.concatenate([view.image for view in pair])
        return images, self._conditioning.describe(pair, self._specs)

    def _omega(self, keys, batch) -> Float[Array, "B 2 P"]:
        return jnp.stack(self._views(keys, batch)[1], axis=1)

    def _embeddings(self, variables, keys, batch) -> tuple[Float[Array, "B 2 P"], Pairs]:
        """ω of the views, and all their embeddings."""
        images, right = self._views(keys, batch)
        omegas = {NONE: right}
        if "wrong" in batch:
            neutral = jnp.broadcast_to(self._conditioning.neutral, right[0].shape)
            wrong = batch["wrong"][:, 0], batch["wrong"][:, 1]
            omegas = {RIGHT: right, WRONG: wrong, NONE: (neutral, neutral)}
        views = {name: ViewBatch(images, jnp.concatenate(each)) for name, each in omegas.items()}
        by_stage = self._networks.apply(
            variables, next(iter(views.values())), train=False, method="encode_stages"
        )
        features, stage = by_stage[0], self._networks.stage
        embeddings = {FEATURES: features} | ({PROJECTED: by_stage[stage]} if stage else {})
        if has_projector(variables):
            for name, view in views.items():
                embeddings[name] = project(self._networks, variables, view, features)
        pairs = {name: jnp.stack(jnp.split(each, 2), axis=1) for name, each in embeddings.items()}
        return jnp.stack(right, axis=1), pairs

    def _projections(self, variables, batch) -> Float[Array, "B 2 D"]:
        """Projections of given features with given ω, for both views of every image."""
        pairs = batch["features"], batch["omega"]
        rows = (each.reshape(-1, each.shape[-1]) for each in pairs)
        found = self._networks.apply(variables, *rows, train=False, predict=False, method="project")
        return found.projection.reshape(*pairs[0].shape[:2], -1)


def donors(key: PRNGKeyArray, index: Int[np.ndarray, " N"]) -> Int[np.ndarray, "N 2"]:
    """Rows of two other images per image, whose features replace those of its two views.

    One half of the images gives features to first views, the other half to second views. So a first
    view and a second view never have the same image's features, and features do not affect
    matching.

    Args:
      key: the random key.
      index: the images' numbers in their dataset, all different; at least 4.
    """
    order = circle(key, index)
    givers = np.empty((len(order), 2), order.dtype)
    middle = len(order) // 2
    for view, (start, half) in enumerate(((0, order[:middle]), (middle, order[middle:]))):
        # The successor within its own half of the circle, as for `another_image`.
        givers[order, view] = half[(np.arange(len(order)) - start + 1) % len(half)]
    return givers


def _replaced(
    features: Float[np.ndarray, "N 2 F"], key: PRNGKeyArray, index: Int[np.ndarray, " N"]
) -> dict[str, Float[np.ndarray, "N 2 F"]]:
    """Features that say nothing about the view's own image, by name."""
    mean = features.mean(axis=0, dtype=np.float64).astype(features.dtype)
    replaced = {MEAN: np.broadcast_to(mean, features.shape)}
    if len(index) >= 4:
        replaced[ANOTHER] = features[donors(key, index), [0, 1]]
    return replaced


def _batches_of(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> Iterable[Batch]:
    """Batches of arrays that every process holds whole; every process yields its own share."""
    count = len(next(iter(arrays.values())))
    size = _PAIRS_AT_ONCE * mesh.size
    share = size // jax.process_count()
    for start in range(jax.process_index() * share, jax.process_index() * share + count, size):
        rows = start + np.arange(share)
        mask = rows < count
        yield {name: each[rows * mask] for name, each in arrays.items()} | {"mask": mask}


def _run(bench: Bench, settings: Analysis) -> list[Finding]:
    subject = bench.subject
    if not has_projector(subject.variables):
        LOG.info("matching of %s: by its features alone, as it has no projector", subject.name)
    elif projector_takes_omega(subject.conditioning) and encoder_takes_omega(subject.networks):
        LOG.info("matching of %s: not by ω alone, as its encoder takes ω", subject.name)
    matcher = bench.once(ViewMatcher, subject.networks, subject.conditioning, subject.views)
    batches = partial(bench.analysed, settings.analysed)
    return matcher(bench.store.variables, batches, settings.seed).findings(bench.data.name)


PROTOCOL = Protocol(
    "matching",
    title="Matching of two views",
    needs=Needs(analysed=2),
    settings=Analysis,
    run=_run,
)
