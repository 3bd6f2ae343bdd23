"""Draws coloured scenes with known factors, among distractors."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Float, Float32, UInt8

from cassle_jax.data.drawing import (
    SHAPES,
    Colour,
    Plane,
    along,
    blend,
    from_centre,
    pixel_centres,
    rgb_of,
    steepened,
    window_around,
)
from cassle_jax.data.factors import COLOUR, FORM, Drawn, Factor

_BLOBS = 3
_POSITION_RANGE = (0.28, 0.72)
_SIZE_RANGE = (0.16, 0.26)
_TEXTURE_CYCLES = 1.25  # in one object radius: the most that a radius of 4 pixels can show

TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "plain": lambda x, _: np.zeros_like(x),
    "stripes": lambda x, _: steepened(np.sin(x)),
    "checks": lambda x, y: steepened(np.sin(x) * np.sin(y) * 2),
    "dots": lambda x, y: steepened((np.sin(x) + np.sin(y) - 0.7) * 1.5),
    "rings": lambda x, y: steepened(np.sin(from_centre(x, y))),
}
"""Share of shadow in [0, 1] per texture, at phases in radians."""

FACTORS: dict[str, Factor] = {
    "hue": Factor("angle", (0.0, 2 * np.pi), "colour jitter and grayscale", COLOUR),
    "shape": Factor("class", tuple(SHAPES)),
    "x": Factor("value", _POSITION_RANGE, "crop and flip", FORM),
    "y": Factor("value", _POSITION_RANGE, "crop", FORM),
    "size": Factor("value", _SIZE_RANGE, "crop", FORM),
    "orientation": Factor("angle", (0.0, 2 * np.pi), "flip", FORM),
    "texture": Factor("class", tuple(TEXTURES)),
}


class Scenes(Drawn):
    """Scenes with one object each, on a patterned, muted background with distracting blobs.

    The rest of a scene (background hues, ramp and waves, blobs, light, phase of the texture) is
    also random and cannot be chosen; it suffices to distinguish scenes. `Motifs` have no such
    extras. The label is the shape.

    Factors, aligned with the index:
      hue: hue of the object's colour, radians; texture and light change its value, never its hue.
      shape: index into `SHAPES`.
      x, y: the object's centre in fractions of the image from the left and top, in [0.28, 0.72].
      size: the object's radius in fractions of the image, in [0.16, 0.26].
      orientation: radians, counter-clockwise from the upright drawing. No shape is symmetric under
        a rotation, so the period is 2π for all of them.
      texture: index into `TEXTURES`.
    """

    FAMILY = "scenes"
    FACTORS = FACTORS
    DRAWS = 48

    @staticmethod
    def draw(
        factors: Mapping[str, float], rest: Float[np.ndarray, " n"], size: int
    ) -> UInt8[np.ndarray, "size size 3"]:
        """The scene of these factors; `rest` decides everything else."""
        draws = iter(rest.tolist())
        image = _background(draws, size)
        for _ in range(_BLOBS):
            _paint_blob(image, draws)
        _paint_object(image, factors, draws)
        light = 0.75 + 0.25 * next(draws)
        return (image * np.float32(255 * light) + np.float32(0.5)).astype(np.uint8)


def _background(draws: Iterator[float], size: int) -> Float32[np.ndarray, "size size 3"]:
    """Two colours mixed by a wave and, along another direction, by a ramp."""
    first, second = _muted_colour(draws), _muted_colour(draws)
    x, y = pixel_centres(size)
    angle, cycles, phase = 2 * np.pi * next(draws), 1 + 5 * next(draws), 2 * np.pi * next(draws)
    frequency = 2 * np.pi * cycles
    wave = np.sin(along(x, y, angle, frequency) + np.float32(phase))
    ramp = along(x - np.float32(0.5), y - np.float32(0.5), 2 * np.pi * next(draws), 0.8)
    share = np.clip(np.float32(0.5) + np.float32(0.35 * next(draws)) * wave + ramp, 0, 1)
    return first + share[..., None] * (second - first)


def _paint_blob(image: Float32[np.ndarray, "size size 3"], draws: Iterator[float]) -> None:
    centre_x, centre_y, radius = next(draws), next(draws), 0.04 + 0.08 * next(draws)
    window, x, y = window_around(len(image), centre_x, centre_y, radius)
    distance = from_centre(x - np.float32(centre_x), y - np.float32(centre_y)) - np.float32(radius)
    blend(image, window, distance, _muted_colour(draws))


def _paint_object(
    image: Float32[np.ndarray, "size size 3"], factors: Mapping[str, float], draws: Iterator[float]
) -> None:
    radius = factors["size"]
    window, x, y = window_around(len(image), factors["x"], factors["y"], 1.3 * radius)
    right = (x - np.float32(factors["x"])) / np.float32(radius)
    up = (np.float32(factors["y"]) - y) / np.float32(radius)
    body_x = along(right, up, factors["orientation"], 1.0)
    body_y = along(right, up, factors["orientation"] + np.pi / 2, 1.0)
    shape = list(SHAPES.values())[int(factors["shape"])]
    distance = shape(body_x, body_y) * np.float32(radius)

    angle, frequency = 2 * np.pi * next(draws), 2 * np.pi * _TEXTURE_CYCLES
    texture = list(TEXTURES.values())[int(factors["texture"])]
    shadow = texture(
        along(right, up, angle, frequency) + np.float32(2 * np.pi * next(draws)),
        along(right, up, angle + np.pi / 2, frequency) + np.float32(2 * np.pi * next(draws)),
    )
    body = rgb_of(factors["hue"], 0.6 + 0.4 * next(draws), 0.65 + 0.35 * next(draws))
    shaded = (np.float32(1) - np.float32(0.6) * shadow)[..., None] * body
    blend(image, window, distance, shaded)


def _muted_colour(draws: Iterator[float]) -> Colour:
    """A colour for backgrounds and blobs, paler and darker than that of any object."""
    return rgb_of(2 * np.pi * next(draws), 0.5 * next(draws), 0.25 + 0.5 * next(draws))
