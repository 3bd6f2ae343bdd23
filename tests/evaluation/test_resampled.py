"""Linear evaluation over random splits: the splits are what they say, and so is the mean."""

import numpy as np
import pytest

from cassle_jax.evaluation.linear import linear_evaluation
from cassle_jax.evaluation.resampled import resampled_linear_evaluation, split_by_class

PENALTIES = (1e-1, 1e1)


@pytest.fixture(scope="module")
def parts():
    """Three classes of 20 images each, cut into 10, 5 and 5 of a class."""
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20).astype(np.int32)
    centres = draw.normal(size=(3, 6))
    features = (centres[labels] + draw.normal(size=(60, 6))).astype(np.float32)
    order = np.argsort(np.tile(np.arange(20), 3), kind="stable")
    pieces = np.split(order, [30, 45])
    return [(features[rows], labels[rows]) for rows in pieces]


def test_a_split_has_every_row_once_and_each_class_in_proportion():
    labels = np.repeat([0, 1, 2], [40, 20, 8])
    found = split_by_class(labels, np.array([0.5, 0.75]), np.random.default_rng(1))
    assert sorted(np.concatenate(found).tolist()) == list(range(68))
    assert [np.bincount(labels[rows]).tolist() for rows in found] == [
        [20, 10, 4],
        [10, 5, 2],
        [10, 5, 2],
    ]


@pytest.mark.parametrize("images", [1, 2, 5, 7])
def test_parts_have_their_shares_even_of_classes_of_few_images(images):
    labels = np.repeat(np.arange(50), images)
    found = split_by_class(labels, np.array([0.8, 0.9]), np.random.default_rng(1))
    assert sorted(np.concatenate(found).tolist()) == list(range(50 * images))
    assert [len(rows) for rows in found] == [40 * images, 5 * images, 5 * images]
    for rows, share in zip(found, (0.8, 0.1, 0.1), strict=True):
        of_class = np.bincount(labels[rows], minlength=50)
        assert np.abs(of_class - share * images).max() <= 1


@pytest.mark.exhaustive
def test_the_mean_is_that_of_linear_evaluation_on_each_split(parts):
    found = resampled_linear_evaluation(parts, classes=3, penalties=PENALTIES, splits=3, seed=7)
    features, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    expected = []
    for split in range(3):
        rows = split_by_class(labels, np.array([0.5, 0.75]), np.random.default_rng([7, split]))
        drawn = [(features[each], labels[each]) for each in rows]
        expected.append(linear_evaluation(*drawn, classes=3, penalties=PENALTIES).test_accuracy)
    assert found.accuracies == tuple(expected)
    assert len(set(expected)) > 1  # other splits are other images
    score = found.findings("mine", "accuracy")[0]
    assert score.value == pytest.approx(np.mean(expected))
    assert score.interval == pytest.approx(4.303 * np.std(expected, ddof=1) / 3**0.5, rel=1e-3)


def test_one_split_has_no_interval(parts):
    with pytest.raises(ValueError, match="splits=1 gives no interval; use 2 or more"):
        resampled_linear_evaluation(parts, classes=3, splits=1)
