"""Makes the views of a step on the device: a batch of canvases in, augmented views and ω out."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, UInt8

from cassle_jax import augment
from cassle_jax.augment import AugmentSpec
from cassle_jax.methods import TrainingViews, ViewBatch
from cassle_jax.methods.losses import batch_offset


def augmented_pair(
    key: PRNGKeyArray,
    images: UInt8[Array, "B H W 3"],
    sizes: Int[Array, "B 2"],
    spec: AugmentSpec,
    axis_name: str | None = None,
) -> tuple[augment.View, augment.View]:
    """Two views of every image.

    Each image's draws depend on the key and on its position in the global batch alone, so any
    number of devices draws the same.

    Args:
      key: of the step.
      images: canvases, the picture at the top left.
      sizes: true height and width of each picture, in pixels.
      spec: what is drawn.
      axis_name: the devices that share the global batch; `None` for a single one.
    """
    position = batch_offset(len(images), axis_name) + jnp.arange(len(images))

    def one_view(view_key):
        image_key, order_key = jax.random.split(view_key)
        image_keys = jax.vmap(partial(jax.random.fold_in, image_key))(position)
        make = partial(augment.augment, spec=spec, order_key=order_key)
        return jax.vmap(lambda key, image, size: make(key, image, size=size))(
            image_keys, images, sizes
        )

    first, second = jax.random.split(key)
    return one_view(first), one_view(second)


def training_views(
    pair: tuple[augment.View, augment.View],
    spec: AugmentSpec,
    descriptors: tuple[str, ...],
    predicted: tuple[str, ...],
) -> TrainingViews:
    """What the networks train on: the pair's images, its ω, and AugSelf's targets.

    Args:
      pair: the two augmented views, with a leading batch axis.
      spec: they were made with.
      descriptors: names that make up ω; empty for none.
      predicted: names of the differences AugSelf predicts; empty for none.
    """
    describe = jax.vmap(partial(augment.describe, spec=spec))
    difference = jax.vmap(partial(augment.difference, spec=spec))

    def view_batch(view):
        if not descriptors:
            return ViewBatch(view.image, jnp.zeros((len(view.image), 0)))
        return ViewBatch(view.image, augment.concatenate(describe(view), descriptors))

    first, second = pair
    differences = ({}, {})
    if predicted:
        both = difference(first, second), difference(second, first)
        differences = tuple({name: each[name] for name in predicted} for each in both)
    return TrainingViews((view_batch(first), view_batch(second)), differences)
