import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from cassle_jax.evaluation import knn
from cassle_jax.evaluation.knn import knn_accuracy


def clusters(rows: int, seed: int, classes: int = 7, width: int = 24):
    centres = np.random.default_rng(0).normal(size=(classes, width))
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=rows)
    features = centres[labels] + 1.8 * generator.normal(size=(rows, width))
    return features.astype(np.float32), labels * 10 - 3


@pytest.mark.parametrize("train_rows", [50, 700])
def test_nearest_neighbour_agrees_with_scikit_learn(train_rows, monkeypatch):
    monkeypatch.setattr(knn, "_TRAIN_ROWS", 128)
    monkeypatch.setattr(knn, "_TEST_ROWS", 64)
    train, test = clusters(train_rows, seed=1), clusters(333, seed=2)
    witness = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(*train)
    accuracy = knn_accuracy(*train, *test)
    assert accuracy == pytest.approx(witness.score(*test), abs=1e-12)
    assert 0.3 < accuracy < 1


@pytest.mark.parametrize("k", [5, 200])
def test_votes_agree_with_counting_them_one_by_one(k, monkeypatch):
    monkeypatch.setattr(knn, "_TRAIN_ROWS", 128)
    train, test = clusters(500, seed=1), clusters(150, seed=2)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train[0], test[0])]
    nearest = np.argsort(-(unit[1].astype(float) @ unit[0].T), axis=1)[:, :k]
    right = 0
    for neighbours, label in zip(train[1][nearest], test[1], strict=True):
        votes = [np.sum(neighbours == neighbour) for neighbour in neighbours]
        right += neighbours[int(np.argmax(votes))] == label
    assert knn_accuracy(*train, *test, k=k) == pytest.approx(right / 150, abs=1e-12)


def test_of_equal_votes_the_nearest_neighbour_wins_and_of_equal_rows_the_earlier():
    train = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    test = np.array([[1, 0.1]], np.float32)
    assert knn_accuracy(train, np.array([4, 5, 6]), test, np.array([4])) == 1
    assert knn_accuracy(train, np.array([4, 5, 6]), test, np.array([4]), k=3) == 1
    assert knn_accuracy(train, np.array([4, 6, 6]), test, np.array([6]), k=3) == 1


def test_scale_is_ignored_and_bfloat16_and_zero_rows_are_taken():
    train, labels = clusters(100, seed=1)
    accuracy = knn_accuracy(
        train * np.arange(1, 101)[:, None].astype(np.float32), labels, train, labels
    )
    assert accuracy == 1
    half = jnp.asarray(train, jnp.bfloat16)
    assert knn_accuracy(half, labels, half, labels) == 1
    assert 0 <= knn_accuracy(train * 0, labels, train * 0, labels) <= 1


def test_bad_arguments_are_named():
    train, labels = clusters(20, seed=1)
    with pytest.raises(ValueError, match=r"k=21 must lie between 1 and the 20 training rows"):
        knn_accuracy(train, labels, train, labels, k=21)
    with pytest.raises(ValueError, match="test_features has no rows"):
        knn_accuracy(train, labels, train[:0], labels[:0])
    with pytest.raises(ValueError, match="train_features holds values that are not finite"):
        knn_accuracy(train * np.float32(np.nan), labels, train, labels)
