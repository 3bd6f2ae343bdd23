import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from cassle_jax.augment import AugmentSpec
from cassle_jax.data import Record, Scenes
from cassle_jax.data.sources import DAMAGED, labels_of
from cassle_jax.evaluation.classifier import (
    Training,
    _ahead,
    measured_accuracies,
    train_classifier,
)
from cassle_jax.evaluation.findings import from_json, to_json
from cassle_jax.evaluation.sgd_probe import dropping, sgd_probe
from cassle_jax.methods import Networks, ViewBatch
from tests.evaluation.analysed import PLAIN, devices
from tests.evaluation.taught import (
    IMAGE_CONDITIONED,
    Plain,
    assert_close,
    assert_equal,
    colour_subject,
    colours,
    tiny_subject,
)

CLASSES = 3
SCENES = Scenes(40, size=16, split="train")


@pytest.mark.exhaustive
def test_the_optimum_of_colours_that_overlap_is_scikit_learns():
    train, test = colours(48, CLASSES), colours(300, CLASSES, seed=1)
    result = sgd_probe(
        colour_subject(),
        Plain(*train),
        Plain(*test),
        classes=CLASSES,
        mesh=devices(1),
        epochs=300,
        batch=48,
    )
    exact = LogisticRegression(C=np.inf, tol=1e-8, max_iter=10_000)
    exact.fit(train[0] / 255, train[1])
    predicted = exact.predict(test[0] / 255)
    assert 0.5 < exact.score(test[0] / 255, test[1]) < 0.95
    assert result.accuracy == pytest.approx(np.mean(predicted == test[1]), abs=1 / 300)
    assert result.class_average == pytest.approx(
        balanced_accuracy_score(test[1], predicted), abs=0.01
    )
    centred = result.weights - result.weights.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centred, exact.coef_.T, rtol=0.02, atol=0.02)


@pytest.mark.pytorch
def test_every_step_is_pytorchs_sgd_on_features_of_evaluation_mode():
    import torch

    pictures, labels = colours(16, CLASSES)
    steps, rate = 20, 3.0
    subject, mesh = tiny_subject(width=4), devices(1)

    def trained(schedule, steps):
        training = Training({"head": schedule}, steps, batch=16)
        variables = train_classifier(
            subject, Plain(pictures, labels), training, classes=CLASSES, mesh=mesh
        )
        return jax.device_get(variables["params"]["head"])

    start, found = trained(lambda step: 0.0, 1), trained(dropping(rate, steps), steps)
    assert (start["bias"] == 0).all() and 0 < np.abs(start["kernel"]).max() < 0.05

    normalised = (pictures / 255 - subject.spec.mean) / subject.spec.std
    images = jnp.broadcast_to(normalised[:, None, None], (16, 16, 16, 3))
    view = ViewBatch(images, jnp.zeros((16, 0)))
    features = subject.networks.apply(subject.variables, view, train=False, method="encode")

    linear = torch.nn.Linear(4, CLASSES)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(start["kernel"].T))
        linear.bias.zero_()
    sgd = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9)
    drops = torch.optim.lr_scheduler.MultiStepLR(sgd, [12, 16], gamma=0.1)
    inputs, targets = torch.tensor(np.array(features)), torch.tensor(labels)
    for _ in range(steps):
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(linear(inputs), targets).backward()
        sgd.step()
        drops.step()
    np.testing.assert_allclose(found["kernel"], linear.weight.detach().T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found["bias"], linear.bias.detach(), rtol=1e-3, atol=1e-3)


class Watched(nn.Module):
    """A mean colour; what it is shown is kept."""

    seen: ClassVar[list] = []

    @nn.compact
    def __call__(self, images, train):
        jax.debug.callback(lambda shown: self.seen.append(np.asarray(shown)), images)
        return images.mean((1, 2))


class Picture(Plain):
    """Two copies of one picture, with different labels."""

    def __init__(self, picture):
        super().__init__([[0, 0, 0]] * 2, [0, 1])
        self._picture = picture

    def __getitem__(self, index):
        return Record(self._picture, index, "picture")


def shown(act):
    """The images that the encoder of a subject with views of 14 pixels sees while `act` runs."""
    spec = AugmentSpec(14, mean=(0, 0, 0), std=(1, 1, 1))
    subject = dataclasses.replace(
        colour_subject(), networks=Networks({"encoder": Watched}), spec=spec
    )
    Watched.seen.clear()
    jax.block_until_ready(act(subject))
    jax.effects_barrier()
    return np.concatenate(Watched.seen)


@pytest.mark.exhaustive
def test_views_of_training_are_cropped_and_flipped_and_nothing_else():
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :20, 0] = picture[:, 20:, 2] = 255
    training = Training({"head": lambda step: 0.0}, 32, batch=2)
    views = shown(
        lambda subject: train_classifier(
            subject, Picture(picture), training, classes=2, mesh=devices(1)
        )
    )[2:]  # the first two are those that parameters are made with
    assert views.shape == (64, 14, 14, 3)
    red, green, blue = np.moveaxis(views, -1, 0)
    np.testing.assert_allclose(red + blue, 1, atol=1e-5)
    assert (green == 0).all()
    left_is_red = red[:, :, 0].mean(1) - red[:, :, -1].mean(1)
    assert 10 < (left_is_red > 0.9).sum() < 40 and 10 < (left_is_red < -0.9).sum() < 40
    shares = red.mean((1, 2))
    assert shares.min() < 0.1 and shares.max() > 0.9


def test_test_images_are_the_centre_of_pillows_bicubic_at_256_for_224():
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
    head = {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}
    variables = {"params": {"head": head}, "batch_stats": {}}
    view, _ = shown(
        lambda subject: (
            measured_accuracies(
                subject, variables, Picture(picture), classes=2, batch=2, mesh=devices(1)
            ).top_1
        )
    )
    small = np.asarray(Image.fromarray(picture).resize((24, 16), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(view * 255, small[1:15, 5:19], atol=1.01)


@pytest.mark.parametrize("steps", [5, 10, 500, 50_000])
def test_the_learning_rate_drops_at_60_and_80_percent(steps):
    schedule = jax.vmap(dropping(30.0, steps))
    found = schedule(jnp.arange(steps))
    parts = [round(share * steps) for share in (0.6, 0.2, 0.2)]
    np.testing.assert_allclose(found, np.repeat([30.0, 3.0, 0.3], parts), rtol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("conditioning", [PLAIN, IMAGE_CONDITIONED])
def test_the_frozen_encoder_stays_as_it_is_bit_for_bit(conditioning):
    subject = tiny_subject(conditioning=conditioning)
    before = jax.tree.map(np.copy, subject.variables)
    training = Training({"head": dropping(30.0, 3)}, steps=3, batch=8)
    classes = len(SCENES.class_names)
    variables = train_classifier(subject, SCENES, training, classes=classes, mesh=devices(2))
    variables = jax.device_get(variables)
    head = variables["params"].pop("head")
    assert np.abs(head["kernel"]).max() > 0.1
    for collection, networks in variables.items():
        assert_equal(networks, {name: before[collection][name] for name in networks})
    assert "encoder" in variables["params"] and "encoder" in variables["batch_stats"]
    assert_equal(subject.variables, before)


@pytest.mark.exhaustive
def test_the_devices_and_a_second_run_change_nothing():
    subject, classes = tiny_subject(), len(SCENES.class_names)
    training = Training({"head": dropping(1.0, 6)}, steps=6, batch=8)

    def trained(count):
        return jax.device_get(
            train_classifier(subject, SCENES, training, classes=classes, mesh=devices(count))
        )

    once = trained(1)
    assert_close(trained(8), once, atol=1e-5)
    assert_equal(trained(1), once)
    other = dataclasses.replace(training, seed=1)
    found = train_classifier(subject, SCENES, other, classes=classes, mesh=devices(1))
    assert np.abs(found["params"]["head"]["kernel"] - once["params"]["head"]["kernel"]).max() > 1e-3


@pytest.mark.exhaustive
def test_in_bfloat16_the_head_is_float32():
    subject, classes = tiny_subject(), len(SCENES.class_names)

    def head(dtype):
        training = Training({"head": dropping(1.0, 6)}, steps=6, batch=8, dtype=dtype)
        found = train_classifier(subject, SCENES, training, classes=classes, mesh=devices(1))
        return found["params"]["head"]["kernel"]

    found, exact = head(jnp.bfloat16), head(None)
    assert found.dtype == jnp.float32
    difference = jnp.abs(found - exact).max() / jnp.abs(exact).max()
    assert 1e-5 < difference < 0.05


def test_accuracies_are_scikit_learns_whatever_fills_up_the_last_batch():
    classes = 12
    pictures, labels = colours(50, classes)
    weights = np.random.default_rng(0).normal(size=(3, classes)).astype(np.float32)
    head = {"kernel": weights, "bias": np.zeros(classes, np.float32)}
    found = measured_accuracies(
        colour_subject(),
        {"params": {"head": head}, "batch_stats": {}},
        Plain(pictures, labels),
        classes=classes,
        batch=16,
        mesh=devices(4),
    )
    scores = pictures / 255 @ weights
    assert found.top_1 == pytest.approx(top_k_accuracy_score(labels, scores, k=1), abs=1e-6)
    assert found.top_5 == pytest.approx(top_k_accuracy_score(labels, scores, k=5), abs=1e-6)
    balanced = balanced_accuracy_score(labels, scores.argmax(1))
    assert found.class_average == pytest.approx(balanced, abs=1e-6)


def test_neither_equal_nor_undefined_logits_are_right_by_chance():
    logits = jnp.array([[1.0, 1, 1], [1, 1, 1], [0, jnp.nan, 1], [0, jnp.nan, 2]])
    assert _ahead(logits, jnp.array([0, 2, 2, 1])).tolist() == [0, 2, 1, 3]


def test_findings_are_two_scores():
    train = Plain(*colours(16, CLASSES))
    result = sgd_probe(
        colour_subject(), train, train, classes=CLASSES, mesh=devices(4), epochs=1, batch=8
    )
    findings = result.findings("colours")
    assert from_json(to_json(findings)) == findings
    assert [(each.task, each.metric) for each in findings] == [
        ("sgd_probe", "accuracy"),
        ("sgd_probe", "mean per class"),
    ]
    assert 0 <= findings[0].value <= 1


@pytest.mark.exhaustive
def test_a_batch_larger_than_the_dataset_shrinks_and_is_reported(caplog):
    train = Plain(*colours(10, CLASSES))
    result = sgd_probe(colour_subject(), train, train, classes=CLASSES, mesh=devices(4), epochs=1)
    assert result.batch == 8
    assert "batch=256 is more than the 10 images; taking 8" in caplog.text


class Broken(Plain):
    """The first image's file is gone."""

    def __getitem__(self, index):
        if index == 0:
            raise FileNotFoundError(2, "No such file or directory", "first.jpg")
        return super().__getitem__(index)


def test_one_image_that_cannot_be_read_is_replaced():
    train = Broken(*colours(9, CLASSES))
    assert labels_of(train).tolist() == [DAMAGED, 1, 2, 0, 1, 2, 0, 1, 2]
    test = Plain(*colours(9, CLASSES))
    sgd_probe(colour_subject(), train, test, classes=CLASSES, mesh=devices(1), epochs=2, batch=9)


class Gone(Plain):
    """No image's file is there."""

    def __getitem__(self, index):
        raise FileNotFoundError(2, "No such file or directory", f"{index}.jpg")


class Nothing(Plain):
    """Its images have no labels."""

    def __getitem__(self, index):
        return Record(super().__getitem__(index).image, -1, "unknown")


UNLABELLED = Nothing(*colours(4, CLASSES), name="bare")
GOOD = Plain(*colours(12, CLASSES), name="good")
ONE_CLASS = Plain(colours(12, CLASSES)[0], np.full(12, 2), name="one")
LACKING = Plain(colours(12, CLASSES)[0], np.arange(12) % 2 * 2, name="lacking")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be above 0"),
        ({"classes": 1}, "classes=1 must be at least 2"),
        ({"classes": 2}, "good has 4 images with labels such as 2; classes=2 takes 0 to 1"),
        ({"batch": 6}, "batch=6 cannot be split over 4 devices"),
        ({"train": ONE_CLASS}, "one has images of one class only"),
        ({"train": LACKING}, "lacking has no image of 1 of the classes of good: 'class 1'"),
        ({"test": Gone(*colours(12, CLASSES), name="gone")}, "gone has no image that can be read"),
        ({"test": UNLABELLED}, "bare has 4 images with labels such as -1"),
        ({"test": Plain(*colours(12, 5), name="more")}, "not have the same list of classes"),
        ({"learning_rate": 1e38}, r"step \d is not finite; a smaller .*now .* head\)"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(change, message):
    arguments = {
        "subject": colour_subject(),
        "train": GOOD,
        "test": GOOD,
        "classes": CLASSES,
        "mesh": devices(4),
        "epochs": 2,
        "batch": 8,
    }
    with pytest.raises(ValueError, match=message):
        sgd_probe(**(arguments | change))
