"""The needs that protocols declare are those that they would find themselves when they run."""

import dataclasses
import re

import numpy as np
import pytest

from cassle_jax.data import Record
from cassle_jax.data.datasets import EvaluationData
from cassle_jax.evaluation.protocols import PROTOCOLS, checked_settings


class Labelled:
    """Images of these labels, none of which is ever read."""

    def __init__(self, name, labels):
        self.name, self.labels = name, np.array(labels, np.int32)
        self.class_names = ("ant", "bee", "cat")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index) -> Record:
        raise AssertionError("an image is read")


def data(train=(0, 1, 2) * 10, val=(0, 1, 2), test=(0, 1, 2) * 6, task="classification"):
    parts = (Labelled(name, labels) for name, labels in
             (("train", train), ("val", val), ("test", test)))  # fmt: skip
    return EvaluationData("bugs", *parts, 3, "accuracy", task)


def unmet(task, data, *, limit=0, devices=1, **settings):
    _, of_protocols = checked_settings({"ways": 3, **settings})
    return PROTOCOLS[task].unmet(data, of_protocols[task], limit=limit, devices=devices)


@pytest.mark.parametrize("task", PROTOCOLS)
def test_what_is_enough_is_not_refused(task):
    assert unmet(task, data(), shots=(1,), episodes=2) == ""


@pytest.mark.parametrize(
    ("task", "changed", "settings", "message"),
    [
        ("linear", {"train": [1, 1, 1]}, {}, "all images of train are of one class"),
        ("linear", {"test": [0, -1, 1]}, {}, "images of test without a label: 1 of 3"),
        ("linear_resampled", {"val": []}, {}, "too few images in its val part: 0; use at least 1"),
        ("knn", {}, {"neighbours": 34}, "neighbours=34 is more than the 33 images to learn from"),
        ("few_shot", {}, {"ways": 4}, "ways=4 is more than its 3 classes"),
        (
            "few_shot",
            {},
            {"shots": (1, 5)},
            "too few .* class 'ant' .*: 17; use at least 21",
        ),
        ("regression", {"test": [-1]}, {}, "too few images in its test part: 1; use at least 2"),
        ("factors", {"train": [0, 1]}, {}, "too few images in its train part: 2; use at least 10"),
        ("spectrum", {"test": [0]}, {}, "too few images in its test part: 1; use at least 2"),
        (
            "invariance",
            {},
            {"analysed": 1},
            r"too few test images to analyse: 1; .* \(analysed=1\)",
        ),
        (
            "augmentation_probes",
            {"test": [0, 1, 2]},
            {},
            "too few test images .*: 3; use at least 13",
        ),
        (
            "leak",
            {},
            {"limit": 7},
            r"too few test images .*: 7; use at least 8 \(limit=7, analysed=2000\)",
        ),
        (
            "sgd_probe",
            {"train": [0, 1], "val": [0]},
            {},
            "classes of test without an image to learn from: 'cat'",
        ),
        ("sgd_probe", {}, {"devices": 64}, "too few images to learn from: 33; use at least 64"),
        ("fine_tune", {}, {"devices": 8}, "too few images to learn from: 3; use at least 8"),
    ],
)
def test_what_is_missing_is_named(task, changed, settings, message):
    assert re.search(message, unmet(task, data(**changed), **settings))


def test_of_a_few_shot_dataset_the_test_part_is_all():
    few = dataclasses.replace(data(test=(0, 1, 2) * 17), train=None, val=None, task="few-shot")
    assert unmet("few_shot", few, shots=(1,)) == ""
    assert "use at least 21" in unmet("few_shot", few, shots=(1, 5))
