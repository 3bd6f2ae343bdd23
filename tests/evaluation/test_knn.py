import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from cassle_jax.evaluation import knn, neighbours
from cassle_jax.evaluation.knn import knn_accuracy, knn_evaluation


def clusters(rows: int, seed: int, classes: int = 7, width: int = 24):
    centres = np.random.default_rng(0).normal(size=(classes, width))
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=rows)
    features = centres[labels] + 1.8 * generator.normal(size=(rows, width))
    return features.astype(np.float32), labels * 10 - 3


@pytest.mark.parametrize("train_rows", [50, 700])
def test_nearest_neighbour_agrees_with_scikit_learn(train_rows, monkeypatch):
    monkeypatch.setattr(neighbours, "_SEARCH_ROWS", 128)
    monkeypatch.setattr(neighbours, "_QUERY_ROWS", 64)
    monkeypatch.setattr(knn, "_VOTE_ROWS", 100)
    train, test = clusters(train_rows, seed=1), clusters(333, seed=2)
    witness = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(*train)
    accuracy = knn_accuracy(*train, *test)
    assert accuracy == pytest.approx(witness.score(*test), abs=1e-12)
    assert 0.3 < accuracy < 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("k", [5, 200])
def test_votes_agree_with_counting_them_one_by_one(k, monkeypatch):
    monkeypatch.setattr(neighbours, "_SEARCH_ROWS", 128)
    train, test = clusters(500, seed=1), clusters(150, seed=2)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train[0], test[0])]
    nearest = np.argsort(-(unit[1].astype(float) @ unit[0].T), axis=1)[:, :k]
    right = 0
    for found, label in zip(train[1][nearest], test[1], strict=True):
        votes = [np.sum(found == neighbour) for neighbour in found]
        right += found[int(np.argmax(votes))] == label
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
    some = train * (np.arange(100)[:, None] > 50)
    assert 0 <= knn_accuracy(some, labels, train * 0, labels) <= 1


@pytest.mark.parametrize(("spread", "collapsed"), [(0, True), (1e-8, True), (1e-4, False)])
def test_collapsed_features_are_warned_of(spread, collapsed):
    """The accuracy of equal features is the share of the first image's class: the order's."""
    train, labels = clusters(100, seed=1)
    features = np.float32(1 + spread * train)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        knn_accuracy(features, labels, features[:50], labels[:50])
        knn_accuracy(spread * train, labels, spread * train, labels)
    said = ["collapsed encoder; rounding and the order of the" in str(each) for each in shown]
    assert said == [True] * (collapsed + (spread == 0))


def test_bad_arguments_are_named():
    train, labels = clusters(20, seed=1)
    with pytest.raises(ValueError, match=r"k=21 is not from 1 to the number of training rows, 20"):
        knn_accuracy(train, labels, train, labels, k=21)
    with pytest.raises(ValueError, match="test_features has no rows"):
        knn_accuracy(train, labels, train[:0], labels[:0])
    with pytest.raises(ValueError, match="train_features holds values that are not finite"):
        knn_accuracy(train * np.float32(np.nan), labels, train, labels)


@pytest.mark.usefixtures("as_a_library")
def test_labels_that_are_not_one_per_row_are_refused():
    """A column of test labels was compared with every answer: an accuracy of all pairs."""
    train, labels = clusters(20, seed=1)
    with pytest.raises(ValueError, match=r"test has labels of shape \(20, 1\) for 20 rows"):
        knn_accuracy(train, labels, train, labels[:, None])
    with pytest.raises(ValueError, match=r"train has labels of shape \(21,\) for 20 rows"):
        knn_accuracy(train, np.append(labels, 0), train, labels)


def test_both_accuracies_are_those_of_scikit_learn():
    train, test = clusters(300, seed=1), clusters(200, seed=2)
    # Two classes are rare, so that the two accuracies differ.
    kept = (test[1] > 10) | (np.arange(200) % 5 == 0)
    test = (test[0][kept], test[1][kept])
    result = knn_evaluation(train, test)
    witness = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(*train)
    assert result.accuracy == pytest.approx(witness.score(*test))
    assert result.class_average == pytest.approx(
        balanced_accuracy_score(test[1], witness.predict(test[0]))
    )
    assert result.accuracy != pytest.approx(result.class_average, abs=1e-3)
    scores = {score.metric: score.value for score in result.findings("Pets")}
    assert scores == {"accuracy": result.accuracy, "mean per class": result.class_average}


def test_bad_splits_are_named():
    train, labels = clusters(20, seed=1)
    split = (train, labels)
    with pytest.raises(ValueError, match=r"test has features of shape \(0, 24\)"):
        knn_evaluation(split, (train[:0], labels[:0]))
    with pytest.raises(ValueError, match=r"train has labels of shape \(7,\) for 20 rows"):
        knn_evaluation((train, labels[:7]), split)
    with pytest.raises(ValueError, match="test has 5 features; train has 24"):
        knn_evaluation(split, (train[:, :5], labels))
    with pytest.raises(ValueError, match="train has labels 0 only"):
        knn_evaluation((train, labels * 0), split)
    with pytest.raises(ValueError, match="test_features holds values that are not finite"):
        knn_evaluation(split, (train * np.float32(np.inf), labels))
