"""Rotates features, with a column of ones for the bias, onto their principal axes."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float64

_HOST_ROWS = 4096


def blocks(features: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Yields all rows in order, at most `rows` at a time."""
    for first in range(0, len(features), rows):
        yield features[first : first + rows]


def _with_ones(
    features: Float[np.ndarray, "rows features"],
) -> Float64[np.ndarray, "rows features+1"]:
    return np.pad(features.astype(np.float64), ((0, 0), (0, 1)), constant_values=1)


def principal_axes(
    features: Float[np.ndarray, "rows features"],
) -> tuple[
    Float64[np.ndarray, "rows axes"],
    Float64[np.ndarray, " axes"],
    Float64[np.ndarray, "features+1 axes"],
]:
    """Features, with a one for the bias, on their principal axes; squared lengths; the axes."""
    rows, width = features.shape
    if rows <= width:
        # The optimum lies in the span of the rows, which needs fewer axes.
        span, triangle = np.linalg.qr(_with_ones(features).T)
        spectrum, axes = np.linalg.eigh(triangle @ triangle.T)
        return triangle.T @ axes, spectrum.clip(0), span @ axes
    gram = np.zeros((width + 1, width + 1))
    for block in blocks(features, _HOST_ROWS):
        block = _with_ones(block)
        gram += block.T @ block
    spectrum, axes = np.linalg.eigh(gram)
    rotated = np.empty((rows, width + 1))
    for first, block in enumerate(blocks(features, _HOST_ROWS)):
        rotated[first * _HOST_ROWS :][: len(block)] = _with_ones(block) @ axes
    return rotated, spectrum.clip(0), axes
