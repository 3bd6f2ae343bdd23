import jax
import numpy as np
import optax
import pytest

from cassle_jax.data import Scenes
from cassle_jax.data.sources import DAMAGED
from cassle_jax.evaluation import fine_tune as protocol
from cassle_jax.evaluation.classifier import Training, train_classifier
from cassle_jax.evaluation.findings import from_json, to_json
from cassle_jax.evaluation.fine_tune import fine_tune, labelled_subset
from cassle_jax.evaluation.sgd_probe import sgd_probe
from tests.evaluation.analysed import devices
from tests.evaluation.taught import (
    IMAGE_CONDITIONED,
    Plain,
    assert_close,
    assert_equal,
    colours,
    tiny_subject,
)

CLASSES = 4
SCENES = Scenes(40, size=16, split="train")


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_every_class_keeps_its_share_of_labels_and_at_least_one(fraction):
    sizes = np.array([1, 7, 100, 340])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), sizes))
    chosen = labelled_subset(labels, fraction)
    assert (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen]).tolist() == [max(1, round(fraction * n)) for n in sizes]


def test_a_subset_is_always_the_same_and_within_a_larger_one():
    labels = np.arange(1000) % 10
    few, many = (labelled_subset(labels, fraction) for fraction in (0.01, 0.1))
    # Which images these are is part of what a figure means: it must not change.
    assert few.tolist() == [380, 433, 607, 634, 669, 722, 755, 861, 906, 958]
    assert set(few) < set(many)
    assert len(many) == 100
    # Not simply the first of each class.
    assert np.median(many) == pytest.approx(500, abs=150)


def test_images_that_cannot_be_read_are_not_chosen():
    labels = np.array([0, 1, DAMAGED, 0, 1, -1])
    assert labelled_subset(labels, 1.0).tolist() == [0, 1, 3, 4]


def trained(subject, count, *, steps=4, encoder_rate=0.05):
    rates = {
        "encoder": optax.cosine_decay_schedule(encoder_rate, steps),
        "head": optax.cosine_decay_schedule(0.5, steps),
    }
    training = Training(rates, steps, batch=8)
    classes = len(SCENES.class_names)
    return jax.device_get(
        train_classifier(subject, SCENES, training, classes=classes, mesh=devices(count))
    )


@pytest.mark.exhaustive
def test_the_encoder_moves_alike_on_any_number_of_devices():
    subject = tiny_subject()
    before = jax.tree.map(np.copy, subject.variables)
    one = trained(subject, 1)
    assert_close(trained(subject, 4), one, atol=1e-5)
    assert_equal(subject.variables, before)
    for collection in ("params", "batch_stats"):
        moved = jax.tree.map(
            lambda new, old: np.abs(new - old).max() > 1e-4,
            one[collection]["encoder"],
            before[collection]["encoder"],
        )
        assert all(jax.tree.leaves(moved)), moved


@pytest.mark.exhaustive
def test_encoder_and_head_have_learning_rates_of_their_own():
    subject = tiny_subject()
    found = trained(subject, 1, encoder_rate=0.0)
    assert_equal(found["params"]["encoder"], subject.variables["params"]["encoder"])
    assert np.abs(found["params"]["head"]["bias"]).max() > 0.01


def test_what_takes_the_descriptor_into_the_image_stays_as_it_is():
    subject = tiny_subject(conditioning=IMAGE_CONDITIONED)
    found = trained(subject, 1)
    for collection in ("params", "batch_stats"):
        assert_equal(
            found[collection]["image_conditioner"],
            subject.variables[collection]["image_conditioner"],
        )


@pytest.mark.exhaustive
def test_features_that_leave_classes_mixed_up_are_mended():
    subject = tiny_subject(width=3)
    train, test = (Plain(*colours(count, CLASSES, seed=count, spread=6)) for count in (64, 200))
    shared = {"classes": CLASSES, "mesh": devices(1), "batch": 32, "epochs": 60}
    frozen = sgd_probe(subject, train, test, **shared)
    tuned = fine_tune(subject, train, test, fraction=1.0, encoder_rate=1.6, head_rate=4.0, **shared)
    assert (tuned.images, tuned.steps, tuned.batch, tuned.top_5) == (64, 120, 32, None)
    assert tuned.accuracy > 0.97
    assert tuned.accuracy > frozen.accuracy + 0.05


def test_small_subsets_get_steps_enough_and_a_batch_that_fits(caplog, monkeypatch):
    monkeypatch.setattr(protocol, "LEAST_STEPS", 30)
    train = Plain(*colours(120, 12, spread=5), name="train")
    test = Plain(*colours(60, 12, seed=1, spread=5), name="test")
    result = fine_tune(
        tiny_subject(),
        train, test, classes=12, fraction=0.01, mesh=devices(4), batch=64,
    )  # fmt: skip
    assert (result.images, result.batch, result.steps) == (12, 12, 30)
    assert "batch=64 is more than the 12 images; taking 12" in caplog.text
    findings = result.findings("colours")
    assert from_json(to_json(findings)) == findings
    assert {each.metric: each.value for each in findings} == {
        "accuracy, 1 % of the labels": result.accuracy,
        "mean per class, 1 % of the labels": result.class_average,
        "top-5 accuracy, 1 % of the labels": result.top_5,
    }
    assert {each.task for each in findings} == {"fine_tune"}
    assert result.top_5 >= result.accuracy > 1 / 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 0.0}, r"fraction=0.0 is not in \(0, 1\]; 0.01, 0.1 and 1 are usual"),
        ({"fraction": 1.5}, r"fraction=1.5 is not in \(0, 1\]"),
        ({"fraction": float("nan")}, "fraction=nan is not in"),
        ({"epochs": -1}, "epochs=-1 must be at least 0"),
        ({"encoder_rate": -0.1}, "encoder_rate=-0.1 must be above 0"),
        ({"mesh": devices(8), "fraction": 0.01}, "4 training images are fewer than the 8 devices"),
        ({"encoder_rate": 1e30}, r"step \d is not finite; a smaller .* of the encoder and"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(change, message):
    source = Plain(*colours(16, CLASSES))
    arguments = {
        "subject": tiny_subject(),
        "train": source,
        "test": source,
        "classes": CLASSES,
        "fraction": 1.0,
        "mesh": devices(4),
        "epochs": 2,
        "batch": 8,
    }
    with pytest.raises(ValueError, match=message):
        fine_tune(**(arguments | change))
