import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.evaluation import spectrum
from cassle_jax.evaluation.spectrum import alignment_and_uniformity, rank_me


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
