import dataclasses

import numpy as np
import pytest

from cassle_jax.data import Scenes
from cassle_jax.data.datasets import EvaluationData
from cassle_jax.evaluation.findings import Score
from cassle_jax.evaluation.store import FeatureStore
from cassle_jax.evaluation.subject import Subject
from cassle_jax.evaluation.tasks import TASKS, Bench, Settings
from cassle_jax.methods import Networks
from cassle_jax.methods.build import Conditioning
from tests.evaluation.analysed import (
    COLOR_DIFF,
    JITTERED,
    PIXELS,
    PLAIN,
    SPEC,
    Colour,
    colour_networks,
    devices,
)


@pytest.fixture
def bench():
    """Of an encoder without a projector."""
    networks = Networks({"encoder": Colour})
    variables = {"params": {}, "batch_stats": {}}
    subject = Subject("bare", networks, variables, SPEC, PLAIN, (JITTERED, JITTERED))
    scenes = Scenes(16, size=PIXELS)
    data = EvaluationData("scenes", scenes, scenes, scenes, 2, "accuracy", "classification")
    store = FeatureStore(subject, devices(1), batch=8)
    return Bench(subject, data, store, devices(1), Settings(analysed=12))


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("invariance", {f"difference under {name}, features" for name in
                        ("crop", "flip", "jitter", "grayscale", "blur")}),
        ("matching", {f"{metric}, {of}" for metric in ("InfoNCE", "accuracy")
                      for of in ("features", "chance")}),
    ],
)  # fmt: skip
def test_an_encoder_without_a_projector_is_analysed_and_told_so(bench, caplog, task, metrics):
    assert TASKS[task].suits(bench.data, asked_for=False)
    with caplog.at_level("INFO", logger="cassle_jax"):
        findings = TASKS[task].run(bench)
    assert f"{task} of bare: no projector" in caplog.text
    assert {each.metric for each in findings if isinstance(each, Score)} == metrics


def test_a_leak_is_measured_of_what_is_told_and_of_nothing_else(bench, caplog):
    with caplog.at_level("INFO", logger="cassle_jax"):
        assert TASKS["leak"].run(bench) == []
    assert "leak of bare: left out" in caplog.text
    told = dataclasses.replace(bench.subject, conditioning=Conditioning(descriptors=("color",)))
    value, chance, _ = TASKS["leak"].run(dataclasses.replace(bench, subject=told))
    assert (value.metric, chance.metric) == ("NT-Xent, ω alone", "NT-Xent, chance")
    assert chance.value == pytest.approx(np.log(5))  # half of 12 images hold two batches of 3
    assert not TASKS["leak"].suits(bench.data, asked_for=False)


def test_matching_says_where_omega_enters_with_the_image(bench, caplog):
    conditioning = dataclasses.replace(COLOR_DIFF, injection="image")
    networks, variables = colour_networks(conditioning)
    told = dataclasses.replace(
        bench.subject, networks=networks, variables=variables, conditioning=conditioning
    )
    with caplog.at_level("INFO", logger="cassle_jax"):
        TASKS["matching"].run(dataclasses.replace(bench, subject=told))
    assert "matching of bare: ω enters with the image, so not by ω alone" in caplog.text


def test_analysed_images_are_in_an_order_that_is_always_the_same(bench):
    def labels():
        rows = [batch["label"][batch["mask"]] for batch in bench.analysed()]
        return np.concatenate(rows)

    first = labels()
    assert len(first) == 12
    np.testing.assert_array_equal(first, labels())
    in_order = [bench.data.test[place].label for place in range(12)]
    assert first.tolist() != in_order
