"""Cuts the squares that evaluations look at out of an image, as torchvision does with Pillow."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cassle_jax.data.errors import DataError

PLACES = 5
CENTRE = 4

# Images longer than this number of squares are resized only where a square shows them. Pillow may
# then take rows and columns in the other order, which rounds a little differently.
_WHOLE_SQUARES = 16

Square = UInt8[np.ndarray, "size size 3"]


def check_short_side(short_side: int, size: int) -> None:
    """Raises DataError where no square of `size` pixels fits into the resized image."""
    if short_side < size:
        raise DataError(
            f"short_side={short_side} is smaller than the crops' size={size}; use {size} or more"
        )


def squares_of(
    pixels: UInt8[np.ndarray, "height width 3"], size: int, short_side: int
) -> Callable[[int], Square]:
    """Resizes an image's short side (bicubic, antialiased), for torchvision's ten crops of it.

    Args:
      pixels: RGB, of any size.
      size: side of a square, pixels.
      short_side: short side of the resized image, pixels, ≥ `size`.

    Returns:
      A function of the crop's number, from 0: top left, top right, bottom left, bottom right,
      centre; plus `PLACES` for the same crops of the mirrored image.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    sides = np.array(picture.size)
    resized = short_side * sides // sides.min()
    whole = None
    if resized.max() <= _WHOLE_SQUARES * short_side:
        whole = np.asarray(picture.resize(tuple(resized.tolist()), Image.Resampling.BICUBIC))

    def square(place: int) -> Square:
        mirrored, corner = divmod(place, PLACES)
        left, top = _corner(resized - size, corner)
        if mirrored:
            left = resized[0] - size - left
        if whole is not None:
            cut = whole[top : top + size, left : left + size]
        else:
            corners = np.array([left, top, left + size, top + size])
            box = np.minimum(corners * np.tile(sides / resized, 2), np.tile(sides, 2))
            cut = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, tuple(box)))
        return cut[:, ::-1] if mirrored else cut

    return square


def _corner(free: np.ndarray, corner: int) -> tuple[int, int]:
    """Left and top of a square, given how much larger the image is."""
    right, bottom = free.tolist()
    # Torchvision rounds half to even here, as numpy does.
    middle = np.round(free / 2).astype(int).tolist()
    return [(0, 0), (right, 0), (0, bottom), (right, bottom), tuple(middle)][corner]
