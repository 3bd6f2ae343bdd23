"""The augmentations after the crop, each a pure function of one view and its drawn values.

Views here are [rows, 3 channels, columns], RGB in [0, 1]: products over rows and over columns then
need no transposition. dm-pix does the work where its definition is the paper's and fast on CPUs.
"""

from functools import partial

import dm_pix as pix
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from cassle_jax.augment.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams
from cassle_jax.augment.resample import MOST_TERMS, PRECISION
from cassle_jax.stored import stored

__all__ = ["channel_means", "color_jitter", "gaussian_blur", "grayscale", "rotate", "solarize"]

Planes = Float32[Array, "rows 3 columns"]
Scalar = Float32[Array, ""]

# The published contrast uses the rounded weight 0.2989, the published grayscale 0.299.
_CONTRAST_WEIGHTS = (0.2989, 0.587, 0.114)
_GRAYSCALE_WEIGHTS = (0.299, 0.587, 0.114)


def color_jitter(image: Planes, params: ViewParams) -> Planes:
    """Brightness, contrast, saturation and hue, in the drawn order; unchanged if not applied.

    Saturation and hue commute, so every order of the four is H A H A H. The As are brightness and
    contrast. Each H applies saturation and hue if their turn has come, and neutral values
    otherwise. This avoids branches, all of which ``vmap`` would run.

    Args:
      image: [rows, 3, columns] in [0, 1].
      params: ``jitter``, ``jitter_order`` and the four colour values.

    Returns:
      [rows, 3, columns] in [0, 1]; bit for bit ``image`` where ``params.jitter`` is false.
    """
    place = jnp.argsort(params.jitter_order)
    contrast_first = place[CONTRAST] < place[BRIGHTNESS]

    def affine_steps_before(operation: int) -> Int32[Array, ""]:
        earlier = (place[BRIGHTNESS] < place[operation], place[CONTRAST] < place[operation])
        return earlier[0].astype(jnp.int32) + earlier[1].astype(jnp.int32)

    saturation_slot, hue_slot = affine_steps_before(SATURATION), affine_steps_before(HUE)

    jittered = image
    for slot in range(3):
        jittered = adjust_saturation_and_hue(
            jittered,
            jnp.where(saturation_slot == slot, params.saturation, 1.0),
            jnp.where(hue_slot == slot, params.hue, 0.0),
        )
        if slot < 2:
            is_contrast = contrast_first == (slot == 0)
            jittered = adjust_brightness_or_contrast(
                jittered, jnp.where(is_contrast, params.contrast, params.brightness), is_contrast
            )
    return jnp.where(params.jitter, jittered, image)


def channel_means(image: Planes) -> Float32[Array, "3"]:
    """The mean of each channel, by two sums: for one sum, XLA on CPUs takes small windows."""
    return stored(image.sum(axis=0)).sum(axis=1) / (image.shape[0] * image.shape[2])


def adjust_brightness_or_contrast(
    image: Planes, factor: Scalar, is_contrast: Bool[Array, ""]
) -> Planes:
    """``a x + (1 - a) m`` clipped to [0, 1]: m is the mean grey for contrast, 0 for brightness.

    (dm-pix's brightness adds, and its contrast uses a mean per channel.)

    Args:
      image: [rows, 3, columns] in [0, 1].
      factor: scalar a, at least 0.
      is_contrast: scalar.

    Returns:
      [rows, 3, columns] in [0, 1].
    """
    mean_grey = jnp.sum(channel_means(image) * jnp.array(_CONTRAST_WEIGHTS))
    target = jnp.where(is_contrast, mean_grey, 0.0)
    return jnp.clip(factor * image + (1 - factor) * target, 0, 1)


def adjust_saturation_and_hue(image: Planes, factor: Scalar, turns: Scalar) -> Planes:
    """Multiplies HSV saturation (clipped to [0, 1]) and shifts HSV hue.

    (dm-pix wraps the hue by a remainder, which XLA for CPUs computes number by number.)

    Args:
      image: [rows, 3, columns] in [0, 1].
      factor: scalar, at least 0.
      turns: scalar, shift of the hue.

    Returns:
      [rows, 3, columns] in [0, 1].
    """
    sextant, chroma, value = stored(_hexcone(stored(image), factor, turns))
    # What each channel lacks of the largest one, in units of chroma.
    red = jnp.clip(2 - jnp.abs(sextant - 3), 0, 1)
    green = jnp.clip(jnp.abs(sextant - 2) - 1, 0, 1)
    blue = jnp.clip(jnp.abs(sextant - 4) - 1, 0, 1)
    return stored(jnp.stack([value - chroma * lack for lack in (red, green, blue)], axis=1))


def _hexcone(image: Planes, factor: Scalar, turns: Scalar) -> tuple[Array, Array, Array]:
    """The adjusted hue and chroma, and the value, which stays.

    Hue is in sixths of a turn, from 0 to 6. Chroma is saturation times value. Comparisons by order
    find the largest channel. A test for equality with the largest value may find no channel, where
    a compiler computes the channels twice, with different rounding. A wrong answer to a tie changes
    nothing.
    """
    red, green, blue = jnp.unstack(image, axis=1)
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    is_red, is_green = (red >= green) & (red >= blue), green >= blue
    ahead = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
    start = jnp.where(is_red, 0.0, jnp.where(is_green, 2.0, 4.0))
    sextant = start + ahead / jnp.where(chroma > 0, chroma, 1) + 6 * turns
    return sextant - 6 * jnp.floor(sextant / 6), jnp.minimum(factor * chroma, value), value


def solarize(image: Planes, params: ViewParams) -> Planes:
    """Inverts all values at or above ``params.solarize_threshold``, where ``params.solarize``.

    Args:
      image: [rows, 3, columns] in [0, 1].
      params: ``solarize`` and ``solarize_threshold``.

    Returns:
      [rows, 3, columns] in [0, 1].
    """
    return jnp.where(params.solarize, pix.solarize(image, params.solarize_threshold), image)


def grayscale(image: Planes, params: ViewParams) -> Planes:
    """Puts 0.299 R + 0.587 G + 0.114 B on all channels, where ``params.grayscale`` is true.

    (dm-pix weighs red with 0.2989, and would use the halved default precision of TPUs.)

    Args:
      image: [rows, 3, columns] in [0, 1].
      params: ``grayscale``.

    Returns:
      [rows, 3, columns] in [0, 1].
    """
    grey = (image * jnp.array(_GRAYSCALE_WEIGHTS)[:, None]).sum(axis=1, keepdims=True)
    return jnp.where(params.grayscale, grey, image)


def gaussian_blur(image: Planes, params: ViewParams, kernel_size: int) -> Planes:
    """Gaussian blur with reflect padding (the edge pixel is not repeated), where ``params.blur``.

    On accelerators, two products with a banded matrix that includes the reflected borders; a
    convolution with one kernel per image is slow. On CPUs, two weighted sums of shifted images.

    Args:
      image: [size, 3, size] in [0, 1].
      params: ``blur`` and ``sigma`` in pixels.
      kernel_size: taps, odd; at most 2 size - 1.

    Returns:
      [size, 3, size] in [0, 1]; bit for bit ``image`` where ``params.blur`` is false.
    """
    sigma = jnp.where(params.blur, params.sigma, 1.0)
    by_products = partial(_blur_by_products, kernel_size=kernel_size)
    by_sums = partial(_blur_by_sums, kernel_size=kernel_size)
    on_cpus = by_sums if kernel_size <= MOST_TERMS else by_products
    blurred = lax.platform_dependent(image, sigma, cpu=on_cpus, default=by_products)
    return jnp.where(params.blur, blurred, image)


def rotate(
    image: Float32[Array, "size size 3"], turns: Int32[Array, ""]
) -> Float32[Array, "size size 3"]:
    """Rotates counter-clockwise by quarter turns.

    Args:
      image: [size, size, 3].
      turns: scalar, 0 to 3.

    Returns:
      [size, size, 3].
    """
    # A transposition and two flips make all four rotations; under vmap, a switch would run each.
    image = jnp.where(turns % 2 == 1, image.transpose(1, 0, 2), image)
    image = jnp.where((turns == 1) | (turns == 2), pix.flip_up_down(image), image)
    return jnp.where(turns >= 2, pix.flip_left_right(image), image)


def _blur_by_products(image: Planes, sigma: Scalar, kernel_size: int) -> Planes:
    band = _blur_matrix(image.shape[0], sigma, kernel_size)
    blurred = jnp.einsum("ij,jck->ick", band, image, precision=PRECISION)
    return jnp.einsum("icj,kj->ick", blurred, band, precision=PRECISION)


def _blur_by_sums(image: Planes, sigma: Scalar, kernel_size: int) -> Planes:
    """Sums shifted images, first over rows, then over columns.

    The barriers make XLA store what it would compute anew for each shift.
    """
    size, radius = len(image), kernel_size // 2
    weights = _gaussian(jnp.arange(-radius, radius + 1), sigma)
    weights = weights / weights.sum()
    around = ((radius, radius), (0, 0), (radius, radius))
    padded = lax.optimization_barrier(jnp.pad(image, around, mode="reflect"))
    down = sum(weight * padded[tap : tap + size] for tap, weight in enumerate(weights))
    down = lax.optimization_barrier(down)
    return sum(weight * down[..., tap : tap + size] for tap, weight in enumerate(weights))


def _gaussian(offset: Int32[Array, "*any"], sigma: Scalar) -> Float32[Array, "*any"]:
    return jnp.exp(-0.5 * (offset / sigma) ** 2)


def _blur_matrix(size: int, sigma: Scalar, kernel_size: int) -> Float32[Array, "{size} {size}"]:
    """The weights of the input pixels (columns) in each output pixel (row)."""
    radius = kernel_size // 2
    to, source = jnp.arange(size)[:, None], jnp.arange(size)

    def density(offset: Int32[Array, "#size size"]) -> Float32[Array, "#size size"]:
        return jnp.where(jnp.abs(offset) <= radius, _gaussian(offset, sigma), 0)

    # A tap at -j, beyond the first pixel (0), or as far beyond the last, reads pixel j instead.
    last = size - 1
    before = jnp.where(source > 0, density(-source - to), 0)
    after = jnp.where(source < last, density(2 * last - source - to), 0)
    return (density(source - to) + before + after) / density(
        jnp.arange(-radius, radius + 1)[None]
    ).sum()
