"""Matches images by their embeddings, the projector told the right ω, another image's, or none.

And by ω alone: the projector told the right ω, of features that say nothing of the image.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cassle_jax.augment import AugmentSpec
from cassle_jax.checks import check_positive
from cassle_jax.evaluation.findings import Chart, Finding, Score
from cassle_jax.evaluation.views import Batch, of_all_images, protocol_key, view_as_in_training
from cassle_jax.methods import Networks, ViewBatch
from cassle_jax.methods.base import PyTree
from cassle_jax.methods.build import Conditioning
from cassle_jax.methods.losses import batch_offset, normalize
from cassle_jax.models.conditioning import is_conditioned
from cassle_jax.parallel import REPLICATED, SHARDED, parallel

FEATURES, RIGHT, WRONG, NONE = "features", "right ω", "wrong ω", "no ω"
MEAN, ANOTHER = "ω alone (mean features)", "ω alone (another image's features)"
CHANCE = "chance"
TEMPERATURE = 0.2

_ROWS_AT_ONCE = 1024
_PAIRS_AT_ONCE = 64  # for each device


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well the embeddings of one view of the images agree with those of another.

    Attributes:
      same: mean cosine similarity of an image's two embeddings.
      different: that of an image's first embedding and another one's second, over all pairs of
        different images.
      info_nce: −log of the softmax of similarities / temperature at the image's own embedding,
        among those of the candidates; log of their number is what chance gets.
      accuracy: share of the images whose own embedding is the most similar of the candidates.
    """

    same: float
    different: float
    info_nce: float
    accuracy: float

    @property
    def difference(self) -> float:
        """How much more an image resembles itself than another one."""
        return self.same - self.different


@dataclasses.dataclass(frozen=True)
class Matching:
    """How well two views of an image find each other.

    Attributes:
      agreements: of the encoder's `FEATURES`, and of the projections by what the projector is told:
        `RIGHT`, `WRONG` and `NONE`; of a projector that takes no ω the last alone, and none where
        there is no projector. `MEAN` and `ANOTHER` are how well ω alone matches: the projector is
        told the right ω, of features that are those of all images on average or another image's.
      images: number of images; a view is looked for among all of them.
    """

    agreements: Mapping[str, Agreement]
    images: int

    def findings(self, dataset: str) -> list[Finding]:
        """InfoNCE and accuracy as scores and as bars, beside those of chance.

        Chance is what equal embeddings of all images get. By ω alone, InfoNCE is above it where
        embeddings differ with what no image has in common in its views. Accuracy is above it only
        where ω tells images apart.
        """
        scores, charts = [], []
        for metric, better, value, chance in (
            ("InfoNCE", False, lambda agreement: agreement.info_nce, math.log(self.images)),
            ("accuracy", True, lambda agreement: agreement.accuracy, 1 / self.images),
        ):
            points = tuple((name, value(each)) for name, each in self.agreements.items())
            points += ((CHANCE, chance),)
            scores += [
                Score("matching", dataset, f"{metric}, {name}", found,
                      higher_is_better=better if name in (FEATURES, RIGHT, NONE) else None)
                for name, found in points
            ]  # fmt: skip
            charts.append(
                Chart(
                    "matching",
                    dataset,
                    f"{metric} of matching two views among {self.images} images",
                    "features, or the projector told",
                    metric,
                    {metric: points},
                )
            )
        return scores + charts


def view_matcher(
    networks: Networks,
    conditioning: Conditioning,
    specs: Sequence[AugmentSpec],
    mesh: Mesh,
    *,
    temperature: float = TEMPERATURE,
) -> Callable[..., Matching]:
    """A function that measures how views match; it is compiled once, at its first call.

    Two views of every image, augmented as in training, are embedded by encoder and projector. Each
    is told its own ω, then that of the same view of another image (`another_of_each`), then that of
    an image as it is; either view looks for the other among those of all images, so that neither
    the batch's size nor the images' order nor the number of devices counts. Compare numbers of
    equally many images only: more are harder to tell apart. Features are told, if anything, ω.

    What ω does by itself is seen where the features are replaced: all by their mean, or those of
    either view by another image's (`donors_of_each`; from 4 images on). It is left out where ω
    enters the encoder with the image, as then no features are without it.

    The host keeps the features and embeddings of all images.

    Args:
      networks: of the run; without a projector, features alone are matched.
      conditioning: of the projector.
      specs: how the run augments each view; the first two are compared.
      mesh: the devices.
      temperature: of InfoNCE.

    Returns:
      A function of variables (`params` and `batch_stats`), of a function that gives the batches (as
      from `evaluation_batches`), which is called twice where the projector takes ω, and, by default
      0, of the seed of the augmentations. It raises ValueError for fewer than two images or an
      embedding that is not finite.

    Raises:
      ValueError: A temperature that is not positive.
    """
    check_positive(temperature=temperature)
    specs = tuple(specs[:2])

    def views(keys, batch):
        pair = [view_as_in_training(*each) for each in zip(keys, [batch] * 2, specs, strict=True)]
        return jnp.concatenate([view.image for view in pair]), conditioning.describe(pair, specs)

    def describe(keys, batch):
        return jnp.stack(views(keys, batch)[1], axis=1)

    def embed(variables, keys, batch):
        """ω of the views, and all embeddings by name."""
        images, right = views(keys, batch)
        told = {NONE: right}
        if "wrong" in batch:
            wrong = batch["wrong"][:, 0], batch["wrong"][:, 1]
            neutral = jnp.broadcast_to(conditioning.neutral, right[0].shape)
            told = {RIGHT: right, WRONG: wrong, NONE: (neutral, neutral)}
        told = {name: ViewBatch(images, jnp.concatenate(each)) for name, each in told.items()}
        features = networks.apply(variables, next(iter(told.values())), train=False,
                                  method="encode")  # fmt: skip
        embeddings = {FEATURES: features}
        if has_projector(variables):
            for name, view in told.items():
                embeddings[name] = project(networks, variables, view, features)
        pairs = {name: jnp.stack(jnp.split(each, 2), axis=1) for name, each in embeddings.items()}
        return jnp.stack(right, axis=1), pairs

    def project_pairs(variables, batch):
        pairs = batch["features"], batch["omega"]
        rows = (each.reshape(-1, each.shape[-1]) for each in pairs)
        found = networks.apply(variables, *rows, train=False, predict=False, method="project")
        return found.projection.reshape(*pairs[0].shape[:2], -1)

    describe = parallel(describe, mesh, inputs=(REPLICATED, SHARDED), outputs=SHARDED)
    embed = parallel(embed, mesh, inputs=(REPLICATED, REPLICATED, SHARDED), outputs=SHARDED)
    project_pairs = parallel(project_pairs, mesh, inputs=(REPLICATED, SHARDED), outputs=SHARDED)

    def match(variables: PyTree, batches: Callable[[], Iterable[Batch]], seed: int = 0) -> Matching:
        circle_key, *keys = jax.random.split(protocol_key("matching", seed), 3)
        keys = jnp.stack(keys)
        told_wrong = has_projector(variables) and takes_descriptor(conditioning)
        index, (omega, found) = of_all_images(
            lambda batch: (batch["index"], embed(variables, keys, batch)),
            told_of_another(partial(describe, keys), batches, circle_key, mesh)
            if told_wrong
            else batches(),
            mesh,
        )
        images = len(index)
        check_two(images)
        if told_wrong and not told_with_image(networks):
            for name, features in _replaced(found[FEATURES], circle_key, index).items():
                rows = rows_of({"features": features, "omega": omega}, mesh)
                found[name] = of_all_images(partial(project_pairs, variables), rows, mesh)
        names = (FEATURES, RIGHT, WRONG, NONE, MEAN, ANOTHER)
        order = [name for name in names if name in found]
        return Matching(
            {name: _both_ways(found[name], temperature, name) for name in order}, images
        )

    return match


def takes_descriptor(conditioning: Conditioning) -> bool:
    """Whether the projector's result depends on ω."""
    used = is_conditioned(conditioning.treatment, conditioning.injection)
    return used and bool(conditioning.descriptors) and conditioning.into != "predictor"


def told_with_image(networks: Networks) -> bool:
    """Whether ω enters the encoder, with the image."""
    return "image_conditioner" in networks.factories


def has_projector(variables: PyTree) -> bool:
    """Whether there are weights of a projector."""
    return "projector" in variables["params"]


def project(
    networks: Networks, variables: PyTree, view: ViewBatch, features: Float[Array, "B F"]
) -> Float[Array, "B D"]:
    """The projection of a view, told `view.descriptor`.

    Args:
      networks: of the run.
      variables: `params` and `batch_stats`.
      view: images and ω.
      features: what the encoder makes of the images; computed anew only where it is told ω too.
    """

    def projection(bound: Networks) -> Float[Array, "B D"]:
        y = bound.encode(view, train=False) if told_with_image(bound) else features
        return bound.projector(y, view.descriptor, False)

    return networks.apply(variables, method=projection)


def another_of_each(key: PRNGKeyArray, index: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """For each image the row of another one, and for no two images the same.

    The images stand in a circle in an order drawn by key, and each gets the next one. Whom an image
    gets depends on the key and on which images there are, not on their order.

    Args:
      key: random key.
      index: of the images in their dataset, each once.

    Raises:
      ValueError: If there are fewer than two images.
    """
    check_two(len(index))
    circle = _circle(key, index)
    another = np.empty_like(circle)
    another[circle] = np.roll(circle, -1)
    return another


def donors_of_each(key: PRNGKeyArray, index: Int[np.ndarray, " N"]) -> Int[np.ndarray, "N 2"]:
    """For each image the rows of two other ones, whose features replace those of its two views.

    One half of the images gives to first views and the other half to second ones. So no first view
    has the same image's features as any second view, and features neither help to match nor
    mislead.

    Args:
      key: random key.
      index: of the images in their dataset, each once; 4 at least.
    """
    circle = _circle(key, index)
    donors = np.empty((len(circle), 2), circle.dtype)
    middle = len(circle) // 2
    for view, (start, half) in enumerate(((0, circle[:middle]), (middle, circle[middle:]))):
        # Within its own half the next in the circle, as for `another_of_each`.
        donors[circle, view] = half[(np.arange(len(circle)) - start + 1) % len(half)]
    return donors


def _circle(key: PRNGKeyArray, index: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """The rows of the images in an order drawn by key."""
    of_image = jax.vmap(lambda each: jax.random.bits(jax.random.fold_in(key, each)))
    return np.lexsort((index, np.asarray(of_image(index))))


def _replaced(
    features: Float[np.ndarray, "N 2 F"], key: PRNGKeyArray, index: Int[np.ndarray, " N"]
) -> dict[str, Float[np.ndarray, "N 2 F"]]:
    """Features that say nothing of the own image, by their name."""
    mean = features.mean(axis=0, dtype=np.float64).astype(features.dtype)
    replaced = {MEAN: np.broadcast_to(mean, features.shape)}
    if len(index) >= 4:
        replaced[ANOTHER] = features[donors_of_each(key, index), [0, 1]]
    return replaced


def rows_of(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> Iterable[Batch]:
    """Arrays that every process holds whole, as batches of which each process has its share."""
    count = len(next(iter(arrays.values())))
    size = _PAIRS_AT_ONCE * mesh.size
    share = size // jax.process_count()
    for start in range(jax.process_index() * share, jax.process_index() * share + count, size):
        rows = start + np.arange(share)
        mask = rows < count
        yield {name: each[rows * mask] for name, each in arrays.items()} | {"mask": mask}


def told_of_another(
    describe: Callable[[Batch], Float[Array, "B ..."]],
    batches: Callable[[], Iterable[Batch]],
    key: PRNGKeyArray,
    mesh: Mesh,
) -> Iterable[Batch]:
    """The batches, with another image's ω as `wrong`; zeros in rows without an image.

    Args:
      describe: ω of a sharded batch's images, sharded.
      batches: gives the batches; called twice.
      key: of `another_of_each`.
      mesh: the devices.

    Raises:
      ValueError: If there are fewer than two images.
    """
    index, omega = of_all_images(lambda batch: (batch["index"], describe(batch)), batches(), mesh)
    wrong = dict(zip(index.tolist(), omega[another_of_each(key, index)], strict=True))
    nothing = np.zeros_like(omega[0])
    for batch in batches():
        rows = [wrong.get(image, nothing) for image in batch["index"].tolist()]
        yield {**batch, "wrong": np.stack(rows)}


def check_two(images: int) -> None:
    """Refuses fewer than two images.

    Raises:
      ValueError: saying how many there are.
    """
    if images < 2:
        raise ValueError(f"{images} images are too few to compare; 2 is the least")


@struct.dataclass
class BatchRows:
    """Where this device's rows stand among the candidates, those of the global batch.

    Attributes:
      real: of the candidates, those that hold an image.
      position: of this device's rows.
    """

    real: Bool[Array, " N"]
    position: Int[Array, " B"]

    @property
    def counted(self) -> Bool[Array, " B"]:
        """This device's rows that hold an image."""
        return self.real[self.position]


def batch_rows(mask: Bool[Array, " B"], axis_name: str | None) -> BatchRows:
    """Whom this device's rows are compared with.

    Args:
      mask: this device's rows that hold an image.
      axis_name: the devices that share the batch; `None` for a single one.
    """
    position = batch_offset(len(mask), axis_name) + jnp.arange(len(mask))
    real = mask if axis_name is None else jax.lax.all_gather(mask, axis_name, tiled=True)
    return BatchRows(real, position)


@struct.dataclass
class AgreementSums:
    """Sums over images of what `Agreement` is made of.

    Attributes:
      same: of the cosine similarities of their two embeddings.
      queries: of their first embeddings, scaled to unit length.
      keys: of their second embeddings, likewise.
      info_nce: of those with other candidates than themselves.
      matched: number of those whose own embedding is the most similar candidate.
    """

    same: Float[Array | np.ndarray, ""]
    queries: Float[Array | np.ndarray, " D"]
    keys: Float[Array | np.ndarray, " D"]
    info_nce: Float[Array | np.ndarray, ""]
    matched: Float[Array | np.ndarray, ""]


@struct.dataclass
class Counts:
    """Of images that are compared.

    Attributes:
      images: number of images.
      ranked: of those with other candidates than themselves.
      candidates: sum of their numbers of candidates.
    """

    images: Float[Array | np.ndarray, ""]
    ranked: Float[Array | np.ndarray, ""]
    candidates: Float[Array | np.ndarray, ""]


def agreement_sums(
    rows: BatchRows,
    queries: Float[Array, "B D"],
    keys: Float[Array, "N D"],
    temperature: float | Float[Array, ""],
) -> AgreementSums:
    """The sums over this device's images.

    Args:
      rows: of this device.
      queries: this device's embeddings, of any length.
      keys: the other embeddings of all candidates, of unit length.
      temperature: of InfoNCE.
    """

    def compare(row):
        query, own = row
        # Accelerators would otherwise round the factors to bfloat16 or TF32.
        similarities = jnp.matmul(keys, query, precision=jax.lax.Precision.HIGHEST)
        logits = jnp.where(rows.real, similarities / temperature, -jnp.inf)
        info_nce = optax.softmax_cross_entropy_with_integer_labels(logits, own)
        return similarities[own], info_nce, jnp.argmax(logits) == own

    queries = normalize(queries)
    same, info_nce, matched = jax.lax.map(
        compare, (queries, rows.position), batch_size=_ROWS_AT_ONCE
    )

    def total(values):
        counted = rows.counted.reshape(-1, *[1] * (values.ndim - 1))
        return jnp.sum(jnp.where(counted, values, 0.0), axis=0)

    ranked = rows.real.sum() > 1
    return AgreementSums(
        same=total(same),
        queries=total(queries),
        keys=total(keys[rows.position]),
        info_nce=ranked * total(info_nce),
        matched=ranked * total(matched),
    )


def counts(rows: BatchRows) -> Counts:
    """This device's share."""
    images = rows.counted.sum(dtype=jnp.float32)
    candidates = rows.real.sum(dtype=jnp.float32)
    ranked = jnp.where(candidates > 1, images, 0)
    return Counts(images, ranked, ranked * candidates)


def agreement(sums: AgreementSums, counts: Counts, name: str) -> Agreement:
    """The means over the images.

    Args:
      sums: over all devices and batches.
      counts: likewise.
      name: of what was compared, for the message.

    Raises:
      ValueError: If one is not finite.
    """
    sums, counts = jax.tree.map(partial(np.asarray, dtype=np.float64), (sums, counts))
    # All pairs' similarities but those of an image with itself.
    different = np.vdot(sums.queries, sums.keys) - sums.same
    found = Agreement(
        same=float(sums.same / counts.images),
        different=float(different / (counts.images * (counts.images - 1))),
        info_nce=float(sums.info_nce / counts.ranked),
        accuracy=float(sums.matched / counts.ranked),
    )
    if not np.isfinite(dataclasses.astuple(found)).all():
        raise ValueError(f"the embeddings compared as {name!r} hold values that are not finite")
    return found


def _both_ways(embeddings: Float[np.ndarray, "N 2 D"], temperature: float, name: str) -> Agreement:
    """The mean of what either view's looking for the other gives."""
    there = _among_all(embeddings[:, 0], embeddings[:, 1], temperature)
    back = _among_all(embeddings[:, 1], embeddings[:, 0], temperature)
    ways = [dataclasses.astuple(agreement(*each, name)) for each in (there, back)]
    return Agreement(*(float(each) for each in np.mean(ways, axis=0)))


@jax.jit
def _among_all(
    queries: Float[Array, "N D"], keys: Float[Array, "N D"], temperature: float | Float[Array, ""]
) -> tuple[AgreementSums, Counts]:
    rows = batch_rows(jnp.ones(len(keys), bool), None)
    return agreement_sums(rows, queries, normalize(keys), temperature), counts(rows)
