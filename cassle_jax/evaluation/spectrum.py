"""Measures the spread of features: their spectrum, effective ranks, alignment and uniformity."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Float, Float64

from cassle_jax.checks import check_at_least, check_finite, check_positive
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.features import view_extractor
from cassle_jax.evaluation.findings import Chart, Finding, Score
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Seeded
from cassle_jax.evaluation.views import protocol_key

LIDAR_IMAGES, LIDAR_VIEWS = 1000, 10  # the paper takes 50 views, which changes little and costs 5×

_ROWS = 1024


@dataclass(frozen=True)
class Spectrum:
    """Variances of features along their principal axes.

    Attributes:
      variances: Variance along each axis, the largest first.
      alpha: Exponent of the power law of the variances, rank^−α; NaN where fewer than two of the
        fitted ranks have any variance.
      ranks: First and last rank of that fit.
      rank_me: Effective rank of the features, not centred (see `rank_me`).
    """

    variances: Float64[np.ndarray, " axes"]
    alpha: float
    ranks: tuple[int, int]
    rank_me: float

    @property
    def shares(self) -> Float64[np.ndarray, " axes"]:
        """The share of the variance along each axis; zero where there is no variance."""
        total = self.variances.sum()
        return self.variances / (total if total > 0 else 1)

    @property
    def explained(self) -> Float64[np.ndarray, " axes"]:
        """The share of the variance up to each axis."""
        return np.cumsum(self.shares)

    def findings(self, dataset: str) -> list[Finding]:
        """Both curves over the axes, α and RankMe."""
        axes = [float(axis) for axis in range(1, len(self.variances) + 1)]
        explained = tuple(zip(axes, self.explained.tolist(), strict=True))
        # A logarithmic axis has no place for zero, and would show noise as large as the rest.
        seen = tuple(zip(axes, self.shares[: _above_noise(self.variances)].tolist(), strict=False))
        return [
            Chart(
                PROTOCOL.name,
                dataset,
                "Explained variance",
                "principal axis",
                "share of the variance, up to the axis",
                {"features": explained},
            ),
            Chart(
                PROTOCOL.name,
                dataset,
                "Spectrum",
                "principal axis",
                "share of the variance, of the axis",
                {"features": seen},
                log_x=True,
                log_y=True,
            ),
            Score(PROTOCOL.name, dataset, "α-ReQ", self.alpha, higher_is_better=None),
            Score(PROTOCOL.name, dataset, "RankMe", self.rank_me, higher_is_better=None),
        ]


def spectrum(
    features: Float[Array | np.ndarray, "rows features"], *, ranks: tuple[int, int] = (6, 50)
) -> Spectrum:
    """Variances along the principal axes, the exponent α of their decay, and RankMe.

    A straight line in log rank is fitted to log variance, by least squares weighted by 1/rank; α is
    its negative slope. Variances that float64 cannot distinguish from zero are left out. The
    published CASSLE code fits ranks 6 to 50, α-ReQ's authors (in their package reptrix) 11 to 100.

    Args:
      features: One row per image.
      ranks: First (from 1) and last rank of the fit.

    Returns:
      The spectrum, computed in float64 on the host.

    Raises:
      ValueError: If there are fewer than two rows, a feature is not finite, or the ranks are not a
        valid range.

    References:
      Agrawal et al., α-ReQ: Assessing Representation Quality in Self-Supervised Learning by
      measuring eigenspectrum decay, NeurIPS 2022; its fit is that of Stringer et al.,
      High-dimensional geometry of population responses in visual cortex, Nature 2019.
    """
    matrix = _checked(features)
    if len(matrix) < 2:
        raise ValueError(f"a variance needs two rows; {len(matrix)} row is too few")
    first, last = ranks
    check_at_least("ranks", first, 1)
    check_at_least("ranks", last, first + 1)
    effective_rank = rank_me(matrix)
    mean = matrix.mean(axis=0, dtype=np.float64)
    variances = _squared_singular_values(matrix, mean)[::-1] / (len(matrix) - 1)
    return Spectrum(variances, _power_law(variances, first, last), ranks, effective_rank)


def _above_noise(variances: np.ndarray) -> int:
    """The number of variances, the largest first, that float64 distinguishes from zero."""
    return int(np.sum(variances > len(variances) * np.finfo(np.float64).eps * variances[0]))


def _power_law(variances: np.ndarray, first: int, last: int) -> float:
    """The exponent α of variance = c · rank^−α over the ranks from first to last."""
    fitted = variances[first - 1 : min(last, _above_noise(variances))]
    if len(fitted) < 2:
        return float("nan")
    ranks = np.arange(first, first + len(fitted))
    # polyfit weighs residuals, not their squares.
    slope, _ = np.polyfit(np.log(ranks), np.log(fitted), 1, w=ranks**-0.5)
    return float(-slope)


def rank_me(features: Float[Array | np.ndarray, "rows features"]) -> float:
    """Effective rank of the features: exp of the entropy of their normalised singular values.

    The features are not centred. The computation is in float64 on the host, from the smaller of the
    two Gram matrices, so singular values below about 1e-8 of the largest are noise.

    Args:
      features: One row per image.

    Returns:
      A value between 1 (all rows on one line) and min(rows, features) (all directions equally
      used); 0 where all features are zero.

    Raises:
      ValueError: If there are no features or one of them is not finite.

    References:
      Garrido et al., RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
      Representations by Their Rank, ICML 2023, equation 1 (without its 1e-7 inside the logarithm,
      as 0 · log 0 is taken as 0).
    """
    return _effective_rank(np.sqrt(_squared_singular_values(_checked(features))))


def lidar(
    features: Float[Array | np.ndarray, "images views features"], *, delta: float = 1e-4
) -> float:
    """Effective rank of the differences between images, relative to those between their views.

    It is exp of the entropy of the normalised eigenvalues of Σw^−½ Σb Σw^−½. Σb is the covariance
    of the images' mean features. Σw is the mean over the images of the covariance of their views,
    plus δ on its diagonal. Both are unbiased. Where δ matters, the result depends on the features'
    scale.

    Args:
      features: Features of several augmented views per image; the paper takes 50 views of 1000
        images.
      delta: The δ on the diagonal of Σw, above 0.

    Returns:
      A value between 1 and min(images − 1, features); 0 if all images' means are the same; NaN if
      the views differ so much in some directions that δ is all rounding in others.

    Raises:
      ValueError: If there are fewer than two images or views, a feature is not finite, or δ is not
        above 0.

    References:
      Thilak et al., LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures,
      ICLR 2024 (without its ε inside the logarithm, as 0 · log 0 is taken as 0).
    """
    from scipy.linalg import eigh  # pretraining starts faster without SciPy

    points = _checked(features).astype(np.float64)
    images, views, width = points.shape
    check_at_least("images", images, 2)
    check_at_least("views", views, 2)
    check_positive("delta", delta)
    means = points.mean(axis=1)
    within = (points - means[:, None]).reshape(-1, width)
    within = within.T @ within / (images * (views - 1)) + delta * np.eye(width)
    least, most = np.linalg.eigvalsh(within)[[0, -1]]
    if least <= width * np.finfo(np.float64).eps * most:
        return float("nan")
    between = means - means.mean(axis=0)
    between = between.T @ between / (images - 1)
    # The eigenvalues λ of Σb v = λ Σw v are those of Σw^−½ Σb Σw^−½.
    return _effective_rank(eigh(between, within, eigvals_only=True).clip(0))


def alignment_and_uniformity(
    features_1: Float[Array | np.ndarray, "rows features"],
    features_2: Float[Array | np.ndarray, "rows features"],
) -> tuple[float, float]:
    """Closeness of the two views of an image, and evenness of all images on the sphere.

    Features are divided by their norm first. Alignment is the mean of ‖a − b‖² over the pairs of
    views. Uniformity is log of the mean of exp(−2‖a − b‖²) over all pairs of different images,
    averaged over the two views. Lower is better for both.

    Args:
      features_1: Features of the first views.
      features_2: Features of the second views, of the same images row by row.

    Returns:
      Alignment in [0, 4] and uniformity in [−8, 0].

    Raises:
      ValueError: If there are fewer than two rows, the shapes differ, or a feature is not finite.

    References:
      Wang and Isola, Understanding Contrastive Representation Learning through Alignment and
      Uniformity on the Hypersphere, ICML 2020, with α = 2 and t = 2.
    """
    if len(features_1) < 2:
        raise ValueError(f"uniformity compares different images; {len(features_1)} row is too few")
    if features_1.shape != features_2.shape:
        raise ValueError(
            f"features_1 of shape {features_1.shape} and features_2 of shape {features_2.shape} "
            "are not of the same images, row by row"
        )
    first = unit_rows(_checked(features_1, "features_1").astype(np.float64))
    second = unit_rows(_checked(features_2, "features_2").astype(np.float64))
    alignment = np.mean(np.sum((first - second) ** 2, axis=1))
    return float(alignment), (_uniformity(first) + _uniformity(second)) / 2


def _squared_singular_values(
    matrix: np.ndarray, centre: np.ndarray | float = 0.0
) -> Float64[np.ndarray, " _"]:
    """Squared singular values of the rows about a centre, in ascending order.

    They come from the smaller of the two Gram matrices, which is summed over blocks of rows: memory
    does not grow with their number.
    """
    rows, width = matrix.shape
    blocks = (
        matrix[first : first + _ROWS].astype(np.float64) - centre for first in range(0, rows, _ROWS)
    )
    if rows < width:
        whole = np.concatenate(list(blocks))
        return np.linalg.eigvalsh(whole @ whole.T).clip(0)
    gram = np.zeros((width, width))
    for block in blocks:
        gram += block.T @ block
    return np.linalg.eigvalsh(gram).clip(0)


def _effective_rank(values: np.ndarray) -> float:
    """The exponential of the entropy of the values' shares of their sum; 0 if all are zero."""
    total = values.sum()
    if total == 0:
        return 0.0
    share = values[values > 0] / total  # 0 · log 0 is 0
    return float(np.exp(-(share * np.log(share)).sum()))


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


def _checked(features: Array | np.ndarray, name: str = "features") -> np.ndarray:
    """The features on the host, in float32 where that holds them all, else in float64."""
    matrix = np.asarray(jax.device_get(features))
    if matrix.size == 0:
        raise ValueError(f"{name} of shape {matrix.shape} is empty")
    exact = np.can_cast(matrix.dtype, np.float32)
    matrix = matrix.astype(np.float32 if exact else np.float64, copy=False)
    check_finite(name, matrix)
    return matrix


def unit_rows(matrix: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros as they are."""
    norm = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(norm == 0, 1, norm)


def _run(bench: Bench, settings: Seeded) -> list[Finding]:
    subject, images = bench.subject, min(LIDAR_IMAGES, len(bench.data.test))
    of_view = bench.once(
        view_extractor, subject.networks, subject.spec, subject.conditioning.neutral
    )
    views = [
        of_view(bench.store.variables, bench.store.batches(bench.data.test, images), key)
        for key in jax.random.split(protocol_key("spectrum", settings.seed), LIDAR_VIEWS)
    ]
    alignment, uniformity = alignment_and_uniformity(*views[:2])
    values = {
        "LiDAR": (lidar(np.stack(views, axis=1)), None),
        "alignment": (alignment, False),
        "uniformity": (uniformity, False),
    }
    return spectrum(bench.test.features).findings(bench.data.name) + [
        Score(PROTOCOL.name, bench.data.name, name, value, higher_is_better=better)
        for name, (value, better) in values.items()
    ]


PROTOCOL = Protocol(
    "spectrum",
    title="Spread of the features",
    settings=Seeded,
    run=_run,
)
