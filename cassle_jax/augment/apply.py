"""Applies drawn parameters to one image: canvas in, normalised view out."""

import chex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from cassle_jax.augment import operations
from cassle_jax.augment.draw import Size, ViewParams, draw
from cassle_jax.augment.inputs import check_params, check_spec, check_type, in_float32
from cassle_jax.augment.resample import Canvas, crop_and_resize, size_of
from cassle_jax.augment.spec import SWITCHES, AugmentSpec

__all__ = ["View", "apply", "augment", "denormalize"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class View:
    """One augmented image and how it was made; leading axes hold several.

    Attributes:
      image: normalised RGB.
      params: the parameters that were applied.
      color_diff: per channel, mean before the colour jitter minus mean after it, in [-1, 1].
    """

    image: Float32[Array, "*batch size size 3"]
    params: ViewParams
    color_diff: Float32[Array, "*batch 3"]


@in_float32
def apply(image: Canvas, params: ViewParams, spec: AugmentSpec, size: Size | None = None) -> View:
    """Augments one image as ``params`` say, in CASSLE's order (arXiv 2306.06082).

    Crop, resize and flip; colour jitter; solarize; grayscale; blur; rotation; normalisation. Where
    ``spec.solarize_after`` is 'blur', solarize comes after blur. Steps whose probability is 0 in
    the spec are left out of the compiled program, whatever ``params`` contain for them: the view's
    own ``params`` then say that they were not applied. Crop and flip are always as ``params`` say.

    Args:
      image: [height, width, 3] canvas, RGB, uint8 or float in [0, 1]; values outside the picture
        do not matter as long as they are finite. Traced values, as under ``jax.jit`` and
        ``jax.vmap``, cannot be refused: a view of floats outside [0, 1] is then NaN.
      params: one view's parameters.
      spec: gives S, the blur's kernel, mean and std, and the steps to compile.
      size: int [2], height and width of the picture at the canvas's top left; None: all of it.

    Returns:
      View with image [S, S, 3].

    Raises:
      ValueError: if the image is not one valid image, such as a grey image or a batch, or the
        parameters are not those of one view.
    """
    check_spec(spec)
    check_type("params", params, ViewParams, "ViewParams, such as view.params")
    params = _without_left_out(check_params(params), spec)
    view = crop_and_resize(image, params.crop, params.flip, spec.size, size)
    color_diff = jnp.zeros(3)
    if spec.jitter:
        jittered = operations.color_jitter(view, params)
        color_diff = operations.channel_means(view) - operations.channel_means(jittered)
        color_diff = jnp.where(params.jitter, color_diff, 0)
        view = jittered
    if spec.solarize and spec.solarize_after == "jitter":
        view = operations.solarize(view, params)
    if spec.grayscale:
        view = operations.grayscale(view, params)
    if spec.blur:
        view = operations.gaussian_blur(view, params, spec.blur_kernel_size)
    if spec.solarize and spec.solarize_after == "blur":
        view = operations.solarize(view, params)
    view = view.transpose(0, 2, 1)
    if spec.rotation:
        view = operations.rotate(view, params.turns)
    view = (view - jnp.array(spec.mean)) / jnp.array(spec.std)
    return View(image=view, params=params, color_diff=color_diff)


def _without_left_out(params: ViewParams, spec: AugmentSpec) -> ViewParams:
    """The parameters; steps that the spec leaves out are switched off."""
    left_out = [
        field for name, field in SWITCHES.items() if name != "flip" and not getattr(spec, name)
    ]
    return params.replace(**{field: jnp.zeros_like(getattr(params, field)) for field in left_out})


def augment(
    key: PRNGKeyArray,
    image: Canvas,
    spec: AugmentSpec,
    size: Size | None = None,
    order_key: PRNGKeyArray | None = None,
) -> View:
    """Draws and applies: one random view of one image; ``vmap`` over key, image and size for many.

    Args:
      key: random key, used for this view only.
      image: [height, width, 3] canvas, RGB, uint8 or float in [0, 1].
      spec: the distribution of the augmentations.
      size: int [2], height and width of the picture at the canvas's top left; None: all of it.
      order_key: see ``draw``; the batch's shared key where ``spec.jitter_order`` is 'batch'.

    Returns:
      View with image [S, S, 3].

    Raises:
      ValueError: if the image is not one valid image, such as a grey image or a batch; or if
        ``spec.jitter_order`` is 'batch' and there is no ``order_key``.
    """
    true_size = size_of(image, size)
    return apply(image, draw(key, true_size, spec, order_key), spec, true_size)


@in_float32
def denormalize(
    image: Float[Array, "*batch height width 3"], spec: AugmentSpec
) -> Float[Array, "*batch height width 3"]:
    """Turns normalised views back into pictures.

    Args:
      image: [..., height, width, 3], normalised with the spec's mean and std.
      spec: gives mean and std.

    Returns:
      [..., height, width, 3], RGB clipped to [0, 1].

    Raises:
      ValueError: if the last axis is not RGB, or ``spec`` is not an ``AugmentSpec``.
    """
    check_spec(spec)
    if np.ndim(image) < 3 or image.shape[-1] != 3:
        raise ValueError(
            f"image has shape {np.shape(image)}; use [..., height, width, 3], channels last"
        )
    return jnp.clip(image * jnp.array(spec.std) + jnp.array(spec.mean), 0, 1)
