"""Crops and resizes straight from the padded canvas, as Pillow would: by two matrix products.

A row of a weight matrix has the weights with which the canvas's rows (or columns) enter one output
row (or column). They follow Pillow's antialiasing: where the image shrinks, the filter is stretched
by the scale, cut off at the box, and normalised, so nothing outside the box reaches the view.
On CPUs, sums of the few rows with a weight stand in for a training view's product over rows.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from cassle_jax.augment.draw import Size
from cassle_jax.augment.inputs import ROUNDING, check_image, check_size, check_spec, in_float32
from cassle_jax.augment.spec import AugmentSpec

__all__ = ["MOST_TERMS", "PRECISION", "Canvas", "center_view", "crop_and_resize", "size_of"]

Canvas = UInt8[Array | np.ndarray, "height width 3"] | Float[Array | np.ndarray, "height width 3"]
"""RGB, uint8 or float in [0, 1]; the picture lies at the top left, the rest is padding."""

# A single bfloat16 pass (the default on TPUs) would cost half a grey level; CPUs ignore this.
PRECISION = lax.Precision.HIGH

# Of an unrolled sum on CPUs; more take long to compile.
MOST_TERMS = 64


def size_of(image: Canvas, size: Size | None) -> Size:
    """The picture's height and width, int [2]: ``size``, or the whole canvas where that is None.

    Raises:
      ValueError: if the image or the size is invalid; see ``inputs``.
    """
    if size is not None:
        check_size(size, tuple(np.shape(image)[:2]) if np.ndim(image) == 3 else None)
    check_image(image, size)
    return np.array(image.shape[:2], np.int32) if size is None else size


def crop_and_resize(
    image: Canvas,
    crop: Float32[Array, "4"],
    flip: Bool[Array, ""],
    output: int,
    size: Size | None = None,
) -> Float32[Array, "output 3 output"]:
    """Cuts out a box, resizes it (bilinear, antialiased) and mirrors it where ``flip`` is true.

    Pillow's ``crop(box).resize((output, output), BILINEAR)``, without its rounding to uint8.

    Args:
      image: [height, width, 3] canvas, uint8 or float in [0, 1], with finite values everywhere.
      crop: [4], top, left, height, width as fractions of the picture; rounded to whole pixels.
      flip: scalar, whether to mirror left to right.
      output: height and width of the result, pixels.
      size: int [2], height and width of the picture within the canvas; None: all of it.

    Returns:
      [output rows, 3 channels, output columns] in [0, 1]: the layout in which products over rows
      and over columns need no transposition.
    """
    size = size_of(image, size)
    picture = jnp.asarray(size).astype(jnp.float32)
    start = jnp.clip(jnp.round(crop[:2] * picture), 0, picture - 1)
    length = jnp.clip(jnp.round(crop[2:] * picture), 1, picture - start)
    position = jnp.arange(output) + 0.5
    mirrored = jnp.where(flip, position[::-1], position)
    rows, columns = (
        _Side(at * (length[axis] / output), length[axis] / output, start[axis], length[axis],
              image.shape[axis])
        for axis, at in enumerate((position, mirrored))
    )  # fmt: skip
    by_products = partial(_resize_by_products, rows=rows, columns=columns)
    by_sums = partial(_resize_by_sums, rows=rows, columns=columns)
    on_cpus = by_sums if rows.terms <= MOST_TERMS else by_products
    view = lax.platform_dependent(_to_float(image, size), cpu=on_cpus, default=by_products)
    return view / _white(image)


@in_float32
def center_view(
    image: Canvas, size: Size | None, spec: AugmentSpec, short_side: int | None = None
) -> Float32[Array, "{spec.size} {spec.size} 3"]:
    """The view of evaluation: short side resized (antialiased bicubic), centre crop, normalised.

    One weight matrix combines the resize and the crop, so the resized image never exists and very
    long images cost no more than square ones. CASSLE, arXiv 2306.06082, evaluation protocols.

    Args:
      image: [height, width, 3] canvas, uint8 or float in [0, 1], with finite values everywhere.
      size: int [2], height and width of the picture within the canvas; None: all of it.
      spec: gives the view's size S, mean and std.
      short_side: length in pixels that the picture's short side is resized to; None: S.

    Returns:
      [S, S, 3], normalised.

    Raises:
      ValueError: if ``short_side`` is smaller than S, or the image is invalid; see ``inputs``.
    """
    check_spec(spec)
    short_side = spec.size if short_side is None else short_side
    if short_side < spec.size:
        raise ValueError(
            f"short_side={short_side} is smaller than augment.size={spec.size}, so no centre crop "
            f"of that size exists; use short_side >= {spec.size}"
        )
    picture = jnp.asarray(size_of(image, size), jnp.int32)  # fewer bits overflow in the product
    resized = short_side * picture // jnp.min(picture)
    # Torchvision rounds half to even here, as jnp.round does.
    start = jnp.round((resized - spec.size) / 2)
    scale = picture / resized
    rows, columns = (
        _Side((start[axis] + jnp.arange(spec.size) + 0.5) * scale[axis], scale[axis],
              jnp.float32(0), picture[axis].astype(jnp.float32), image.shape[axis]).matrix(_cubic)
        for axis in (0, 1)
    )  # fmt: skip
    # Columns first, and clipped in between as in Pillow: the cubic overshoots at edges.
    white = _white(image)
    view = jnp.clip(_apply_columns(columns, _to_float(image, picture)), 0, white)
    view = jnp.clip(_apply_rows(rows, view), 0, white) / white
    return (view.transpose(0, 2, 1) - jnp.array(spec.mean)) / jnp.array(spec.std)


class _Side(NamedTuple):
    """How the rows (or the columns) of a view lie on those of the canvas; all in its pixels.

    Attributes:
      centre: the place of each output position within the box.
      scale: input pixels per output pixel.
      start: the first pixel of the box.
      length: the length of the box.
      pixels: the length of the canvas.
    """

    centre: Float32[Array, " output"]
    scale: Float32[Array, ""]
    start: Float32[Array, ""]
    length: Float32[Array, ""]
    pixels: int

    def matrix(self, kernel: Callable[[Array], Array]) -> Float32[Array, "output {self.pixels}"]:
        """The weights of all input pixels in each output position."""
        return self._weights(jnp.arange(self.pixels) - self.start, kernel)

    @property
    def terms(self) -> int:
        """The largest number of input pixels with a weight under a triangle."""
        # Within ± scale lie at most ⌈2 scale⌉ centres of pixels; one more allows for rounding.
        return math.ceil(2 * max(self.pixels / len(self.centre), 1)) + 1

    def taps(self) -> tuple[Int32[Array, "output terms"], Float32[Array, "output terms"]]:
        """The input pixels that may have a weight under a triangle, and their weights."""
        first = jnp.floor(self.centre - jnp.maximum(self.scale, 1) + 0.5)
        places = first[:, None] + jnp.arange(self.terms)
        read = jnp.clip(self.start + places, 0, self.pixels - 1)
        return read.astype(jnp.int32), self._weights(places, _triangle)

    def _weights(
        self, places: Float32[Array, "*#output inputs"], kernel: Callable[[Array], Array]
    ) -> Float32[Array, "output inputs"]:
        """The weights of pixels, counted from the start of the box; none outside the box."""
        position = places + 0.5
        weights = kernel((position - self.centre[:, None]) / jnp.maximum(self.scale, 1))
        weights = jnp.where((position > 0) & (position < self.length), weights, 0)
        return weights / weights.sum(axis=1, keepdims=True)


def _resize_by_products(
    image: Float32[Array, "height width 3"], rows: _Side, columns: _Side
) -> Float32[Array, "output 3 output"]:
    """The view by two dense matrix products, the one over the canvas's shorter side last."""
    down, across = rows.matrix(_triangle), columns.matrix(_triangle)
    if image.shape[1] > image.shape[0]:
        return _apply_rows(down, _apply_columns(across, image))
    return _apply_columns(across, _apply_rows(down, image))


def _resize_by_sums(
    image: Float32[Array, "height width 3"], rows: _Side, columns: _Side
) -> Float32[Array, "output 3 output"]:
    """The same view; a row is the sum of only those rows of the canvas that have a weight."""
    places, weights = rows.taps()
    lines = image.reshape(len(image), -1)
    resized = sum(weights[:, tap, None] * lines[places[:, tap]] for tap in range(rows.terms))
    return _apply_columns(columns.matrix(_triangle), resized.reshape(-1, *image.shape[1:]))


def _apply_rows(
    rows: Float32[Array, "output height"], image: Float32[Array, "height a b"]
) -> Float32[Array, "output a b"]:
    return jnp.einsum("ih,hab->iab", rows, image, precision=PRECISION)


def _apply_columns(
    columns: Float32[Array, "output width"], image: Float32[Array, "height width 3"]
) -> Float32[Array, "height 3 output"]:
    return jnp.einsum("hwc,jw->hcj", image, columns, precision=PRECISION)


def _to_float(image: Canvas, size: Size) -> Float32[Array, "height width 3"]:
    """The canvas in float32; NaN if a value of a float picture is outside [0, 1].

    Traced values cannot be refused, and floats of 0 to 255 would give views that only look odd.
    """
    pixels = jnp.asarray(image).astype(jnp.float32)
    if image.dtype == np.uint8:
        return pixels
    rows, columns = (jnp.arange(image.shape[axis]) < size[axis] for axis in (0, 1))
    padding = ~(rows[:, None, None] & columns[:, None])
    valid = padding | ((pixels >= -ROUNDING) & (pixels <= 1 + ROUNDING))
    return jnp.where(valid.all(), pixels, jnp.nan)


def _white(image: Canvas) -> float:
    """The value of white: dividing the small view by it is cheaper than scaling the canvas."""
    return 255.0 if image.dtype == np.uint8 else 1.0


def _triangle(distance: Float32[Array, "a b"]) -> Float32[Array, "a b"]:
    return jnp.maximum(1 - jnp.abs(distance), 0)


def _cubic(distance: Float32[Array, "a b"]) -> Float32[Array, "a b"]:
    """Keys' cubic with a = -0.5, the one of Pillow's BICUBIC."""
    x = jnp.abs(distance)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))
