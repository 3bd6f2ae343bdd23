"""Extracts the frozen encoder's features of a dataset, on all devices."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from cassle_jax.augment import AugmentSpec, center_view
from cassle_jax.evaluation.views import of_all_images, view_as_in_training
from cassle_jax.methods import Networks, ViewBatch
from cassle_jax.methods.base import PyTree
from cassle_jax.parallel import REPLICATED, SHARDED, parallel, shard_batch

Batches = Iterable[dict[str, np.ndarray]]
Extract = Callable[
    [PyTree, PyTree, Batches],
    tuple[Float[np.ndarray, "N F"], Int[np.ndarray, " N"], Int[np.ndarray, " N"]],
]


def feature_extractor(
    networks: Networks, spec: AugmentSpec, neutral: Float[Array, " D"], mesh: Mesh
) -> Extract:
    """Returns a function that turns a dataset into features; its first call compiles it.

    Images are resized to `spec.size` on their short side (bicubic), cropped at the centre and
    normalised, unless the batches already have that size. An encoder conditioned on ω gets
    `neutral`.

    Args:
      networks: the run's networks.
      spec: size and normalisation of the views.
      neutral: ω of an image that was not augmented, as the run conditions on it.
      mesh: the devices.

    Returns:
      A function of parameters, BatchNorm statistics and batches (as from `evaluation_batches`) that
      returns float32 features [N, F], integer labels [N] and the images' places in the dataset [N],
      in the dataset's order, the same in every process.
    """

    def features(params, batch_stats, batch):
        images = jax.vmap(partial(center_view, spec=spec))(batch["image"], batch["size"])
        view = ViewBatch(images, jnp.broadcast_to(neutral, (len(images), neutral.size)))
        variables = {"params": params, "batch_stats": batch_stats}
        encoded = networks.apply(variables, view, train=False, method="encode")
        return encoded, batch["label"], batch["index"], batch["mask"]

    on_devices = parallel(features, mesh, inputs=(REPLICATED, REPLICATED, SHARDED), outputs=SHARDED)

    def extract(params, batch_stats, batches):
        parts = []
        for batch in batches:
            wanted = {name: batch[name] for name in ("image", "size", "label", "index", "mask")}
            results = on_devices(params, batch_stats, shard_batch(wanted, mesh))
            *rows, mask = multihost_utils.process_allgather(results, tiled=True)
            parts.append([each[mask] for each in rows])
        return tuple(np.concatenate(each) for each in zip(*parts, strict=True))

    return extract


def view_extractor(
    networks: Networks, spec: AugmentSpec, neutral: Float[Array, " D"], mesh: Mesh
) -> Callable[[PyTree, Batches, PRNGKeyArray], Float[np.ndarray, "N F"]]:
    """Returns a function that turns one view of every image into features; compiled once.

    Args:
      networks: the run's networks.
      spec: the augmentation of the views.
      neutral: ω for an encoder that is conditioned on it.
      mesh: the devices.

    Returns:
      A function of variables, batches (as from `evaluation_batches`) and the views' random key.
    """

    def features(variables, key, batch):
        images = view_as_in_training(key, batch, spec).image
        view = ViewBatch(images, jnp.broadcast_to(neutral, (len(images), neutral.size)))
        return networks.apply(variables, view, train=False, method="encode")

    on_devices = parallel(features, mesh, inputs=(REPLICATED, REPLICATED, SHARDED), outputs=SHARDED)
    return lambda variables, batches, key: of_all_images(
        partial(on_devices, variables, key), batches, mesh
    )


def repeated_rows(
    learnt: Sequence[Float[np.ndarray, "_ features"]], tested: Float[np.ndarray, "tested features"]
) -> int:
    """Number of test rows that are bit by bit rows to learn from; 0 of collapsed features."""
    rows = [hash(row.tobytes()) for row in tested]
    known = {hash(row.tobytes()) for part in learnt for row in part}
    return sum(row in known for row in rows) if len(set(rows)) > 1 else 0
