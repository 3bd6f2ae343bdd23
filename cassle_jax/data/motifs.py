"""Draws images that differ only in their factors: each factor has a name and a probe."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Float32, UInt8

from cassle_jax.data.drawing import SHAPES, Plane, from_centre, pixel_centres, rgb_of, steepened
from cassle_jax.data.factors import COLOUR, FORM, Drawn, Factor

# Offsets of the copies' centres from the motif's centre, in radii, right and up.
_PLACES = {
    "one": ((0.0, 0.0),),
    "two": ((-1.1, 0.0), (1.1, 0.0)),
    "three": ((-1.1, -0.95), (1.1, -0.95), (0.0, 0.95)),
    "four": ((-1.1, -1.1), (1.1, -1.1), (-1.1, 1.1), (1.1, 1.1)),
}
_GROUND, _BODY, _RELIEF = 0.35, 0.75, 0.2  # lightness, and the amplitude of patterns and textures
_MIDDLE = 0.5  # the lightness that contrast does not change
_GROUND_CYCLES = 5  # periods of a pattern per image
_BODY_CYCLES = 0.8  # periods of a texture per radius

# All are mirror-symmetric, as the shapes are, so that a flip changes none of them.
PATTERNS: dict[str, Callable[[Plane, Plane], Plane]] = {
    "plain": lambda x, _: np.full_like(x, 0.5),
    "rows": lambda _, y: steepened(np.sin(y)),
    "columns": lambda x, _: steepened(np.cos(x)),
    "checks": lambda x, y: steepened(2 * np.cos(x) * np.sin(y)),
}
"""Lightness in [0, 1] per pattern of the ground, at phases from the image's centre."""

TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "plain": lambda x, _: np.ones_like(x),
    "stripes": lambda _, y: steepened(np.sin(y)),
    "ring": lambda x, y: steepened(np.cos(from_centre(x, y))),
}
"""Lightness in [0, 1] per texture of the bodies, at phases from a body's centre."""

FACTORS: dict[str, Factor] = {
    "light": Factor("value", (0.5, 1.0), "brightness", COLOUR),
    "contrast": Factor("value", (0.4, 1.0), "contrast", FORM),
    "saturation": Factor("value", (0.2, 0.8), "saturation and grayscale", COLOUR),
    "hue": Factor("angle", (0.0, 2 * np.pi), "hue and grayscale", COLOUR),
    "x": Factor("value", (0.35, 0.65), "crop and flip", FORM),
    "y": Factor("value", (0.35, 0.65), "crop", FORM),
    "size": Factor("value", (0.09, 0.16), "crop", FORM),
    "blur": Factor("value", (0.0, 0.03), "blur", FORM),
    "shape": Factor("class", tuple(SHAPES)),
    "texture": Factor("class", tuple(TEXTURES)),
    "pattern": Factor("class", tuple(PATTERNS)),
    "count": Factor("class", tuple(_PLACES)),
}


class Motifs(Drawn):
    """One to four copies of an upright body in formation, on a patterned ground."""

    FAMILY = "motifs"
    FACTORS = FACTORS
    DRAWS = len(FACTORS)

    @staticmethod
    def draw(
        factors: Mapping[str, float], rest: Float[np.ndarray, " n"], size: int
    ) -> UInt8[np.ndarray, "size size 3"]:
        """The motif of these factors; no other numbers are drawn."""
        del rest
        cover, lightness = _bodies(factors, size)
        lightness = cover * lightness + (1 - cover) * _ground(factors, size)
        lightness = _MIDDLE + factors["contrast"] * (lightness - _MIDDLE)
        body = rgb_of(factors["hue"], factors["saturation"], factors["light"])
        ground = rgb_of(
            (factors["hue"] + np.pi) % (2 * np.pi), factors["saturation"], factors["light"]
        )
        colour = ground + cover[..., None] * (body - ground)
        image = _blurred((lightness[..., None] * colour).astype(np.float32), factors["blur"])
        return (np.float32(255) * image + np.float32(0.5)).astype(np.uint8)


def _ground(factors: Mapping[str, float], size: int) -> Plane:
    x, y = pixel_centres(size)
    phase = np.float32(2 * np.pi * _GROUND_CYCLES)
    pattern = list(PATTERNS.values())[int(factors["pattern"])]
    return _GROUND + _RELIEF * (pattern(phase * (x - 0.5), phase * (y - 0.5)) - 0.5)


def _bodies(factors: Mapping[str, float], size: int) -> tuple[Plane, Plane]:
    """The coverage per pixel by the bodies, and their lightness there."""
    x, y = pixel_centres(size)
    radius = factors["size"]
    shape = list(SHAPES.values())[int(factors["shape"])]
    texture = list(TEXTURES.values())[int(factors["texture"])]
    phase = np.float32(2 * np.pi * _BODY_CYCLES)
    cover, lightness = np.zeros_like(x), np.zeros_like(x)
    for right, up in list(_PLACES.values())[int(factors["count"])]:
        body_x = ((x - factors["x"]) / radius - right).astype(np.float32)
        body_y = ((factors["y"] - y) / radius - up).astype(np.float32)
        share = np.clip(0.5 - shape(body_x, body_y) * radius * size, 0, 1)
        shade = _BODY - 2 * _RELIEF * (1 - texture(phase * body_x, phase * body_y))
        lightness = np.where(share > cover, shade, lightness)
        cover = np.maximum(cover, share)
    return cover.astype(np.float32), lightness.astype(np.float32)


def _blurred(
    image: Float32[np.ndarray, "size size 3"], deviation: float
) -> Float32[np.ndarray, "size size 3"]:
    """Gaussian blur, its standard deviation in fractions of the image; edges are extended."""
    weights = _blur_weights(len(image), deviation)
    rows = (weights @ image.reshape(len(image), -1)).reshape(image.shape)
    return np.matmul(weights, rows)


def _blur_weights(size: int, deviation: float) -> Float32[np.ndarray, "size size"]:
    places = np.arange(size)
    distance = (places[:, None] - places) / max(size * deviation, 1e-3)
    weights = np.exp(-0.5 * distance**2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
