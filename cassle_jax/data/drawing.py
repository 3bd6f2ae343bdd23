"""The elements of drawn images: numbers from a stream, shapes, covers and colours."""

import colorsys
import functools
import zlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float32

Plane = Float32[np.ndarray, "height width"]
Colour = Float32[np.ndarray, "3"]


def uniform_draws(
    seed: int, split: str, rows: int, columns: int
) -> Float[np.ndarray, "rows columns"]:
    """Numbers in [0, 1): a function of (seed, split, place), so that more rows only append."""
    key = np.array([seed, zlib.crc32(split.encode())], np.uint64)
    # Raw Philox output depends on the position alone, in every version of NumPy.
    raw = np.random.Philox(key=key).random_raw(rows * columns)
    return (raw >> np.uint64(11)).astype(np.float64).reshape(rows, columns) / 2.0**53


def from_centre(x: Plane, y: Plane) -> Plane:
    """Distance from the origin."""
    return np.sqrt(x * x + y * y)


def _half_disc(x: Plane, y: Plane) -> Plane:
    return np.maximum(from_centre(x, y + 0.4) - 1, -(y + 0.4))


def _drop(x: Plane, y: Plane) -> Plane:
    """A disc of radius 0.62 and the two tangents that meet at (0, 1)."""
    disc = from_centre(x, y + 0.38) - 0.62
    sine = 0.62 / 1.38
    cosine = (1 - sine * sine) ** 0.5
    beside = cosine * np.abs(x) + sine * (y - 1)
    above_tangent_points = -0.38 + 0.62 * sine - y
    return np.minimum(disc, np.maximum(beside, above_tangent_points))


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.maximum(from_centre(x, y) - 1, 0.8 - from_centre(x, y - 0.5))


def _arrow(x: Plane, y: Plane) -> Plane:
    side = np.abs(x)
    head = np.maximum(0.78 * side + 0.62 * (y - 1), -y)
    shaft = np.maximum(side - 0.3, np.maximum(-1 - y, y - 0.2))
    return np.minimum(head, shaft)


def _tee(x: Plane, y: Plane) -> Plane:
    side = np.abs(x)
    bar = np.maximum(side - 0.82, np.abs(y - 0.5) - 0.28)
    stem = np.maximum(side - 0.3, np.abs(y + 0.15) - 0.85)
    return np.minimum(bar, stem)


def _bitten_disc(x: Plane, y: Plane) -> Plane:
    """A disc without the quarter around the upward direction."""
    return np.maximum(from_centre(x, y) - 1, (y - np.abs(x)) * np.float32(0.5**0.5))


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "half disc": _half_disc,
    "drop": _drop,
    "crescent": _crescent,
    "arrow": _arrow,
    "tee": _tee,
    "bitten disc": _bitten_disc,
}
"""Signed distance in object radii, negative inside, at points right of and above the centre."""


def steepened(values: Plane) -> Plane:
    """Maps a wave in [-1, 1] to shares in [0, 1] with short transitions."""
    return np.clip(0.5 + 1.2 * values, 0, 1)


def blend(
    image: Float32[np.ndarray, "size size 3"],
    window: tuple[slice, slice],
    distance: Plane,
    colour: Float32[np.ndarray, "..."],
) -> None:
    """Lays `colour` where `distance` (in image sides) is negative, partly on edge pixels."""
    cover = np.clip(np.float32(0.5) - distance * np.float32(len(image)), 0, 1)[..., None]
    image[window] += cover * (colour - image[window])


def window_around(
    size: int, centre_x: float, centre_y: float, radius: float
) -> tuple[tuple[slice, slice], Plane, Plane]:
    """The pixels within `radius` plus one pixel of a centre, and their centres' coordinates."""

    def span(centre: float) -> slice:
        low, high = (centre - radius) * size - 1, (centre + radius) * size + 2
        return slice(max(0, int(low)), max(0, min(size, int(high))))

    window = (span(centre_y), span(centre_x))
    x, y = pixel_centres(size)
    return window, x[window], y[window]


@functools.lru_cache(maxsize=8)
def pixel_centres(size: int) -> tuple[Plane, Plane]:
    """Coordinates from the left and from the top of all pixel centres, in image sides."""
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return tuple(np.meshgrid(centres, centres))


def along(x: Plane, y: Plane, angle: float, scale: float) -> Plane:
    """Coordinate along the direction `angle`, times `scale`."""
    return np.float32(scale * np.cos(angle)) * x + np.float32(scale * np.sin(angle)) * y


def rgb_of(hue: float, saturation: float, value: float) -> Colour:
    """RGB in [0, 1] of HSV with the hue in radians."""
    return np.array(colorsys.hsv_to_rgb(hue / (2 * np.pi), saturation, value), np.float32)
