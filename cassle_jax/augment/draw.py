"""Draws the augmentation of one image: every random choice of a view, and nothing else."""

import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Integer, PRNGKeyArray

from cassle_jax.augment.inputs import check_key, check_size, check_spec, in_float32
from cassle_jax.augment.spec import AugmentSpec

__all__ = ["BRIGHTNESS", "CONTRAST", "HUE", "SATURATION", "Size", "ViewParams", "draw"]

# The colour operations in ViewParams.jitter_order.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_CROP_TRIES = 10
# A new step goes last: the keys of the others then stay the same.
_STEPS = ("flip", "jitter", "order", "grayscale", "blur", "solarize", "rotation")

Size = Integer[Array | np.ndarray, "2"]
"""Height and width of the real picture within its canvas, pixels; may be traced."""


@chex.dataclass(frozen=True, mappable_dataclass=False)
class ViewParams:
    """All random choices for one view; leading axes hold those of several.

    The values of an operation (``sigma`` of ``blur``, the four colour values of ``jitter``, ...)
    have a meaning only where its flag is true.

    Attributes:
      crop: top, left, height, width of the box, as fractions of the image.
      flip: whether the view is mirrored left to right.
      jitter: whether the colour jitter is applied.
      jitter_order: the four colour operations in the order they run: 0 brightness, 1 contrast,
        2 saturation, 3 hue.
      brightness: factor.
      contrast: factor.
      saturation: factor.
      hue: shift, in turns.
      grayscale: whether the view is turned grey.
      blur: whether the view is blurred.
      sigma: standard deviation of the blur, pixels of the view.
      solarize: whether the view is solarized.
      solarize_threshold: values at or above it are inverted, in [0, 1].
      turns: quarter turns counter-clockwise, 0 to 3; 0 where no rotation is applied.
    """

    crop: Float32[Array, "*batch 4"]
    flip: Bool[Array, "*batch"]
    jitter: Bool[Array, "*batch"]
    jitter_order: Int32[Array, "*batch 4"]
    brightness: Float32[Array, "*batch"]
    contrast: Float32[Array, "*batch"]
    saturation: Float32[Array, "*batch"]
    hue: Float32[Array, "*batch"]
    grayscale: Bool[Array, "*batch"]
    blur: Bool[Array, "*batch"]
    sigma: Float32[Array, "*batch"]
    solarize: Bool[Array, "*batch"]
    solarize_threshold: Float32[Array, "*batch"]
    turns: Int32[Array, "*batch"]


@in_float32
def draw(
    key: PRNGKeyArray, size: Size, spec: AugmentSpec, order_key: PRNGKeyArray | None = None
) -> ViewParams:
    """Draws the parameters of one view of one image (CASSLE, arXiv 2306.06082, augmentations t).

    Every step has its own random key, so a change of one step's spec leaves the draws of the others
    unchanged.

    Args:
      key: random key, used for this view only.
      size: int [2], height and width of the image in pixels; decides which boxes fit.
      spec: the distribution to draw from.
      order_key: random key of the order of the colour operations where ``spec.jitter_order`` is
        'batch': the same one for all images of a batch. Unused otherwise.

    Returns:
      ViewParams without batch axes.

    Raises:
      ValueError: if the key or the size belongs to several images, ``spec`` is no ``AugmentSpec``,
        ``spec.jitter_order`` is 'batch' without an ``order_key``, or the two keys are of different
        generators.
    """
    check_spec(spec)
    check_size(size)
    key = check_key("key", key)
    if spec.jitter_order == "batch" and order_key is None:
        raise ValueError(
            "augment.jitter_order='batch' needs the order_key that the batch shares; pass "
            "order_key to draw, or use augment.jitter_order='image'"
        )
    if order_key is not None:
        like = key if spec.jitter_order == "batch" else None
        order_key = check_key("order_key", order_key, like=like)
    crop_key, *step_keys = jax.random.split(key, 1 + len(_STEPS))
    keys = dict(zip(_STEPS, step_keys, strict=True))
    if spec.jitter_order == "batch":
        keys["order"] = order_key
    size = jnp.asarray(size)
    # The numbers of all steps in one call: five per step, the most that one step needs.
    numbers = jax.vmap(lambda step: jax.random.uniform(step, (5,)))(jnp.stack(list(keys.values())))
    # Tuples refuse a place that does not exist; JAX would repeat the last number.
    uniform = dict(zip(_STEPS, map(jnp.unstack, numbers), strict=True))
    turns = jnp.floor(4 * uniform["rotation"][1]).astype(jnp.int32)
    return ViewParams(
        crop=_draw_crop(crop_key, size, spec) if spec.crop else jnp.array([0.0, 0.0, 1.0, 1.0]),
        flip=uniform["flip"][0] < spec.flip,
        jitter=uniform["jitter"][0] < spec.jitter,
        jitter_order=jnp.argsort(jnp.stack(uniform["order"][:4])).astype(jnp.int32),
        brightness=_between(uniform["jitter"][1], spec.brightness),
        contrast=_between(uniform["jitter"][2], spec.contrast),
        saturation=_between(uniform["jitter"][3], spec.saturation),
        hue=_between(uniform["jitter"][4], spec.hue),
        grayscale=uniform["grayscale"][0] < spec.grayscale,
        blur=uniform["blur"][0] < spec.blur,
        sigma=_between(uniform["blur"][1], spec.sigma),
        solarize=uniform["solarize"][0] < spec.solarize,
        solarize_threshold=_between(uniform["solarize"][1], spec.solarize_threshold),
        turns=jnp.where(uniform["rotation"][0] < spec.rotation, turns, 0),
    )


def _between(uniform: Float32[Array, "*shape"], ends: Sequence[float]) -> Float32[Array, "*shape"]:
    low, high = ends
    return low + uniform * (high - low)


def _draw_crop(key: PRNGKeyArray, size: Size, spec: AugmentSpec) -> Float32[Array, "4"]:
    """Torchvision's rule: the first of ten boxes that fits, else the largest centred one."""
    image_height, image_width = size.astype(jnp.float32)
    area, aspect, row, column = jax.random.uniform(key, (4, _CROP_TRIES))
    area = _between(area, spec.crop_area) * image_height * image_width
    low, high = spec.crop_aspect
    aspect = jnp.exp(_between(aspect, (math.log(low), math.log(high))))
    width = jnp.round(jnp.sqrt(area * aspect))
    height = jnp.round(jnp.sqrt(area / aspect))
    fits = (width > 0) & (width <= image_width) & (height > 0) & (height <= image_height)
    top = _integer_up_to(row, image_height - height)
    left = _integer_up_to(column, image_width - width)
    first = jnp.argmax(fits)
    drawn = jnp.stack([top, left, height, width])[:, first]
    box = jnp.where(fits[first], drawn, _centred_box(image_height, image_width, spec))
    return box / jnp.stack([image_height, image_width, image_height, image_width])


def _integer_up_to(
    uniform: Float32[Array, " tries"], largest: Float32[Array, " tries"]
) -> Float32[Array, " tries"]:
    """Uniform over the integers 0 to ``largest``, both included."""
    return jnp.minimum(jnp.floor(uniform * (largest + 1)), largest)


def _centred_box(
    image_height: Float32[Array, ""], image_width: Float32[Array, ""], spec: AugmentSpec
) -> Float32[Array, "4"]:
    """The largest centred box whose aspect is allowed: top, left, height, width in pixels."""
    low, high = spec.crop_aspect
    height = jnp.minimum(image_height, jnp.round(image_width / low))
    width = jnp.minimum(image_width, jnp.round(image_height * high))
    height, width = jnp.maximum(height, 1), jnp.maximum(width, 1)
    top = jnp.floor((image_height - height) / 2)
    left = jnp.floor((image_width - width) / 2)
    return jnp.stack([top, left, height, width])
