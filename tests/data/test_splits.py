"""Rows by label: those of a search per label, in the time of one sort."""

import time

import numpy as np

from cassle_jax.data.splits import rows_by_label
from cassle_jax.evaluation.resampled import split_by_class


def test_the_rows_of_every_label_are_found_in_their_order():
    labels = np.random.default_rng(0).choice([-3, 0, 7, 8], 200)
    found = rows_by_label(labels)
    assert list(found) == [-3, 0, 7, 8]
    for label, rows in found.items():
        assert rows.tolist() == np.flatnonzero(labels == label).tolist()


def test_many_classes_take_little_more_time_than_few():
    def seconds(classes):
        labels = np.arange(600_000) % classes
        begun = time.process_time()
        split_by_class(labels, np.array([0.5]), np.random.default_rng(0))
        return time.process_time() - begun

    assert min(seconds(2000) for _ in range(3)) < 10 * min(seconds(2) for _ in range(3))
