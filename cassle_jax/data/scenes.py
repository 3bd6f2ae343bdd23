"""Procedurally drawn coloured scenes with known factors: the dataset that needs no files."""

import colorsys
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from cassle_jax.data.errors import DataError
from cassle_jax.data.sources import Record

FACTORS: dict[str, Literal["class", "value", "angle"]] = {
    "hue": "angle",
    "shape": "class",
    "x": "value",
    "y": "value",
    "size": "value",
    "orientation": "angle",
    "texture": "class",
}
"""Kind of every factor: a class number, a real number, or an angle in radians of period 2π."""

SPLITS = ("train", "validation", "test")
_TEST_SHARE = 5

_DRAWS = 48
_BLOBS = 3
_POSITION_RANGE = (0.28, 0.72)
_SIZE_RANGE = (0.16, 0.26)
_TEXTURE_CYCLES = 1.25  # in one object radius: the most that a radius of 4 pixels can show

Plane = Float32[np.ndarray, "height width"]
Colour = Float32[np.ndarray, "3"]


class Scenes:
    """Scenes with one object each, on a patterned, muted background with blobs that mean nothing.

    Scene i of a split is a function of (seed, split, i): more scenes only append. The factors are
    independent and uniform; everything else about a scene (background hues, ramp and waves, blobs,
    light, phase of the texture) is drawn too and cannot be asked for. The label is the shape.

    Factors, aligned with the index:
      hue: of the object's colour, radians; texture and light change its value, never its hue.
      shape: index into `SHAPES`.
      x, y: the object's centre in fractions of the image from the left and top, in [0.28, 0.72].
      size: the object's radius in fractions of the image, in [0.16, 0.26].
      orientation: radians, counter-clockwise from the upright drawing. No shape looks the same
        turned by less than a whole turn, so the period is 2π for all of them.
      texture: index into `TEXTURES`.
    """

    def __init__(self, count: int, seed: int = 0, size: int = 64, split: str = "train"):
        """Draws the factors of `count` scenes; images are drawn when asked for.

        Args:
          count: number of scenes, ≥ 1.
          seed: of this family of scenes, ≥ 0.
          size: side of a scene in pixels, ≥ 8.
          split: any word; different splits are disjoint streams.
        """
        self.name = f"scenes {split}"
        self.class_names = tuple(SHAPES)
        self._arguments = (count, seed, size, split)
        self._size = size
        key = np.array([seed, zlib.crc32(split.encode())], np.uint64)
        # Raw Philox output: a function of position alone, in every version of NumPy.
        raw = np.random.Philox(key=key).random_raw(count * _DRAWS)
        self._draws = (raw >> np.uint64(11)).astype(np.float64).reshape(count, _DRAWS) / 2.0**53

    def __len__(self) -> int:
        return len(self._draws)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside [0, {len(self)})")
        row = self._draws[index]
        factors = {
            name: convert(draw).item()
            for (name, convert), draw in zip(_FACTOR_OF_DRAW.items(), row, strict=False)
        }
        image = _draw(factors, row[len(FACTORS) :], self._size)
        return Record(image, factors["shape"], f"{self.name} #{index}")

    def __reduce__(self):
        return Scenes, self._arguments

    @property
    def labels(self) -> Int[np.ndarray, " images"]:
        """The shape of every scene."""
        return self.factors["shape"].astype(np.int32)

    @property
    def factors(self) -> dict[str, np.ndarray]:
        """Every factor of `FACTORS` for all scenes: int64 for classes, float64 for the rest."""
        columns = self._draws.T[: len(FACTORS)]
        return {
            name: convert(column)
            for (name, convert), column in zip(_FACTOR_OF_DRAW.items(), columns, strict=True)
        }


def open_scenes(count: int, size: int, split: str) -> Scenes:
    """The embedded dataset: `count` scenes in 'train', a fifth of it in 'validation' and in 'test'.

    Raises:
      DataError: unknown split, or a count or size too small.
    """
    if split not in SPLITS:
        raise DataError(f"data.source='scenes' has no split {split!r}; there: {', '.join(SPLITS)}")
    if count < 1:
        raise DataError(f"data.scenes={count} draws nothing; use 1 or more")
    if size < 8:
        raise DataError(f"data.canvas={size} is too small for a scene; use 8 or more")
    return Scenes(
        count if split == "train" else -(-count // _TEST_SHARE), seed=0, size=size, split=split
    )


def _radius(x: Plane, y: Plane) -> Plane:
    return np.sqrt(x * x + y * y)


def _half_disc(x: Plane, y: Plane) -> Plane:
    return np.maximum(_radius(x, y + 0.4) - 1, -(y + 0.4))


def _drop(x: Plane, y: Plane) -> Plane:
    """A disc of radius 0.62 and the two tangents that meet at (0, 1)."""
    disc = _radius(x, y + 0.38) - 0.62
    sine = 0.62 / 1.38
    cosine = (1 - sine * sine) ** 0.5
    beside = cosine * np.abs(x) + sine * (y - 1)
    above_tangent_points = -0.38 + 0.62 * sine - y
    return np.minimum(disc, np.maximum(beside, above_tangent_points))


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.maximum(_radius(x, y) - 1, 0.8 - _radius(x, y - 0.5))


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
    return np.maximum(_radius(x, y) - 1, (y - np.abs(x)) * np.float32(0.5**0.5))


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "half disc": _half_disc,
    "drop": _drop,
    "crescent": _crescent,
    "arrow": _arrow,
    "tee": _tee,
    "bitten disc": _bitten_disc,
}
"""Signed distance in object radii, negative inside, at points right of and above the centre."""

TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "plain": lambda x, _: np.zeros_like(x),
    "stripes": lambda x, _: _wave(np.sin(x)),
    "checks": lambda x, y: _wave(np.sin(x) * np.sin(y) * 2),
    "dots": lambda x, y: _wave((np.sin(x) + np.sin(y) - 0.7) * 1.5),
    "rings": lambda x, y: _wave(np.sin(_radius(x, y))),
}
"""Share of shadow in [0, 1] of each texture, at phases in radians."""


def _wave(values: Plane) -> Plane:
    return np.clip(0.5 + 1.2 * values, 0, 1)


def _between(low: float, high: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda draw: low + (high - low) * draw


def _one_of(count: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda draw: (np.asarray(draw) * count).astype(np.int64)


_FACTOR_OF_DRAW = {
    "hue": _between(0.0, 2 * np.pi),
    "shape": _one_of(len(SHAPES)),
    "x": _between(*_POSITION_RANGE),
    "y": _between(*_POSITION_RANGE),
    "size": _between(*_SIZE_RANGE),
    "orientation": _between(0.0, 2 * np.pi),
    "texture": _one_of(len(TEXTURES)),
}


def _draw(
    factors: dict[str, float], nuisances: Float[np.ndarray, " n"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    draws = iter(nuisances.tolist())
    image = _background(draws, size)
    for _ in range(_BLOBS):
        _paint_blob(image, draws)
    _paint_object(image, factors, draws)
    light = 0.75 + 0.25 * next(draws)
    return (image * np.float32(255 * light) + np.float32(0.5)).astype(np.uint8)


def _background(draws: Iterator[float], size: int) -> Float32[np.ndarray, "size size 3"]:
    """Two colours mixed by a wave and, along another direction, by a ramp."""
    first, second = _muted_colour(draws), _muted_colour(draws)
    x, y = _pixel_centres(size)
    angle, cycles, phase = 2 * np.pi * next(draws), 1 + 5 * next(draws), 2 * np.pi * next(draws)
    frequency = 2 * np.pi * cycles
    wave = np.sin(_along(x, y, angle, frequency) + np.float32(phase))
    ramp = _along(x - np.float32(0.5), y - np.float32(0.5), 2 * np.pi * next(draws), 0.8)
    share = np.clip(np.float32(0.5) + np.float32(0.35 * next(draws)) * wave + ramp, 0, 1)
    return first + share[..., None] * (second - first)


def _paint_blob(image: Float32[np.ndarray, "size size 3"], draws: Iterator[float]) -> None:
    centre_x, centre_y, radius = next(draws), next(draws), 0.04 + 0.08 * next(draws)
    window, x, y = _window(len(image), centre_x, centre_y, radius)
    distance = _radius(x - np.float32(centre_x), y - np.float32(centre_y)) - np.float32(radius)
    _blend(image, window, distance, _muted_colour(draws))


def _paint_object(
    image: Float32[np.ndarray, "size size 3"], factors: dict[str, float], draws: Iterator[float]
) -> None:
    radius = factors["size"]
    window, x, y = _window(len(image), factors["x"], factors["y"], 1.3 * radius)
    right = (x - np.float32(factors["x"])) / np.float32(radius)
    up = (np.float32(factors["y"]) - y) / np.float32(radius)
    body_x = _along(right, up, factors["orientation"], 1.0)
    body_y = _along(right, up, factors["orientation"] + np.pi / 2, 1.0)
    shape = list(SHAPES.values())[int(factors["shape"])]
    distance = shape(body_x, body_y) * np.float32(radius)

    angle, frequency = 2 * np.pi * next(draws), 2 * np.pi * _TEXTURE_CYCLES
    texture = list(TEXTURES.values())[int(factors["texture"])]
    shadow = texture(
        _along(right, up, angle, frequency) + np.float32(2 * np.pi * next(draws)),
        _along(right, up, angle + np.pi / 2, frequency) + np.float32(2 * np.pi * next(draws)),
    )
    colour = _colour(factors["hue"], 0.6 + 0.4 * next(draws), 0.65 + 0.35 * next(draws))
    shaded = (np.float32(1) - np.float32(0.6) * shadow)[..., None] * colour
    _blend(image, window, distance, shaded)


def _blend(
    image: Float32[np.ndarray, "size size 3"],
    window: tuple[slice, slice],
    distance: Plane,
    colour: Float32[np.ndarray, "..."],
) -> None:
    """Lays `colour` where `distance` (in image sides) is negative, in part on edge pixels."""
    cover = np.clip(np.float32(0.5) - distance * np.float32(len(image)), 0, 1)[..., None]
    image[window] += cover * (colour - image[window])


def _window(
    size: int, centre_x: float, centre_y: float, radius: float
) -> tuple[tuple[slice, slice], Plane, Plane]:
    """The pixels within `radius` and one pixel more of a centre, and their centres' coordinates."""

    def span(centre: float) -> slice:
        low, high = (centre - radius) * size - 1, (centre + radius) * size + 2
        return slice(max(0, int(low)), max(0, min(size, int(high))))

    window = (span(centre_y), span(centre_x))
    x, y = _pixel_centres(size)
    return window, x[window], y[window]


@functools.lru_cache(maxsize=8)
def _pixel_centres(size: int) -> tuple[Plane, Plane]:
    """Coordinates from the left and from the top of all pixel centres, in image sides."""
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return tuple(np.meshgrid(centres, centres))


def _along(x: Plane, y: Plane, angle: float, scale: float) -> Plane:
    """Coordinate along the direction `angle`, times `scale`."""
    return np.float32(scale * np.cos(angle)) * x + np.float32(scale * np.sin(angle)) * y


def _muted_colour(draws: Iterator[float]) -> Colour:
    """Of backgrounds and blobs: paler and darker than any object, or they would be all one sees."""
    return _colour(2 * np.pi * next(draws), 0.5 * next(draws), 0.25 + 0.5 * next(draws))


def _colour(hue: float, saturation: float, value: float) -> Colour:
    """RGB in [0, 1] of HSV with the hue in radians."""
    return np.array(colorsys.hsv_to_rgb(hue / (2 * np.pi), saturation, value), np.float32)
