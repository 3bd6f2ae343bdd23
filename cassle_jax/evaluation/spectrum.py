"""Measures how features are spread: effective rank, alignment and uniformity."""

import jax
import numpy as np
from jaxtyping import Array, Float
from scipy.special import xlogy

_ROWS = 1024


def rank_me(features: Float[Array | np.ndarray, "rows features"]) -> float:
    """Effective rank of the features: exp of the entropy of their normalised singular values.

    The features are taken as they are, not centred. Computed in float64 on the host from the
    smaller of the two Gram matrices, so singular values below about 1e-8 of the largest are noise.

    Args:
      features: One row an image.

    Returns:
      A value between 1 (all rows on one line) and min(rows, features) (all directions equally
      used). Features that are all zero have rank 0.

    Raises:
      ValueError: If there are no features or one of them is not finite.

    References:
      Garrido et al., RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
      Representations by Their Rank, ICML 2023, equation 1 (without its 1e-7 inside the logarithm,
      as 0 · log 0 is taken as 0).
    """
    matrix = _finite(features, "features")
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(matrix.T @ matrix), 0, None))
    total = singular.sum()
    if total == 0:
        return 0.0
    share = singular / total
    return float(np.exp(-xlogy(share, share).sum()))


def alignment_and_uniformity(
    features_1: Float[Array | np.ndarray, "rows features"],
    features_2: Float[Array | np.ndarray, "rows features"],
) -> tuple[float, float]:
    """How close two views of an image lie, and how evenly all images cover the sphere.

    Features are divided by their norm first. Alignment is the mean of ‖a − b‖² over the pairs of
    views. Uniformity is log of the mean of exp(−2‖a − b‖²) over all pairs of different images,
    averaged over the two views. Lower is better for both.

    Args:
      features_1: Features of the first views.
      features_2: Features of the second views, row by row of the same images.

    Returns:
      Alignment in [0, 4] and uniformity in [−8, 0].

    Raises:
      ValueError: If there are fewer than two rows, or a feature is not finite.

    References:
      Wang and Isola, Understanding Contrastive Representation Learning through Alignment and
      Uniformity on the Hypersphere, ICML 2020, with α = 2 and t = 2.
    """
    if len(features_1) < 2:
        raise ValueError(f"uniformity compares different images; {len(features_1)} row is too few")
    first = _normalised(_finite(features_1, "features_1"))
    second = _normalised(_finite(features_2, "features_2"))
    alignment = np.mean(np.sum((first - second) ** 2, axis=1))
    return float(alignment), (_uniformity(first) + _uniformity(second)) / 2


def _uniformity(points: np.ndarray) -> float:
    """Wang and Isola's uniformity of points on the sphere."""
    count = len(points)
    total = 0.0
    for start in range(0, count, _ROWS):
        block = points[start : start + _ROWS]
        squared = (
            np.sum(block**2, axis=1)[:, None] + np.sum(points**2, axis=1) - 2 * block @ points.T
        )
        kernel = np.exp(-2 * squared)
        kernel[np.arange(len(block)), start + np.arange(len(block))] = 0
        total += kernel.sum()
    return float(np.log(total / (count * (count - 1))))


def _finite(features: Array | np.ndarray, name: str) -> np.ndarray:
    matrix = np.asarray(jax.device_get(features), np.float64)
    if matrix.size == 0:
        raise ValueError(f"{name} of shape {matrix.shape} is empty")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} holds values that are not finite")
    return matrix


def _normalised(matrix: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(norm == 0, 1, norm)
