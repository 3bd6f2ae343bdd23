"""Makes the views of a step on the device: from canvases to augmented views and ω."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from cassle_jax import augment
from cassle_jax.augment import AugmentSpec
from cassle_jax.methods.auxiliary import Auxiliary
from cassle_jax.methods.base import TrainingViews, ViewBatch
from cassle_jax.methods.build import Conditioning
from cassle_jax.methods.losses import batch_offset

# The draws that paired images share, as in STL's paper.
_COLOURS = ("jitter", "jitter_order", "brightness", "contrast", "saturation", "hue", "grayscale")
_PAIRED = ("crop", *_COLOURS)


def augmented_views(
    key: PRNGKeyArray,
    images: UInt8[Array, "B H W 3"],
    sizes: Int[Array, "B 2"],
    specs: Sequence[AugmentSpec],
    axis_name: str | None = None,
    *,
    positions: Int[Array, " B"] | None = None,
    paired: bool = False,
) -> tuple[augment.View, ...]:
    """Augments every image once per entry of `specs`.

    An image's draws depend only on the key and on its position in the global batch, so any number
    of devices draws the same.

    Args:
      key: the step's random key.
      images: canvases, the picture at the top left.
      sizes: true height and width per picture, in pixels.
      specs: the augmentation per view.
      axis_name: the devices that share the global batch; `None` for a single one.
      positions: positions of the images in the global batch; `None` where `images` are this
        device's whole share.
      paired: whether the images at positions 2i and 2i + 1 share the draws of crop, jitter and
        grayscale, each within its own size.
    """
    if positions is None:
        positions = batch_positions(len(images), axis_name)

    def one_view(view_key, spec):
        image_key, order_key = jax.random.split(view_key)

        def drawn(positions):
            keys = jax.vmap(partial(jax.random.fold_in, image_key))(positions)
            draw = partial(augment.draw, spec=spec, order_key=order_key)
            return jax.vmap(draw)(keys, sizes)

        params = drawn(positions)
        if paired:
            partner = drawn(positions - positions % 2)
            params = params.replace(**{name: getattr(partner, name) for name in _PAIRED})
        return jax.vmap(lambda image, params, size: augment.apply(image, params, spec, size))(
            images, params, sizes
        )

    keys = jax.random.split(key, len(specs))
    return tuple(one_view(*each) for each in zip(keys, specs, strict=True))


def batch_positions(local_size: int, axis_name: str | None) -> Int[Array, " {local_size}"]:
    """Positions of this device's images in the global batch."""
    return batch_offset(local_size, axis_name) + jnp.arange(local_size)


def training_views(
    views: Sequence[augment.View],
    specs: Sequence[AugmentSpec],
    conditioning: Conditioning,
    auxiliaries: Sequence[Auxiliary] = (),
    given: Bool[Array, " B"] | None = None,
    further: Sequence[Float[Array, "B _ _ 3"]] = (),
) -> TrainingViews:
    """The networks' training inputs: images and ω of the views, and what auxiliaries predict.

    Args:
      views: the method's views of the same images, with a leading batch axis.
      specs: the augmentation per view.
      conditioning: defines ω.
      auxiliaries: the auxiliary objectives.
      given: which images are projected with ω, from `Conditioning.given`; `None` for all.
      further: the auxiliaries' own views; they get the ω of an unaugmented image.
    """
    descriptors = conditioning.describe(views, specs, given)
    batches = [ViewBatch(*each) for each in zip((v.image for v in views), descriptors, strict=True)]
    neutral = jnp.broadcast_to(conditioning.neutral, descriptors[0].shape)
    batches += [ViewBatch(images, neutral) for images in further]
    targets = {each.name: each.targets(views, specs) for each in auxiliaries}
    return TrainingViews(tuple(batches), targets)
