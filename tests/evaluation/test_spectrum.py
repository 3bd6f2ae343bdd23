import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import inv, sqrtm
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression

from cassle_jax.evaluation import spectrum
from cassle_jax.evaluation.spectrum import alignment_and_uniformity, rank_me
from tests.evaluation.traced import peak_bytes


def with_singular_values(values, rows: int = 60, width: int = 20) -> np.ndarray:
    generator = np.random.default_rng(0)
    left = np.linalg.qr(generator.normal(size=(rows, len(values))))[0]
    right = np.linalg.qr(generator.normal(size=(width, len(values))))[0]
    return (left * np.asarray(values, float)) @ right.T


@pytest.mark.parametrize("used", [1, 5, 20])
def test_rank_counts_equally_used_directions(used):
    features = with_singular_values([3.0] * used)
    assert rank_me(features) == pytest.approx(used, rel=1e-5)
    assert rank_me(features.T) == pytest.approx(used, rel=1e-5)
    assert rank_me(1000 * features) == pytest.approx(used, rel=1e-5)


def test_rank_of_unequal_directions_is_the_entropys_exponential():
    # Shares 1/2, 1/4, 1/4 have an entropy of 1.5 bits.
    features = with_singular_values([2, 1, 1])
    assert rank_me(features) == pytest.approx(2**1.5, rel=1e-6)
    assert rank_me(jnp.asarray(features, jnp.float32)) == pytest.approx(2**1.5, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "value", "computed"),
    [
        (np.int32, 2**24 + 1, np.float64),  # float32 has no such number
        (np.longdouble, 1 + 2**-40, np.float64),
        (np.float64, 1 + 2**-40, np.float64),
        (np.float32, 0.1, np.float32),
        (np.float16, 0.1, np.float32),
        (jnp.bfloat16, 0.1, np.float32),
        (np.int8, 3, np.float32),
    ],
)
def test_features_keep_their_values_whatever_their_type(kind, value, computed):
    features = np.full((2, 2), value, kind)
    checked = spectrum._checked(features)
    assert checked.dtype == computed and (checked == features).all()


def test_rank_of_nothing():
    assert rank_me(np.zeros((8, 4), np.float32)) == 0
    assert rank_me(np.ones((8, 4), np.float32)) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="features holds values that are not finite"):
        rank_me(np.full((8, 4), np.inf, np.float32))
    with pytest.raises(ValueError, match=r"features of shape \(0, 4\) is empty"):
        rank_me(np.zeros((0, 4), np.float32))


def test_alignment_is_the_squared_distance_on_the_sphere():
    first = np.array([[2.0, 0], [0, 3]])
    assert alignment_and_uniformity(first, 5 * first)[0] == pytest.approx(0)
    assert alignment_and_uniformity(first, -first)[0] == pytest.approx(4)
    assert alignment_and_uniformity(first, first[::-1].copy())[0] == pytest.approx(2)


def test_uniformity_is_a_gaussian_potential_between_different_images(monkeypatch):
    poles = np.array([[1.0, 0], [-1, 0]])
    assert alignment_and_uniformity(poles, poles)[1] == pytest.approx(-8)
    same = np.ones((5, 3))
    assert alignment_and_uniformity(same, same)[1] == pytest.approx(0)
    monkeypatch.setattr(spectrum, "_ROWS", 7)
    features = np.random.default_rng(0).normal(size=(30, 4))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    potentials = [
        np.exp(-2 * np.sum((unit[i] - unit[j]) ** 2))
        for i in range(30)
        for j in range(30)
        if i != j
    ]
    assert alignment_and_uniformity(features, features)[1] == pytest.approx(
        np.log(np.mean(potentials))
    )
    with pytest.raises(ValueError, match="1 row is too few"):
        alignment_and_uniformity(features[:1], features[:1])


@pytest.mark.usefixtures("as_a_library")
def test_views_of_other_images_have_no_alignment():
    """A single second view was compared with all first ones."""
    first = np.ones((3, 4))
    with pytest.raises(ValueError, match=r"\(3, 4\) and features_2 of shape \(1, 4\) are not of"):
        alignment_and_uniformity(first, first[:1])


def test_variances_are_those_of_scikit_learns_pca():
    generator = np.random.default_rng(0)
    for rows, width in ((80, 12), (9, 30)):
        features = 5 + generator.normal(size=(rows, width)) * np.linspace(1, 3, width)
        found = spectrum.spectrum(features)
        pca = PCA().fit(features)
        np.testing.assert_allclose(found.variances, pca.explained_variance_, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(
            found.explained, np.cumsum(pca.explained_variance_ratio_), rtol=1e-8
        )
        assert found.rank_me == pytest.approx(rank_me(features))


def test_blocks_of_rows_change_nothing_and_memory_does_not_grow_with_them():
    generator = np.random.default_rng(0)
    features = (3 + generator.normal(size=(30_000, 24))).astype(np.float32)
    found = spectrum.spectrum(features)
    pca = PCA(svd_solver="full").fit(features.astype(np.float64))
    np.testing.assert_allclose(found.variances, pca.explained_variance_, rtol=1e-9)
    assert peak_bytes(lambda: spectrum.spectrum(features)) < features.nbytes / 2


def power_law(alpha: float, axes: int = 100, rows: int = 110) -> np.ndarray:
    """Features whose variances are rank^−α, to rounding."""
    generator = np.random.default_rng(0)
    left = generator.normal(size=(rows, axes))
    left = np.linalg.qr(left - left.mean(axis=0))[0]
    right = np.linalg.qr(generator.normal(size=(axes, axes)))[0]
    return (left * np.arange(1, axes + 1) ** (-alpha / 2)) @ right.T


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_alpha_is_the_exponent(alpha):
    assert spectrum.spectrum(power_law(alpha)).alpha == pytest.approx(alpha, rel=1e-6)
    assert spectrum.spectrum(7 * power_law(alpha), ranks=(11, 100)).alpha == pytest.approx(alpha)


def test_alpha_is_a_line_weighted_by_one_over_the_rank():
    features = np.random.default_rng(1).normal(size=(90, 60)) * np.linspace(0.1, 2, 60)
    variances = np.log(PCA().fit(features).explained_variance_[5:50])
    ranks = np.arange(6, 51)
    line = LinearRegression().fit(np.log(ranks)[:, None], variances, sample_weight=1 / ranks)
    assert spectrum.spectrum(features).alpha == pytest.approx(-line.coef_[0], rel=1e-8)


def test_alpha_of_few_axes():
    features = power_law(1.5)
    few = features @ np.linalg.svd(features)[2][:8].T
    # The fit ends where the axes end, also where others follow that have no variance.
    for narrow in (few, few @ np.eye(8, 40)):
        assert spectrum.spectrum(narrow).alpha == pytest.approx(1.5, rel=1e-6)
    assert np.isnan(spectrum.spectrum(few[:, :6]).alpha)
    assert np.isnan(spectrum.spectrum(np.ones((9, 80))).alpha)
    assert spectrum.spectrum(np.ones((9, 3))).explained.tolist() == [0, 0, 0]


def test_the_spectrums_findings():
    found = spectrum.spectrum(power_law(1.0))
    curve, shares, alpha, rank = found.findings("DTD")
    assert curve.series["features"][-1] == (100, pytest.approx(1))
    assert shares.series["features"][1][1] == pytest.approx(shares.series["features"][0][1] / 2)
    assert (alpha.value, rank.value) == (found.alpha, found.rank_me)


def views(images: int, count: int, between: np.ndarray, within: np.ndarray) -> np.ndarray:
    generator = np.random.default_rng(0)
    width = len(between)
    means = generator.normal(size=(images, 1, width)) * between
    return means + generator.normal(size=(images, count, width)) * within


def test_lidar_is_the_rank_of_the_whitened_covariance():
    width = 7
    features = views(30, 5, np.linspace(0.2, 2, width), np.linspace(1, 0.1, width))
    within = np.mean([np.cov(image.T) for image in features], axis=0) + 0.05 * np.eye(width)
    between = np.cov(features.mean(axis=1).T)
    whitened = np.real(inv(sqrtm(within))) @ between @ np.real(inv(sqrtm(within)))
    share = np.linalg.eigvalsh(whitened)
    share /= share.sum()
    expected = np.exp(-np.sum(share * np.log(share)))
    assert spectrum.lidar(features, delta=0.05) == pytest.approx(expected, rel=1e-8)
    assert 1 < expected < width


def test_lidar_counts_directions_that_distinguish_images():
    # Views do not differ, so that only δ is within; images differ alike in three directions.
    corners = np.concatenate([np.eye(3), -np.eye(3)]) @ np.eye(3, 10)
    assert spectrum.lidar(np.repeat(corners[:, None], 4, axis=1)) == pytest.approx(3)
    # A direction in which views differ as much as images counts for less than RankMe says.
    noisy = views(400, 10, np.ones(10), np.r_[np.zeros(5), 10 * np.ones(5)])
    assert spectrum.lidar(noisy) < 6 < rank_me(noisy.reshape(-1, 10))
    assert spectrum.lidar(np.ones((4, 3, 2))) == 0


def test_lidar_is_no_number_where_delta_is_all_rounding():
    few = 1e7 * views(3, 4, np.ones(20), np.ones(20))  # views differ in 9 of 20 directions
    assert np.isnan(spectrum.lidar(few))
    many = views(30, 5, np.ones(7), np.ones(7))  # in all of them
    assert spectrum.lidar(1e7 * many) == pytest.approx(spectrum.lidar(many), rel=1e-3)


def test_bad_spectra_are_named():
    with pytest.raises(ValueError, match="1 row is too few"):
        spectrum.spectrum(np.ones((1, 4)))
    with pytest.raises(ValueError, match="features holds values that are not finite"):
        spectrum.spectrum(np.full((8, 4), np.nan))
    with pytest.raises(ValueError, match="ranks=5 must be at least 6"):
        spectrum.spectrum(np.ones((8, 4)), ranks=(5, 5))
    with pytest.raises(ValueError, match="views=1 must be at least 2"):
        spectrum.lidar(np.ones((8, 1, 4)))
    with pytest.raises(ValueError, match=r"delta=0\.0 must be above 0"):
        spectrum.lidar(np.ones((8, 2, 4)), delta=0.0)
    with pytest.raises(ValueError, match="features holds values that are not finite"):
        spectrum.lidar(np.full((8, 2, 4), np.inf))


def test_the_chart_shows_small_shares_and_no_noise():
    variances = 10.0 ** -np.arange(20)
    found = spectrum.Spectrum(variances, 1.0, (6, 50), 1.0).findings("cars")
    (chart,) = (each for each in found if getattr(each, "title", "") == "Spectrum")
    drawn = np.array(chart.series["features"])
    expected = np.stack([np.arange(1, 16), 0.9 * variances[:15]], axis=1)
    np.testing.assert_allclose(drawn, expected, rtol=1e-9)
