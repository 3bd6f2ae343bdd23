"""Checks the arguments that solvers share: features, and penalties."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from cassle_jax.checks import check_finite, check_positive


def check_features(name: str, features: np.ndarray) -> None:
    """Raises ValueError unless there are rows of finite features."""
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} has features of shape {features.shape}; use [rows, features]")
    check_finite(name, features, "features")


def checked_penalties(
    penalties: Sequence[float] | np.ndarray,
) -> Float64[np.ndarray, " penalties"]:
    """The penalties as an array; raises ValueError unless there are some, each above 0."""
    penalties = np.asarray(penalties, np.float64)
    if penalties.ndim != 1 or penalties.size == 0:
        raise ValueError(f"penalties of shape {penalties.shape} must be a list of one or more")
    for penalty in penalties:
        check_positive("penalties", penalty)
    return penalties
